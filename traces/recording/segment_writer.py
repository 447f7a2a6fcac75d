# SPDX-License-Identifier: Apache-2.0
"""Writing a recording as it grows; segments.py says what its directory holds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from traces import durable
from traces.errors import Problem
from traces.record import Columns
from traces.recording.record_buffer import RecordBuffer
from traces.recording.sealed_stream import END, BatchEncoder

MANIFEST: Final = "manifest.json"
SEGMENT_ROWS: Final = 1 << 21


def segment_name(index: int) -> str:
    return f"seg-{index:05d}.arrows"


class SegmentWriter:
    """Writes one recording's segments and manifest into a directory of its own.

    Rows given to `write` are durable after the next `flush`; a kill loses at most what came after the last one. The
    first failing write, fsync or rename ends the recording: it surfaces as a Problem that says what was kept.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self.directory = directory
        self.rows = 0  # taken so far
        self._segment_bytes = self._manifest_bytes = 0
        self._manifest = dict(manifest)
        self._sealed = 0  # rows in segments
        self._segment = 0
        self._segment_rows = 0
        self._fd = -1
        self._encoder = BatchEncoder()
        self._buffer = RecordBuffer()
        self._failure: Problem | None = None
        try:
            directory.mkdir()
        except FileExistsError:
            raise Problem(
                f"{directory} is what an earlier recording left: run `kvmtrace recover {directory}`, or remove it"
            ) from None
        except OSError as error:
            raise Problem(f"{directory}: cannot create it: {error.strerror}") from None
        try:
            self.update_manifest({})
        except Problem:
            shutil.rmtree(directory, ignore_errors=True)  # nothing is in it yet
            raise

    @property
    def bytes_written(self) -> int:
        """The bytes on disk: those of the segments, and of the manifest as it is now."""
        return self._segment_bytes + self._manifest_bytes

    def write(self, records: NDArray[np.void]) -> None:
        """Take records (dtype RECORD; copied, the caller may reuse the memory)."""
        self.rows += len(records)
        for columns in self._buffer.add(records):
            self._write_batch(columns)

    def flush(self) -> None:
        """Make every row taken so far durable; call it about once a second."""
        self._write_buffer()
        if self._fd >= 0:
            with self._failing():
                durable.sync(self._fd)

    def update_manifest(self, changes: Mapping[str, Any]) -> None:
        """Merge top-level keys into the manifest and replace it on disk."""
        self._manifest.update(changes)
        with self._failing():
            self._manifest_bytes = durable.write_json(self.directory / MANIFEST, self._manifest)

    def close(self, changes: Mapping[str, Any]) -> None:
        """End the recording: every row and the final manifest are durable afterwards."""
        self._write_buffer()
        self._end_segment()
        self.update_manifest({**changes, "closed": {"rows": self._sealed}})

    def _write_buffer(self) -> None:
        for columns in self._buffer.rest():
            self._write_batch(columns)

    def write_encoded(self, message: bytes, rows: int) -> None:
        """Take a BatchEncoder's message of `rows` records, which come after those given to `write`."""
        self._write_buffer()
        self.rows += rows
        self._write_message(message, rows)

    def _write_batch(self, columns: Columns) -> None:
        self._write_message(self._encoder.batch(columns), len(columns["time"]))

    def _write_message(self, message: bytes, rows: int) -> None:
        if self._failure is not None:
            raise self._failure
        if self._fd < 0:
            self._begin_segment()
            message = self._encoder.head + message
        self._append(message + self._encoder.seal(message, self._sealed, rows))
        self._sealed += rows
        self._segment_rows += rows
        if self._segment_rows >= SEGMENT_ROWS:
            self._end_segment()

    def _begin_segment(self) -> None:
        with self._failing():
            path = self.directory / segment_name(self._segment)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            durable.sync_directory(self.directory)

    def _end_segment(self) -> None:
        if self._fd < 0:
            return
        self._append(END)
        with self._failing():
            durable.sync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._segment += 1
        self._segment_rows = 0

    def _append(self, data: bytes) -> None:
        with self._failing():
            durable.write_all(self._fd, data)
        self._segment_bytes += len(data)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except OSError as error:
            self._failure = Problem(
                f"{self.directory}: {error.strerror}: recording ended, {self._sealed:,} events are kept: "
                f"make room, then run `kvmtrace recover {self.directory}`"
            )
            raise self._failure from error
