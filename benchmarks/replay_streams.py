# SPDX-License-Identifier: Apache-2.0
"""Makes, in numpy, the streams of operations for the replay benchmark: six different kinds of VM, and SMI storms.

Guests touch pages in runs of 64: half of the runs are sequential, 30 % are skewed towards a few hot frames, 20 % are
uniform. The other operations (SMIs, zaps, switches of roots) are merged in between by the number of touches before
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from replay.simulate.operations import VCPU_SHIFT, Block, Cause, Op, Ranges, Word, pack

BATCH: Final = 1 << 16  # operations
RUN: Final = 64
SMM_TOUCHES: Final = 4  # pages that an SMI handler needs
SMRAM: Final = 0x30
NORMAL, SMM = Word(0x10), Word(0x1010, as_id=1)

Ints = NDArray[np.int64]
Places = NDArray[np.float64]


@dataclass
class Stream:
    """The operations of one VM, with the role words, the number of vCPUs and the gfn ranges that they refer to."""

    name: str
    words: list[Word]
    vcpus: int
    block: Block
    ranges: Ranges

    def first(self, count: int) -> Stream:
        block = self.block
        cut = Block(block.op[:count], block.gfn[:count], block.time[:count], block.seq[:count])
        return Stream(self.name, self.words, self.vcpus, cut, self.ranges)

    def batches(self) -> Iterator[Block]:
        """Yield the stream in pieces, each just written to the same memory and so in the cache, as from a reader."""
        op, gfn = np.empty(BATCH, np.uint32), np.empty(BATCH, np.int64)
        for at in range(0, len(self.block), BATCH):
            rows = slice(at, min(at + BATCH, len(self.block)))
            count = rows.stop - at
            op[:count], gfn[:count] = self.block.op[rows], self.block.gfn[rows]
            yield Block(op[:count], gfn[:count], self.block.time[rows], self.block.seq[rows])


def frames(rng: np.random.Generator, count: int, size: int) -> Ints:
    """Return `count` guest frame numbers below `size`, in the order in which a guest touches them."""
    runs = -(-count // RUN)
    uniform = rng.integers(0, size, (runs, RUN))
    skewed = (size * rng.random((runs, RUN)) ** 4).astype(np.int64)
    sequential = (rng.integers(0, size, (runs, 1)) + np.arange(RUN)) % size
    kind = rng.random((runs, 1))
    return np.where(kind < 0.5, sequential, np.where(kind < 0.8, skewed, uniform)).reshape(-1)[:count]


class Maker:
    """Collects operations with the places where they belong, then sorts them into a stream."""

    def __init__(self, count: int, seed: int, vcpus: int, size: int, level: int | Ints = 1) -> None:
        self.rng = np.random.default_rng(seed)
        self.count = count
        gfn = frames(self.rng, count, size)
        # The vCPU changes only between runs of touches.
        vcpu = self.rng.integers(0, vcpus, -(-count // RUN)).repeat(RUN)[:count]
        levels = level if isinstance(level, int) else level[gfn >> 18]
        op = int(Op.TOUCH) | levels << 4 | vcpu << VCPU_SHIFT
        self.vcpus = vcpus
        self.parts: list[tuple[Places, NDArray[np.uint32], Ints]] = [
            (np.arange(count, dtype=np.float64), np.broadcast_to(op, count).astype(np.uint32), gfn)
        ]

    def add(self, place: Places, op: int | Ints, gfn: int | Ints) -> None:
        shape = place.shape
        packed = np.broadcast_to(np.asarray(op), shape).astype(np.uint32)
        self.parts.append((place, packed, np.broadcast_to(np.asarray(gfn, np.int64), shape)))

    def every(self, low: int, high: int) -> Places:
        """Return places between touches that are `low` to `high` touches apart."""
        gaps = self.rng.integers(low, high + 1, self.count // low + 1)
        at = np.cumsum(gaps).astype(np.float64) - 0.5
        return at[at < self.count]

    def smis(self, low: int, high: int) -> None:
        """Add SMIs to all vCPUs, `low` to `high` touches apart: each enters SMM, touches a few pages, and leaves it."""
        at = self.every(low, high)
        for v in range(self.vcpus):
            steps = [(pack(Op.UNLOAD, v), Cause.SMI), (pack(Op.ROLE, v), 1), (pack(Op.ENTER, v), 0)]
            steps += [(pack(Op.TOUCH, v, 1), SMRAM + page) for page in range(SMM_TOUCHES)]
            steps += [(pack(Op.UNLOAD, v), Cause.RSM), (pack(Op.ROLE, v), 0), (pack(Op.ENTER, v), 0)]
            for i, (op, gfn) in enumerate(steps):
                self.add(at + (v * len(steps) + i) / 1024, op, int(gfn))

    def stream(self, name: str, words: list[Word], ranges: Ranges | None = None) -> Stream:
        place, op, gfn = (np.concatenate(column) for column in zip(*self.parts, strict=True))
        order = np.argsort(place, kind="stable")
        number = np.arange(len(order), dtype=np.int64)
        return Stream(name, words, self.vcpus, Block(op[order], gfn[order], number, number), ranges or Ranges())


def storm(count: int, size: int, touches: int, seed: int = 1) -> Stream:
    """Return the stream of one vCPU that touches `size` frames, with an SMI after every `touches` touches."""
    maker = Maker(count, seed, 1, size)
    maker.smis(touches, touches)
    return maker.stream(f"storm, {size:,} pages, SMI every {touches:,}", [NORMAL, SMM])


def mixed(count: int, seed: int = 1) -> list[Stream]:
    """Return six VMs of different kinds with `count` touches each."""
    smi = Maker(count, seed, 1, 1 << 15)
    smi.smis(2000, 10_000)

    smp = Maker(count, seed + 1, 8, 1 << 17)
    smp.smis(20_000, 40_000)

    slots, ranges = Maker(count, seed + 2, 2, 1 << 18), Ranges()
    at = slots.every(500, 1500)
    starts = slots.rng.integers(0, 1 << 18, len(at))
    ranges.rows = [(int(start), int(start) + 256) for start in starts]
    slots.add(at, pack(Op.ZAP), np.arange(len(at)))
    slots.add(slots.every(20_000, 40_000), pack(Op.INVALIDATE), 0)

    nested = Maker(count, seed + 3, 2, 1 << 16)
    words = [Word(0x10 + number, level=5 if number == 5 else 4) for number in range(6)]
    at = nested.every(100, 400)
    vcpu = nested.rng.integers(0, 2, len(at))
    nested.add(at, int(Op.SWITCH) | vcpu << VCPU_SHIFT, nested.rng.integers(0, 6, len(at)))

    level = np.random.default_rng(seed).permutation(np.repeat([1, 2, 3, 2], 4))  # of each GiB of 16
    huge = Maker(count, seed + 4, 2, 1 << 22, level)
    at = huge.every(1000, 3000)
    huge.add(at, pack(Op.COLLAPSE, level=2), huge.rng.integers(0, 1 << 22, len(at)))

    sparse = Maker(count, seed + 5, 4, 1 << 20)
    return [
        smi.stream("SMIs", [NORMAL, SMM]), smp.stream("SMIs to 8 vCPUs", [NORMAL, SMM]),
        slots.stream("memslots", [NORMAL], ranges), nested.stream("nested", words),
        huge.stream("huge pages", [NORMAL]), sparse.stream("sparse", [NORMAL]),
    ]  # fmt: skip
