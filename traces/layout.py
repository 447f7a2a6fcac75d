"""How the named columns lie in the Parquet file, and how a file is written: the result of `benchmarks/format.py`."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from traces import durable
from traces.columns import SCHEMA

ROW_GROUP_ROWS: Final = 1 << 20

_DICTIONARY: Final = ("kind",)

OPTIONS: Final[dict[str, Any]] = {
    "compression": "zstd",
    "use_dictionary": list(_DICTIONARY),
    "column_encoding": {name: "DELTA_BINARY_PACKED" for name in SCHEMA.names if name not in _DICTIONARY},
    "write_batch_size": 1 << 16,
}


class ParquetFile:
    """A Parquet file in the making: row groups with their CRC, metadata at the end, visible only when finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._sink = _Sink(self._temporary)
        try:
            self._writer = pq.ParquetWriter(self._sink, SCHEMA, **OPTIONS)
        except BaseException:
            self.discard()
            raise

    def write(self, batch: pa.RecordBatch) -> dict[str, int]:
        """Write the batch as one row group; where its bytes lie and their CRC-32."""
        offset = self._sink.position
        self._sink.crc32 = 0
        self._writer.write_batch(batch, row_group_size=batch.num_rows)
        return {"offset": offset, "size": self._sink.position - offset, "crc32": self._sink.crc32}

    def finish(self, metadata: dict[bytes, bytes]) -> int:
        """Write the footer, make the file durable under its name; its size in bytes."""
        self._writer.add_key_value_metadata(metadata)
        self._writer.close()
        durable.sync(self._sink.fd)
        self._sink.end()
        durable.replace(self._temporary, self.path)
        return self._sink.position

    def discard(self) -> None:
        """Remove what was written; harmless after `finish`."""
        self._sink.end()
        self._temporary.unlink(missing_ok=True)


class _Sink:
    """The file object Arrow writes to, which keeps count and CRC."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self.position = 0
        self.crc32 = 0

    @property
    def closed(self) -> bool:
        return self.fd < 0

    def write(self, data: bytes | pa.Buffer) -> int:
        view = memoryview(data).cast("B")
        durable.write_all(self.fd, view)
        self.crc32 = zlib.crc32(view, self.crc32)
        self.position += len(view)
        return len(view)

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        pass

    def close(self) -> None:
        """Called by Arrow at the footer's end; the descriptor stays open for the fsync."""

    def end(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
