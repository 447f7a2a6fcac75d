# SPDX-License-Identifier: Apache-2.0
"""The recording as it grows: a directory of Arrow IPC streams that survives a kill.

`OUT.kvmt/` holds `manifest.json` (replaced by rename) and `seg-00000.arrows`, `seg-00001.arrows`, ... Each segment is
an ordinary Arrow IPC stream of the raw records. Every batch of records is followed by its seal: an empty batch whose
metadata carries the first row's number, the row count and the CRC-32 of all bytes since the previous seal and of these
two numbers. A batch without a seal was being written when the recorder died; one whose seal does not fit is damaged,
and is never decoded.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from traces.errors import Problem
from traces.foreign import of_no_directory
from traces.record import Columns
from traces.recording.arrow_records import RECORD_SCHEMA, to_columns
from traces.recording.sealed_stream import seal_crc
from traces.recording.segment_writer import MANIFEST

MAX_BATCH_ROWS: Final = 1 << 20  # the most that a reader accepts
MAX_MANIFEST: Final = 24 << 20  # bytes; a larger one is not ours, and a trace's metadata must have room for it


def _size(path: Path) -> int:
    """Return the size of a regular file in bytes; raises ValueError for others, which might be read for ever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    return status.st_size


@dataclass(frozen=True)
class Segment:
    """How far one segment could be read; final once its batches were read to the end."""

    name: str
    rows: int
    unread: int  # bytes after the last whole batch
    why: str  # what ended the reading early, empty where the stream's end was reached


class SegmentReader:
    """Reads the sealed batches of a recording's directory, whatever state a killed recorder left it in.

    Iterate `batches()` once; then `segments` says for each file how far it could be read. Nothing in the directory is
    trusted: a batch is decoded only after its seal was checked, and used only after Arrow validated it fully.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.segments: list[Segment] = []
        self.manifest_problem = ""
        self._expected = 0  # the lowest row number that the next row may have
        try:
            names = sorted(path.name for path in directory.iterdir())
        except NotADirectoryError:
            raise Problem(f"{directory}: not what a recorder left, but {of_no_directory(directory)}") from None
        except OSError as error:
            raise Problem(f"{directory}: cannot read it: {error.strerror}") from None
        self._names = [name for name in names if re.fullmatch(r"seg-\d{5,}\.arrows", name)]
        self._names.sort(key=lambda name: (len(name), name))
        if not self._names and MANIFEST not in names:
            raise Problem(f"{directory}: no recording in here (neither {MANIFEST} nor segments)")
        self.manifest = self._read_manifest()

    def batches(self) -> Iterator[tuple[int, Columns]]:
        """Yield each sealed batch as (number of its first row in the recording, columns by record field)."""
        for name in self._names:
            yield from self._read_segment(name)

    def _read_manifest(self) -> dict[str, Any]:
        path = self.directory / MANIFEST
        try:
            if _size(path) > MAX_MANIFEST:
                raise ValueError("too large")
            manifest = json.loads(path.read_bytes())
            if not isinstance(manifest, dict):
                raise ValueError("not an object")
        except (OSError, ValueError, RecursionError) as error:
            self.manifest_problem = f"{MANIFEST}: {error}"
            return {}
        return manifest

    def _read_segment(self, name: str) -> Iterator[tuple[int, Columns]]:
        path = self.directory / name
        rows = end = size = 0
        why = ""
        try:
            size = _size(path)
            with pa.memory_map(str(path)) as source:
                stream = _Messages(source)
                while (sealed := stream.next_batch()) is not None:
                    first, columns = sealed
                    if first < self._expected:
                        raise ValueError("a batch repeats rows")
                    end = stream.end
                    rows += len(columns["time"])
                    self._expected = first + len(columns["time"])
                    yield first, columns
                end = stream.end
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError, RecursionError) as error:
            why = (str(error).splitlines() or ["damaged"])[0]
        self.segments.append(Segment(name, rows, size - end, why))


class _Messages:
    """The messages of one segment: the schema, then batches, each followed by its seal."""

    def __init__(self, source: pa.MemoryMappedFile) -> None:
        self._source = source
        self._bytes = memoryview(source.read_buffer())
        source.seek(0)
        self._messages = pa.ipc.MessageReader.open_stream(source)
        schema = self._next()
        # pyarrow reads any message as a schema (26.0), also one that is none, and then beyond its end.
        if schema is None or schema.type != "schema" or pa.ipc.read_schema(schema) != RECORD_SCHEMA:
            raise ValueError("not a segment of a recording")
        self._head = bytes(self._bytes[: source.tell()])
        self.end = 0  # of the last sealed batch, or of the stream

    def next_batch(self) -> tuple[int, Columns] | None:
        """Return the next sealed batch, or None at the stream's end; raises where it is torn or damaged."""
        before = self._source.tell()
        message = self._next()
        if message is None:
            if self._source.tell() == before:
                raise ValueError("ends without the stream's end mark")
            self.end = self._source.tell()
            return None
        middle = self._source.tell()
        if self._next() is None:
            raise ValueError("the last batch has no seal")
        first, rows, crc = self._read_seal(self._bytes[middle : self._source.tell()])
        if seal_crc(self._bytes[self.end : middle], first, rows) != crc:
            raise ValueError("a batch does not fit its seal")
        batch = pa.ipc.read_record_batch(message, RECORD_SCHEMA)
        batch.validate(full=True)
        if batch.num_rows != rows or any(column.null_count for column in batch.columns):
            raise ValueError("a batch is not what its seal says")
        self.end = self._source.tell()
        return first, to_columns(batch)

    def _next(self) -> pa.Message | None:
        try:
            return self._messages.read_next_message()
        except StopIteration:
            return None

    def _read_seal(self, message: memoryview) -> tuple[int, int, int]:
        # pyarrow shows a batch's metadata only through a stream reader: give it a stream of just this batch.
        reader = pa.ipc.open_stream(pa.py_buffer(self._head + bytes(message)))
        _, metadata = reader.read_next_batch_with_custom_metadata()
        seal = json.loads(metadata["seal"])
        first, rows, crc = (int(seal[key]) for key in ("first", "rows", "crc32"))
        if not (0 <= first < 1 << 62 and 0 < rows <= MAX_BATCH_ROWS):
            raise ValueError("a seal is out of range")
        return first, rows, crc
