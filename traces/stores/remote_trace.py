# SPDX-License-Identifier: Apache-2.0
"""A trace in a store, opened by its footer: row groups are fetched when they are read, and no others.

What is fetched goes to its own place in a temporary file of the object's size, most of which is a hole, so that the
reader and its checks are those of any trace. The file has no name: it is gone with the process, however that ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from traces import durable
from traces.encoding import PARQUET_MAGIC, SEAL_SIZE
from traces.errors import Problem
from traces.frame import MAX_FOOTER, TAIL_SIZE
from traces.metadata import RowGroup
from traces.reader import Trace
from traces.stores.object_store import Objects, StoredObject

TAIL: Final = 64 << 10  # read at once: footers are some 20 KiB
_PART: Final = 32 << 20  # bytes of a range that are in memory at a time


@contextmanager
def remote_trace(
    objects: Objects, found: StoredObject, vm: int | None = None, *, footer_only: bool = False
) -> Iterator[Trace]:
    """Yield the trace; the rows of `vm` are fetched in few requests, those of other VMs as they are read.

    With `footer_only` rows cannot be read, and what only they show is not known. Problems name the object by its key.
    There are two requests at most until a row is read: for the end, and for the rest of the footer where that is
    longer; of an object that ends otherwise, for its begin, which shows what it is.
    """
    with tempfile.TemporaryFile() as file:
        copy = _Copy(objects, found, file.fileno())
        try:
            copy.fetch_footer()
            trace = Trace.open(copy.path, fetch=_refuse if footer_only else copy.fetch)
            if vm is not None:
                copy.fetch_groups(trace.groups(vm))
            yield trace
        except Problem as problem:
            text = str(problem)
            if str(copy.path) not in text:
                raise
            raise Problem(text.replace(str(copy.path), found.key), problem.code) from None


def _refuse(group: RowGroup) -> None:
    raise Problem(f"row group at {group.offset:,}: not read")


class _Copy:
    """A file with the parts of an object that were fetched, each at its own place."""

    def __init__(self, objects: Objects, found: StoredObject, fd: int) -> None:
        self._objects, self._found, self._fd = objects, found, fd
        self._fetched: set[int] = set()  # offsets of the row groups that were fetched
        self.path = Path(f"/proc/self/fd/{fd}")
        self._from = found.size  # from here on everything was fetched
        os.ftruncate(fd, found.size)

    def fetch_footer(self) -> None:
        """Fetch the end of the object, and what else shows what it is."""
        size = self._found.size
        tail = self._take(max(size - TAIL, 0), size)
        if self._from == 0:
            return
        length = int.from_bytes(tail[-TAIL_SIZE:][:4], "little")
        begin = size - TAIL_SIZE - length - SEAL_SIZE
        if not tail.endswith(PARQUET_MAGIC):
            self._take(0, min(TAIL, self._from))
            return
        if begin < self._from and length <= MAX_FOOTER and begin >= 0:
            self._take(begin, self._from)
        self._put(0, PARQUET_MAGIC)

    def fetch(self, group: RowGroup) -> None:
        """Fetch a row group, unless it was fetched before."""
        self.fetch_groups([group])

    def fetch_groups(self, groups: Sequence[RowGroup]) -> None:
        """Fetch row groups, adjacent ones in one request."""
        spans: list[tuple[int, int]] = []
        for group in sorted(groups, key=lambda group: group.offset):
            end = group.offset + group.size
            if group.offset in self._fetched or group.offset >= self._from:
                continue
            self._fetched.add(group.offset)
            if spans and spans[-1][1] == group.offset:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((group.offset, end))
        for start, end in spans:
            for part in range(start, end, _PART):
                self._put(part, self._objects.read(self._found.key, part, min(part + _PART, end), self._found.etag))

    def _take(self, start: int, end: int) -> bytes:
        data = self._objects.read(self._found.key, start, end, self._found.etag) if end > start else b""
        self._put(start, data)
        if end >= self._from:
            self._from = start
        return data

    def _put(self, start: int, data: bytes) -> None:
        try:
            os.lseek(self._fd, start, os.SEEK_SET)
            durable.write_all(self._fd, data)
        except OSError as error:
            raise Problem(f"{tempfile.gettempdir()}: {error.strerror}: no room for what is read of a trace") from None
