"""Reading a trace: nothing of the file is trusted before it was checked.

The footer's metadata carries its own CRC; every row group's bytes are checked against theirs before Arrow decodes a
single page, and every decoded batch is validated fully.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from traces.columns import SCHEMA
from traces.errors import Problem
from traces.metadata import CHECKSUM_KEY, KEY, MAX_BYTES, Metadata, RowGroup, parse

BATCH_ROWS: Final = 1 << 16
MAX_ROW_GROUP_ROWS: Final = 1 << 24
_MAX_FOOTER: Final = MAX_BYTES + (64 << 20)
_MAGIC: Final = b"PAR1"
# What decoding damaged bytes can raise in pyarrow; MemoryError where a length lies.
_DECODE_ERRORS: Final = (
    pa.ArrowException,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    MemoryError,
    OverflowError,
)


class Trace:
    """One trace file, checked. `open` it; `metadata` says what it is; `batches` and `scan` give its rows."""

    def __init__(self, path: Path, file: pq.ParquetFile, metadata: Metadata) -> None:
        self.path = path
        self.metadata = metadata
        self.schema: pa.Schema = file.schema_arrow
        self._file = file
        self._verified: set[int] = set()

    @classmethod
    def open(cls, path: Path | str) -> Trace:
        """Open and check the file; raises Problem (one line, with the path) if it is not a sound trace of format 1."""
        path = Path(path)
        _check_frame(path)
        try:
            file = pq.ParquetFile(path, read_dictionary=["kind"], memory_map=False, pre_buffer=False)
            pairs = file.metadata.metadata or {}
        except _DECODE_ERRORS as error:
            raise _damaged(path, "footer", error) from None
        text = pairs.get(KEY)
        if text is None:
            raise Problem(f"{path}: not a kvmtrace trace (a Parquet file without `{KEY.decode()}` metadata)")
        if pairs.get(CHECKSUM_KEY) != str(zlib.crc32(text)).encode():
            raise Problem(f"{path}: damaged: its metadata does not fit its checksum")
        trace = cls(path, file, parse(text, str(path)))
        trace._check_schema()
        trace._check_row_groups()
        return trace

    def counts(self) -> dict[str, int]:
        """Stored rows by kind name."""
        return dict(self.metadata.kinds)

    def batches(
        self, columns: Sequence[str] | None = None, vm: int | None = None, size: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """Rows as validated record batches of at most `size` rows, one thread, in file order.

        Within one VM, file order is ring order (ascending `seq`). With `vm`, only that VM's rows; rows of no known VM,
        and `gap` rows, are not among them (gaps are in `metadata.gaps`). `columns` in the order wanted; all by default.
        """
        unknown = [name for name in columns or () if name not in self.schema.names]
        if unknown:
            raise Problem(f"{self.path}: no column `{unknown[0]}` in this trace")
        for index, group in enumerate(self.metadata.row_groups):
            if vm is None or group.vm == vm:
                yield from self._decode(index, list(columns) if columns is not None else None, size)

    def scan(self) -> pl.LazyFrame:
        """The whole trace as a polars LazyFrame, after every row group was checked against its CRC."""
        self.verify()
        return pl.scan_parquet(self.path)

    def verify(self) -> None:
        """Check every row group's bytes against their CRC; a Problem names the first that does not fit."""
        for index in range(len(self.metadata.row_groups)):
            self._verify(index)

    def _decode(self, index: int, columns: list[str] | None, size: int) -> Iterator[pa.RecordBatch]:
        self._verify(index)
        rows = 0
        try:
            for batch in self._file.iter_batches(size, [index], columns, use_threads=False):
                batch.validate(full=True)
                rows += batch.num_rows
                yield batch if columns is None else batch.select(columns)
        except _DECODE_ERRORS as error:
            raise _damaged(self.path, f"row group {index}", error) from None
        if rows != self.metadata.row_groups[index].rows:
            raise Problem(f"{self.path}: damaged: row group {index} has {rows} rows, not what its metadata says")

    def _verify(self, index: int) -> None:
        if index in self._verified:
            return
        group = self.metadata.row_groups[index]
        crc, left = 0, group.size
        try:
            with self.path.open("rb") as file:
                file.seek(group.offset)
                while left and (data := file.read(min(left, 1 << 20))):
                    crc = zlib.crc32(data, crc)
                    left -= len(data)
        except OSError as error:
            raise Problem(f"{self.path}: {error.strerror}") from None
        if left or crc != group.crc32:
            raise Problem(f"{self.path}: damaged: row group {index} does not fit its checksum")
        self._verified.add(index)

    def _check_schema(self) -> None:
        for field in SCHEMA:
            at = self.schema.get_field_index(field.name)
            if at < 0:
                raise Problem(f"{self.path}: damaged: column `{field.name}` is missing")
            found = self.schema.field(at).type
            wanted = pa.string() if field.name == "kind" else field.type
            if (found.value_type if pa.types.is_dictionary(found) else found) != wanted:
                raise Problem(f"{self.path}: damaged: column `{field.name}` is {found}, not {field.type}")

    def _check_row_groups(self) -> None:
        """The footer and our own index must tell the same story, within the file, in sizes that rows can have."""
        footer = self._file.metadata
        groups = self.metadata.row_groups
        end = len(_MAGIC)
        fits = footer.num_row_groups == len(groups) and sum(g.rows for g in groups) == self.metadata.events
        fits = fits and sum(self.metadata.kinds.values()) == self.metadata.events == footer.num_rows
        for index, group in enumerate(groups):
            fits = fits and group.offset >= end and 0 < group.rows <= MAX_ROW_GROUP_ROWS and group.size > 0
            end = group.offset + group.size
            fits = fits and _chunks_fit(footer.row_group(index), group)
        if not fits or end > self.path.stat().st_size:
            raise Problem(f"{self.path}: damaged: its row groups are not where its metadata says")


def _check_frame(path: Path) -> None:
    """Magic numbers and the footer's length, before Arrow sees the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(max(0, size - 8))
            tail = file.read(8)
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}") from None
    if head != _MAGIC:
        raise Problem(f"{path}: not a kvmtrace trace (not a Parquet file)")
    if size < 12 or tail[4:] != _MAGIC:
        raise Problem(f"{path}: cut short: the end of the Parquet file is missing")
    if int.from_bytes(tail[:4], "little") > min(size - 12, _MAX_FOOTER):
        raise Problem(f"{path}: damaged: its footer has an impossible length")


def _chunks_fit(footer: Any, group: RowGroup) -> bool:
    if footer.num_rows != group.rows:
        return False
    for index in range(footer.num_columns):
        chunk = footer.column(index)
        start = chunk.data_page_offset
        if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
            start = min(start, chunk.dictionary_page_offset)
        inside = group.offset <= start and start + chunk.total_compressed_size <= group.offset + group.size
        bound = (1 << 16) + 24 * group.rows  # no encoding of ours takes more for a number or a kind's name
        if not (inside and chunk.num_values == group.rows and 0 <= chunk.total_uncompressed_size <= bound):
            return False
    return True


def _damaged(path: Path, what: str, error: BaseException) -> Problem:
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return Problem(f"{path}: damaged: {what}: {why[:200]}")
