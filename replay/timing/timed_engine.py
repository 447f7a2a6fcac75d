# SPDX-License-Identifier: Apache-2.0
"""The Python side of the compiled clock: `engine.Engine` in virtual time, equal to `reference_clock` to the ns.

Operations wait in one pool, 72 bytes each, in the order of the stream, until it is their turn. Without wall-clock
queues, and while all vCPUs have operations, the pool holds about one block. If the VM falls behind the wall clock, or a
vCPU has no operations for a time, the operations of all other vCPUs wait in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.simulate.compiled.core import Core
from replay.simulate.compiled.timer import Timer
from replay.simulate.engine import Engine, RootLog, Vcpus
from replay.simulate.model_state import SLOTS, Counters
from replay.simulate.operations import Ranges, Word
from replay.simulate.pools import by_vcpu, grown, make_pool, row_type
from replay.simulate.timed_operations import NEVER, Timed
from replay.timing.costs import Costs
from replay.timing.reference_clock import TimeCategory
from traces.errors import Problem
from traces.kernels.policies import PolicyParameters

TODO: Final = np.dtype(
    [(name, np.int64) for name in ("gfn", "lead", "guest", "idle", "cost", "wall", "at")]
    + [(name, np.uint32) for name in ("op", "was", "next", "guess")]
)
PACE: Final = np.dtype(
    [(name, np.int64) for name in ("clock", "lead", "guest", "idle", "inside", "sampled", "guessed", "weight")]
    + [("spent", np.int64, len(TimeCategory))]
)
QUEUE: Final = row_type("head", "tail")
TURN: Final = row_type("due", "queue")
SAMPLED: Final = np.dtype(
    [(name, np.int64) for name in ("vcpu", "clock", "cause")] + [("spent", np.int64, len(TimeCategory))]
)
ZAPPED: Final = row_type("leaves", "tables")

_COLUMNS: Final = {
    "queue": np.int32, "lead": np.int64, "guest": np.int64, "idle": np.int64, "cost": np.int64, "was": np.uint8,
    "wall": np.int64,
}  # fmt: skip


class TimedEngine:
    """One VM under one policy in virtual time: `feed` it blocks of any size, then call `finish`. All times are in ns.

    `engine` is the VM's state apart from times.
    """

    def __init__(
        self,
        parameters: PolicyParameters,
        words: list[Word],
        vcpus: int,
        costs: Costs,
        log: bool = True,
        core: type[Any] = Core,
        timer: type[Any] = Timer,
        rows: tuple[int, int] = (256, 256),
        weights: Sequence[int] = (),
    ) -> None:
        """`log` says whether to keep a root log.

        `rows` are the numbers of operations and samples to allocate memory for at first.

        `weights` is each vCPU's relative share in the time that a zap worker takes when CPUs are short; by default
        equal.
        """
        self.engine = Engine(parameters, words, vcpus, log, core)
        self._timer = timer()
        self._pace = make_pool(vcpus, PACE)
        self._pace["lead"] = -1
        self._pace["weight"] = weights or 1
        self._queue = make_pool(2 * vcpus + 1, QUEUE)
        self._queue["head"] = self._queue["tail"] = -1
        leaves = 1 << (2 * vcpus).bit_length()
        self._turn = make_pool(2 * leaves, TURN)
        self._turn["due"] = NEVER
        # One operation can free all roots that are alive, and the ones that it loads itself.
        puts = len(words) + SLOTS * vcpus + 4
        self._put = make_pool(puts, ZAPPED)
        self._todo = make_pool(rows[0], TODO)
        self._sample = make_pool(rows[1], SAMPLED)
        self._bounds = np.zeros(2, np.int64)
        self._begin(parameters, costs)
        queue, turn, pace, put = map(self.engine.rows_of, (self._queue, self._turn, self._pace, self._put))
        self._timer.attach(self.engine.core, queue, pace)
        self._timer.attach_turns(turn, leaves)
        self._timer.attach_put(put, puts)
        self._attach()

    def feed(self, timed: Timed, ranges: Ranges, first: int = 0) -> None:
        """Take in operations, and perform those whose turn does not depend on operations that are still to come.

        Raises Problem (bad input) for an operation that is invalid, that is in another vCPU's queue, or whose times are
        negative; nothing of the block is then taken in. Raises `model_state.Violation` where the reference does.
        """
        op, gfn = self.engine.check(timed.block, ranges, first)
        columns = [np.ascontiguousarray(getattr(timed, name), dtype) for name, dtype in _COLUMNS.items()]
        if any(column.shape != op.shape for column in columns):
            raise Problem("a timed block is columns of one length")
        if (at := self._timer.check(op, *columns[:5])) < len(op):
            queue, lead, guest, idle, cost = (int(column[at]) for column in columns[:5])
            raise Problem(
                f"operation {first + at} of vCPU {op[at] >> 16}: queue {queue} of {len(self._queue)}, "
                f"{lead} ns until it, {guest} of them in the guest, {idle} halted, and {cost} for it cannot be"
            )
        self._make_room(len(op))
        self._timer.take(op, gfn, *columns, first, self._add_ranges())
        self._run(timed.until, False)

    def finish(self) -> None:
        """Perform the rest after the last block: wall-clock operations happen until every vCPU's program has ended."""
        self._run(NEVER, True)

    # Results; times are in ns

    @property
    def clock(self) -> NDArray[np.int64]:
        """The virtual time that each vCPU has reached."""
        clock: NDArray[np.int64] = self._pace["clock"].copy()
        return clock

    @property
    def spent(self) -> NDArray[np.int64]:
        """The time breakdown, one row per vCPU and one column per `TimeCategory`."""
        spent: NDArray[np.int64] = self._pace["spent"].copy()
        return spent

    @property
    def samples(self) -> list[NDArray[np.int64]]:
        """Each vCPU's progress, as rows of (clock, Cause of its last unload, *spent until then)."""
        rows = self._sample[: self._timer.samples]
        table = np.column_stack([rows["clock"], rows["cause"], rows["spent"]])
        return [table[places] for places in by_vcpu(rows["vcpu"], len(self._pace))]

    @property
    def causes(self) -> NDArray[np.int64]:
        """The Cause of each vCPU's last unload so far."""
        return self.engine.causes

    @property
    def worker(self) -> int:
        """The time at which the zap worker finishes the work that it has now."""
        return int(self._timer.worker)

    @property
    def locked(self) -> int:
        """The time until which mmu_lock is held for write."""
        return int(self._timer.locked)

    @property
    def shared(self) -> int:
        """The time until which mmu_lock is held for read, not counting the zap worker."""
        return int(self._timer.shared)

    @property
    def worked(self) -> int:
        """The time that the zap worker took in all."""
        return int(self._timer.worked)

    @property
    def jobs(self) -> int:
        """The number of zaps that were queued for the zap worker."""
        return int(self._timer.jobs)

    @property
    def vcpus(self) -> Vcpus:
        """The counts of vCPUs so far."""
        return self.engine.vcpus

    @property
    def counters(self) -> Counters:
        """The counts of the VM so far."""
        return self.engine.counters

    def take_log(self) -> RootLog:
        """Return the rows of the root log since the last call, and empty the log."""
        return self.engine.take_log()

    # Pools of the compiled timer

    def _begin(self, parameters: PolicyParameters, costs: Costs) -> None:
        timer = self._timer
        for name, ns in vars(costs).items():
            setattr(timer, name, ns)
        timer.loads_share = parameters.loads_share
        timer.faults_share = parameters.faults_share
        timer.inline = parameters.teardown == "inline"
        timer.by_worker = parameters.teardown == "worker"
        timer.weights = int(self._pace["weight"].sum())
        for name in ("todos", "samples", "begun", "worker", "locked", "shared", "worked", "jobs"):
            setattr(timer, name, 0)

    def _attach(self) -> None:
        self._timer.attach_todo(self.engine.rows_of(self._todo), len(self._todo))
        self._timer.attach_samples(self.engine.rows_of(self._sample), len(self._sample))

    def _run(self, until: int, final: bool) -> None:
        while self._timer.run(self._bounds, until, final):
            self.engine.go_on()
            if self._timer.samples == len(self._sample):
                self._sample = grown(self._sample, 2 * len(self._sample))
                self._attach()

    def _make_room(self, count: int) -> None:
        """Make room for `count` operations; the pool is compacted first if at least half of it is used up."""
        held = self._queue["head"] >= 0
        end = int(self._timer.todos)
        begin = int(self._queue["head"][held].min()) if held.any() else end
        if 2 * begin >= end:
            self._todo[: end - begin] = self._todo[begin:end]
            for name in ("head", "tail"):
                self._queue[name][held] -= begin
            self._timer.todos = end = end - begin
        if end + count > len(self._todo):
            self._todo = grown(self._todo, max(2 * len(self._todo), end + count))
            self._attach()

    def _add_ranges(self) -> int:
        """Add the ranges of the block that was just checked, and return the number of the first of them.

        If no operation is waiting, the ranges of earlier blocks are dropped.
        """
        if self._timer.todos == 0:
            self._bounds = self.engine.bounds
            return 0
        self._bounds = np.concatenate([self._bounds, self.engine.bounds])
        return len(self._bounds) // 2 - len(self.engine.bounds) // 2
