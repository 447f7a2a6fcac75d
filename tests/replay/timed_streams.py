# SPDX-License-Identifier: Apache-2.0
"""Timed streams for tests: `streams` with times drawn for them, SMIs and VM-wide operations in wall-clock queues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from replay.simulate.operations import Op, Ranges, Word
from replay.simulate.timed_operations import LAST, MORE, NEVER, Timed, take
from replay.timing.costs import Costs
from tests.replay.streams import Stream, block_of, streams
from traces.kernels.policies import PolicyParameters

TIMES = [0, 0, 1, 7, 100, 1000, 30_000, 1_500_000, 1 << 40]
CLOSE = [0, 0, 1, 1, 1, 2, 2, 3, 4]  # many are due at once


@dataclass
class TimedStream:
    """A VM's stream, whole."""

    parameters: PolicyParameters
    words: list[Word]
    vcpus: int
    costs: Costs
    timed: Timed
    ranges: Ranges

    def blocks(self, sizes: Sequence[int]) -> Iterator[tuple[int, Timed]]:
        """(Number of the first operation, block): blocks of `sizes`, taken in turn."""
        at = turn = 0
        while at < len(self.timed):
            stop = at + sizes[turn % len(sizes)]
            later = self.timed.wall[stop:]
            until = int(later[later >= 0].min(initial=NEVER))
            yield at, replace(take(self.timed, np.arange(at, min(stop, len(self.timed)))), until=until)
            at, turn = stop, turn + 1


def timed_of(rows: Sequence[tuple[int, int, int, int, int, int, int, int]], idle: Sequence[int] = ()) -> Timed:
    """A block of (op, gfn, queue, lead, guest, cost, was, wall); `idle`: ns of each lead, none if not given."""
    block = block_of([row[:2] for row in rows])
    columns = np.array([row[2:] for row in rows], np.int64).reshape(-1, 6).T
    queue, lead, guest, cost, was, wall = (np.ascontiguousarray(column) for column in columns)
    halted = np.array(idle or [0] * len(rows), np.int64)
    return Timed(block, queue.astype(np.int32), lead, guest, halted, cost, was.astype(np.uint8), wall)


def costs() -> st.SearchStrategy[Costs]:
    ns = st.sampled_from([0, 1, 3, 50, 2500])
    return st.builds(
        Costs, ns, ns, ns, ns, ns, ns, ns, ns, ns,
        prefetch=ns, hold=ns, chunk=st.sampled_from([0, 1, 40, 5000]),
        refill=st.sampled_from([0, 1, 1000, 2500]), cpus=st.integers(0, 2)
    )  # fmt: skip


def _timed(stream: Stream, choose: Any) -> Timed:
    """`choose(n)` is a number below n."""
    vcpus = stream.vcpus
    times = TIMES if choose(2) else CLOSE
    walled = choose(3) > 0  # else all is programs'
    inside = [False] * vcpus
    walls = [0] * (2 * vcpus + 1)
    actor = 0
    rows = []
    idle = []
    for op, gfn in zip(stream.block.op.tolist(), stream.block.gfn.tolist(), strict=True):
        lead = times[choose(len(times) - (choose(40) > 0))]
        guest = (0, lead // 3, lead)[choose(3)]
        cost = times[choose(len(times) - 1)]
        was = choose(4) if choose(8) else choose(256)
        wall = MORE
        if op & 15 > Op.SWITCH:
            queue = actor
            if walled and choose(2):
                queue = 2 * vcpus
        else:
            queue = actor = op >> 16
            if inside[actor] or (walled and choose(6) == 0):
                queue += vcpus
        if queue == 2 * vcpus or (queue >= vcpus and not inside[actor]):
            walls[queue] += times[choose(len(times) - 1)] - times[choose(4)]
            wall = walls[queue] = max(walls[queue], 0)
            inside[actor] |= queue < 2 * vcpus
        elif queue >= vcpus and choose(3) == 0:
            wall = LAST
            inside[actor] = False
        rows.append((op, gfn, queue, lead, guest, cost, was, wall))
        idle.append((0, (lead - guest) // 2, lead - guest)[choose(3)])
    return timed_of(rows, idle)


@st.composite
def timed_streams(draw: st.DrawFn) -> TimedStream:
    """What `streams` draws, with times and queues."""
    stream = draw(streams())
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    parameters = replace(
        stream.parameters,
        teardown=draw(st.sampled_from(["inline", "worker", "invalidator"])),
        loads_share=draw(st.booleans()),
        faults_share=draw(st.booleans()),
    )
    timed = _timed(stream, lambda n: int(rng.integers(n)))
    return TimedStream(parameters, stream.words, stream.vcpus, draw(costs()), timed, stream.ranges)
