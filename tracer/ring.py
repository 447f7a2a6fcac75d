# SPDX-License-Identifier: Apache-2.0
"""The BPF ring buffers, read in bulk: memory mapped, records of one size viewed as an array, one copy a batch.

Layout (kernel/bpf/ringbuf.c): a consumer page that we may write, a producer page, and the data mapped twice in a row so
that a record never wraps. Each record has an 8-byte header whose bit 31 says that its probe is still writing.
"""

from __future__ import annotations

import mmap
import time
from typing import Any

import numpy as np

from traces.record import RECORD
from traces.schema import RECORD_SIZE

HEADER_SIZE = 8
STRIDE = HEADER_SIZE + RECORD_SIZE
BATCH = 1 << 17  # records a batch, 10 MiB: large enough to be cheap, small enough to keep the ring free
MAX_RINGS = 16
DEFAULT_RING = 32 << 20
DEFAULT_TOTAL = 256 << 20
_BLOCK = 1 << 12  # records, 352 KiB: a block that was looked at is still in the core's own cache when it is copied
_BUSY = np.uint32(1 << 31)
_SLOT = np.dtype([("length", "u4"), ("page", "u4"), ("record", f"V{RECORD_SIZE}")])

Records = np.ndarray[Any, Any]


def ring_count(cpus: int) -> int:
    return min(cpus, MAX_RINGS)


def default_ring_bytes(cpus: int) -> int:
    """Return the size of each ring: 32 MiB, less if so many CPUs would have more than 256 MiB in all."""
    return min(DEFAULT_RING, 1 << (DEFAULT_TOTAL // ring_count(cpus)).bit_length() - 1)


class Ring:
    """The consumer of a BPF ring buffer of `size` bytes, whose records all have the layout RECORD."""

    def __init__(self, fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self.size = size
        self._consumer_map = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        self._data_map = mmap.mmap(fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._consumer = np.frombuffer(self._consumer_map, dtype=np.uint64, count=1)
        self._producer = np.frombuffer(self._data_map, dtype=np.uint64, count=1)
        self._data_offset = page

    @property
    def position(self) -> int:
        """Bytes read since the recording began."""
        return int(self._consumer[0])

    @property
    def end(self) -> int:
        """Bytes written since the recording began."""
        return int(self._producer[0])

    @property
    def fill(self) -> float:
        """The share of the ring that waits to be read, 0 to 1."""
        return (self.end - self.position) / self.size

    def peek(self) -> Records:
        """Return the finished records in ring order, not copied: they stay in the ring until they are released."""
        position = self.position
        count = (self.end - position) // STRIDE
        start = self._data_offset + position % self.size
        slots: Records = np.ndarray((count,), dtype=_SLOT, buffer=self._data_map, offset=start)
        busy = np.flatnonzero(slots["length"] & _BUSY)
        return slots["record"][: int(busy[0]) if len(busy) else count].view(RECORD)

    def release(self, count: int) -> None:
        """Give back the space of `count` records."""
        self._consumer[0] = self.position + count * STRIDE

    def drain(self) -> Records | None:
        """Return at most BATCH finished records in ring order, copied out and released; None where there are none."""
        position = self.position
        count = min((self.end - position) // STRIDE, BATCH)
        if count == 0:
            return None
        start = self._data_offset + position % self.size
        slots: Records = np.ndarray((count,), dtype=_SLOT, buffer=self._data_map, offset=start)
        copied: Records = np.empty(count, slots["record"].dtype)
        for first in range(0, count, _BLOCK):
            block = slots[first : first + _BLOCK]
            busy = np.flatnonzero(block["length"] & _BUSY)
            finished = block["record"][: int(busy[0])] if len(busy) else block["record"]
            copied[first : first + len(finished)] = finished
            if len(busy):
                count = first + len(finished)
                break
        # x86 keeps loads before later stores: the copy is done before the space is given back.
        self.release(count)
        return copied[:count].view(RECORD) if count else None


class Rings:
    """All rings of a recording, read in rounds. Each ring is in order; `order.Order` makes one stream of them."""

    def __init__(self, fds: list[int], size: int) -> None:
        self._rings = [Ring(fd, size) for fd in fds]
        self.complete_at = 0  # as of the last round, see `drain`

    @property
    def fill(self) -> float:
        """How full the fullest ring is, 0 to 1."""
        return max(ring.fill for ring in self._rings)

    def peek(self) -> tuple[list[Records], int]:
        """Return each ring's records, not copied, and the time (boot ns) up to which none is missing."""
        began = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        ends = [ring.end for ring in self._rings]
        parts = [ring.peek() for ring in self._rings]
        if all(
            ring.position + len(part) * STRIDE >= end for ring, part, end in zip(self._rings, parts, ends, strict=True)
        ):
            self.complete_at = began
        return parts, self.complete_at

    def release(self, counts: list[int]) -> None:
        """Give back the space of that many records of each ring."""
        for ring, count in zip(self._rings, counts, strict=True):
            ring.release(count)

    def drain(self) -> tuple[list[Records], int]:
        """Read all rings once; return the records, and the time (boot ns) up to which none is missing now."""
        began = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        batches, whole = [], True
        for ring in self._rings:
            end = ring.end
            while ring.position < end and (records := ring.drain()) is not None:
                batches.append(records)
            whole &= ring.position >= end
        if whole:  # else a probe was still writing, and what it writes may be older than this round
            self.complete_at = began
        return batches, self.complete_at
