"""The BPF ring buffer, read in bulk: its memory mapped, records of one size viewed as an array, one copy a batch.

Layout (kernel/bpf/ringbuf.c): a consumer page that we may write, a producer page, and the data mapped twice in a row so
that a record never wraps. Each record has an 8-byte header whose bit 31 says that its probe is still writing.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from traces.record import RECORD
from traces.schema import RECORD_SIZE

HEADER_SIZE = 8
STRIDE = HEADER_SIZE + RECORD_SIZE
BATCH = 1 << 17  # records a batch, 10 MiB: large enough to be cheap, small enough to keep the ring free
_BUSY = np.uint32(1 << 31)
_SLOT = np.dtype([("length", "u4"), ("page", "u4"), ("record", f"V{RECORD_SIZE}")])


class Ring:
    """Consumer of one ring buffer map of `size` bytes whose records all have the trace's record layout."""

    def __init__(self, fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self.size = size
        self._consumer_map = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        self._data_map = mmap.mmap(fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._consumer = np.frombuffer(self._consumer_map, dtype=np.uint64, count=1)
        self._producer = np.frombuffer(self._data_map, dtype=np.uint64, count=1)
        self._data_offset = page

    @property
    def fill(self) -> float:
        """The share of the ring that waits to be read, 0 to 1."""
        return (int(self._producer[0]) - int(self._consumer[0])) / self.size

    def drain(self) -> np.ndarray[Any, Any] | None:
        """At most BATCH finished records in ring order, copied out and released; None where there are none."""
        position = int(self._consumer[0])
        count = min((int(self._producer[0]) - position) // STRIDE, BATCH)
        if count == 0:
            return None
        start = self._data_offset + position % self.size
        slots: np.ndarray[Any, Any] = np.ndarray((count,), dtype=_SLOT, buffer=self._data_map, offset=start)
        busy = np.flatnonzero(slots["length"] & _BUSY)
        if len(busy):
            count = int(busy[0])
            if count == 0:
                return None
        records = slots["record"][:count].copy().view(RECORD)
        # x86 keeps loads before later stores: the copy is done before the space is given back.
        self._consumer[0] = position + count * STRIDE
        return records
