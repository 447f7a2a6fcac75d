# SPDX-License-Identifier: Apache-2.0
"""How a trace lies in its file: the encodings that `benchmarks/format.py` found best, and CRCs over every byte.

A trace is an ordinary Parquet file. Between the last row group and the footer, where Parquet allows anything, are 12
bytes of its own: `KVMTRACE` and the CRC-32 of the rest of the file. The row groups' own CRCs are in the footer's
metadata. A reader therefore finds damage before it decodes anything.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Final, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from traces.background import Background
from traces.columns import SCHEMA
from traces.outputs import RECORDING, FileKind, Output

PARQUET_MAGIC: Final = b"PAR1"
MAGIC: Final = b"KVMTRACE"
SEAL_SIZE: Final = len(MAGIC) + 4

ROW_GROUP_ROWS: Final = 1 << 20

TEXT: Final = pa.field("text", pa.string())

# Rising or page-like numbers pack best as differences; everything else repeats and is a dictionary.
DELTA: Final = ("seq", "time", "gfn")

OPTIONS: Final[dict[str, Any]] = {
    "compression": "lz4",
    "use_dictionary": [name for name in SCHEMA.names if name not in DELTA],
    "column_encoding": dict.fromkeys(DELTA, "DELTA_BINARY_PACKED"),
    "dictionary_pagesize_limit": 8 << 20,
    "max_rows_per_page": ROW_GROUP_ROWS,
    "write_statistics": ["seq", "time", "vm"],  # what others filter by; of all columns they are a sixth of the writing
}


class Texts(Protocol):
    """The texts of an import's rows for which there are no columns."""

    def column(self, rows: pa.RecordBatch) -> pa.Array:
        """Return the texts of rows of SCHEMA, null where a row has none."""


class TraceFile:
    """A trace that is being written: row groups with CRCs, metadata at the end, visible only when finished."""

    def __init__(
        self, path: Path, kind: FileKind = RECORDING, *, force: bool = False, texts: Texts | None = None
    ) -> None:
        """`texts` adds a column with the texts of rows of the kind `other`."""
        self.path = path
        self._texts = texts
        schema = SCHEMA if texts is None else SCHEMA.append(TEXT)
        self._output = Output(path, kind, force=force)
        self._sink = _Sink(self._output)
        self._background = Background()
        self._places: list[dict[str, int]] = []
        try:
            self._writer = pq.ParquetWriter(self._sink, schema, **OPTIONS)
        except BaseException:
            self.discard()
            raise

    def write(self, batches: list[pa.RecordBatch]) -> None:
        """Write the batches as one row group, in a thread of its own."""
        if (texts := self._texts) is not None:
            batches = [batch.append_column(TEXT, texts.column(batch)) for batch in batches]
        table = pa.Table.from_batches(batches)
        self._background.do(lambda: self._encode(table))

    def _encode(self, table: pa.Table) -> None:
        offset = self._sink.position
        self._sink.crc32 = 0
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._places.append({"offset": offset, "size": self._sink.position - offset, "crc32": self._sink.crc32})

    def places(self) -> list[dict[str, int]]:
        """Wait until all row groups are written; return for each where its bytes lie and their CRC-32."""
        self._background.wait()
        return self._places

    def finish(self, metadata: dict[bytes, bytes]) -> int:
        """Write the seal and the footer, make the file durable under its name; return its size in bytes."""
        self._background.wait()
        self._sink.hold()
        self._writer.add_key_value_metadata(metadata)
        self._writer.close()
        self._sink.end()
        self._output.commit()
        return self._sink.position

    def discard(self) -> None:
        """Remove what was written; harmless after `finish`."""
        self._background.end()
        self._sink.abandon()
        self._output.discard()


class _Sink:
    """The file object that Arrow writes to: it counts bytes and computes the CRC, and holds the footer back."""

    def __init__(self, output: Output) -> None:
        self.closed = False
        self.position = 0
        self.crc32 = 0
        self._held: list[bytes] | None = None
        self._output = output

    def write(self, data: bytes | pa.Buffer) -> int:
        view = memoryview(data).cast("B")
        if self._held is not None:
            self._held.append(bytes(view))
        else:
            self._write(view)
            self.crc32 = zlib.crc32(view, self.crc32)
        return len(view)

    def flush(self) -> None:
        """Do nothing: Arrow calls it, and what is held back stays so."""

    def close(self) -> None:
        """Do nothing: Arrow calls it after the footer, and the file stays open for `end`."""

    def hold(self) -> None:
        """Hold back what is written from now on, which is the footer, until `end`."""
        self._held = []

    def end(self) -> None:
        """Write the seal and what was held back."""
        footer = b"".join(self._held or ())
        self._write(memoryview(MAGIC + zlib.crc32(footer).to_bytes(4, "little") + footer))
        self.abandon()

    def abandon(self) -> None:
        """Ignore later writes, such as those of Arrow's writer when it is garbage-collected."""
        self._held = []
        self.closed = True

    def _write(self, data: memoryview) -> None:
        self._output.write(data)
        self.position += len(data)
