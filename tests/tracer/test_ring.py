# SPDX-License-Identifier: Apache-2.0
"""The bulk reader against a ring made by hand, and the merge of several rings."""

from __future__ import annotations

import mmap
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.order import HOLD_NANOSECONDS, Order
from tracer.ring import BATCH, STRIDE, Ring, default_ring_bytes, ring_count
from traces.record import RECORD

PAGE = mmap.PAGESIZE
BUSY = 1 << 31


class Memory:
    """A file laid out like the kernel's ring: consumer page, producer page, data; the second mapping is a copy here."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("ring")
        self.size = size
        self.end = 0
        os.ftruncate(self.fd, 2 * PAGE + 2 * size)

    def put(self, time: int, busy: bool = False) -> None:
        record = np.zeros(1, RECORD)
        record["time"] = time
        data = struct.pack("<II", len(record.tobytes()) | (BUSY if busy else 0), 0) + record.tobytes()
        for i, byte in enumerate(data):
            at = (self.end + i) % self.size
            os.pwrite(self.fd, bytes([byte]), 2 * PAGE + at)
            os.pwrite(self.fd, bytes([byte]), 2 * PAGE + self.size + at)
        self.end += STRIDE
        os.pwrite(self.fd, struct.pack("<Q", self.end), PAGE)

    def finish(self, position: int) -> None:
        for base in (2 * PAGE, 2 * PAGE + self.size):
            os.pwrite(self.fd, struct.pack("<I", RECORD.itemsize), base + position % self.size)


def times(ring: Ring) -> list[int]:
    records = ring.drain()
    return [] if records is None else [int(t) for t in records["time"]]


def test_reads_in_order_and_wraps() -> None:
    memory = Memory(PAGE)
    ring = Ring(memory.fd, PAGE)
    assert times(ring) == []
    expected = 0
    for _ in range(20):  # 20 x 40 records of 88 bytes go round a 4096-byte ring 17 times
        for i in range(40):
            memory.put(expected + i)
        assert 0.8 < ring.fill < 0.9
        assert times(ring) == list(range(expected, expected + 40))
        expected += 40
    assert ring.position == ring.end == memory.end
    os.close(memory.fd)


def test_stops_at_a_record_that_is_still_being_written() -> None:
    memory = Memory(PAGE)
    ring = Ring(memory.fd, PAGE)
    memory.put(1)
    memory.put(2, busy=True)
    memory.put(3)
    assert times(ring) == [1]
    assert times(ring) == []
    memory.finish(STRIDE)
    assert times(ring) == [2, 3]
    os.close(memory.fd)


def test_what_is_peeked_at_stays_until_it_is_released() -> None:
    memory = Memory(PAGE)
    ring = Ring(memory.fd, PAGE)
    expected = 0
    for number in range(20):
        for i in range(40):
            memory.put(expected + i)
        memory.put(expected + 40, busy=True)
        assert ring.peek()["time"].tolist() == list(range(expected, expected + 40))
        ring.release(25)
        memory.finish((41 * number + 40) * STRIDE)
        assert ring.peek()["time"].tolist() == list(range(expected + 25, expected + 41))
        ring.release(16)
        assert ring.position == memory.end
        expected += 41
    os.close(memory.fd)


def test_what_was_drained_is_a_copy() -> None:
    memory = Memory(PAGE)
    ring = Ring(memory.fd, PAGE)
    memory.put(7)
    records = ring.drain()
    for time in range(60):
        memory.put(time + 100)
        ring.drain()
    assert records is not None
    assert records["time"].tolist() == [7]
    os.close(memory.fd)


@pytest.mark.parametrize("cpus", [1, 2, 3, 8, 16, 64, 512])
def test_ring_sizes_stay_within_their_total(cpus: int) -> None:
    size = default_ring_bytes(cpus)
    assert size & (size - 1) == 0
    assert size * ring_count(cpus) <= 256 << 20
    assert size >= BATCH * STRIDE, "one batch must fit"


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40_000_000)), max_size=200),
    st.lists(st.integers(1, 50), min_size=1, max_size=20),
)
def test_merge_gives_every_record_once_and_in_order(steps: list[tuple[int, int]], cuts: list[int]) -> None:
    """Records appear on four rings as time goes on; rounds drain them at arbitrary moments."""
    now, rings, order, out = 0, [[], [], [], []], Order(), []
    pending = list(steps)
    taken = [0] * 4
    for cut in [*cuts, len(steps)]:
        for ring, step in pending[:cut]:
            now += step
            rings[ring].append(now)
        pending = pending[cut:]
        batches = []
        for i, stamps in enumerate(rings):
            records = np.zeros(len(stamps) - taken[i], RECORD)
            records["time"] = stamps[taken[i] :]
            taken[i] = len(stamps)
            if len(records):
                batches.append(records)
        order.push(batches, now)
        for released in order.release():
            assert len(released)
            assert int(released["time"][-1]) <= max(now - HOLD_NANOSECONDS, 0)
            out += released["time"].tolist()
    for released in order.release(everything=True):
        out += released["time"].tolist()
    assert out == sorted(stamp for ring in rings for stamp in ring)
