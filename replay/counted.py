# SPDX-License-Identifier: Apache-2.0
"""Count what happens to one VM's roots, tables and SPTEs while one run of one policy is replayed."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.specialize import Specialization
from replay.plan import Run, Target
from replay.result import VmWriter, vm_counts
from replay.simulate.engine import Engine, RootLog, Vcpus
from replay.simulate.model_state import Counters, Happened, Violation
from replay.simulate.operations import Block, Cause, Op, Ranges
from replay.simulate.simulator import Reference, Simulator
from traces.errors import VERDICT_FAILED, Problem

_HISTORY: Final = 6  # events of a root that the message of a violation shows
_LIVES: Final = 1 << 12  # roots whose last events are kept for such a message


@dataclass(frozen=True)
class Spread:
    """How far the true count may lie below (`less`) and above (`more`) the counted one.

    `more` is None if it has no limit.
    """

    less: int = 0
    more: int | None = 0

    def __add__(self, other: Spread) -> Spread:
        more = None if self.more is None or other.more is None else self.more + other.more
        return Spread(self.less + other.less, more)


WITHIN: Final = Spread()  # the count is exact
VM_END: Final = "vm_end"  # the key in `frees` of roots that were freed because the VM ended


@dataclass
class Outcome:
    """The counts of one VM under one run of one policy."""

    target: Target
    run: Run
    vm: int
    vcpu_ids: list[int]
    vcpus: Vcpus | None = None
    counters: Counters = field(default_factory=Counters)
    frees: Counter[str] = field(default_factory=Counter)  # roots freed, by cause
    roles: Counter[int] = field(default_factory=Counter)  # roots created, by role word
    roots_peak: int = 0
    tables_peak: int = 0  # sampled whenever a root is created, found or freed, and at the end of each batch
    assumed: list[NDArray[np.int64]] = field(default_factory=list)  # assume_refault: leaves each new root began with
    freed_tables: int = 0  # tables that freed roots still had when they were freed
    stuck: list[int | None] = field(default_factory=list)  # by vCPU: the trace row after which it makes no progress
    spreads: dict[str, Spread] = field(default_factory=dict)  # by count: how far it may be off; absent if exact

    def counts(self) -> dict[str, int]:
        """Return all counts of the VM by name; the counts of its vCPUs are summed."""
        assert self.vcpus is not None
        sums = {name: int(values.sum()) for name, values in vars(self.vcpus).items() if name != "stuck"}
        return {**sums, **vm_counts(self.counters), "roots_peak": self.roots_peak, "tables_peak": self.tables_peak}


class CountedRun:
    """One run of one policy over one VM, while it is being replayed."""

    def __init__(
        self, number: int, target: Target, run: Run, vm: int, vcpu_ids: list[int], specialized: Specialization
    ) -> None:
        """Prepare the run.

        `number` is the target's position in the plan; `vcpu_ids` has the recorded id of each vCPU, by its dense number.
        """
        vcpus = len(vcpu_ids)
        self.number = number
        self.specialized = specialized
        self.outcome = Outcome(target, run, vm, vcpu_ids, stuck=[None] * vcpus)
        self.simulator: Simulator
        if target.policy is not None:
            self.simulator = Reference(target.policy(), run.assume_refault, specialized.words, vcpus)
        else:
            self.simulator = Engine(
                replace(target.parameters, assume_refault=run.assume_refault), specialized.words, vcpus
            )
        self._done = 0
        # The last events of each root, in words, for error messages: a user's own policy may break invariants. The root
        # that had an event last is at the end.
        self._lives: OrderedDict[int, list[str]] | None = OrderedDict() if target.policy is not None else None

    def feed(self, block: Block, ranges: Ranges, writer: VmWriter | None) -> None:
        """Run one block of operations, and write its root events to `writer` if there is one.

        The block is cut before each operation that may remove all tables at once, so that `tables_peak` sees them
        first.
        """
        first = self._done
        op = block.op & 15
        ends = np.flatnonzero((op == Op.ZAP_ALL) | (op == Op.END) | (op == Op.INVALIDATE))
        start = 0
        for end in [*ends.tolist(), len(block)]:
            part = slice(start, end)
            try:
                self.simulator.feed(
                    Block(block.op[part], block.gfn[part], block.time[part], block.seq[part]), ranges, first + start
                )
            except Violation as violation:
                raise self._broken(violation, block, first) from None
            counters = self.simulator.counters
            self.outcome.tables_peak = max(self.outcome.tables_peak, counters.tables - counters.tables_freed)
            start = end
        self._done += len(block)
        log = self.simulator.take_log()
        self._read(log)
        self._remember(log, block, first)
        self._stop(block, first)
        if writer is not None:
            ids = self.outcome.vcpu_ids
            writer.log(self.number, self.outcome.run.bound, self.specialized.words, ids, log, block, first)

    def _broken(self, violation: Violation, block: Block, first: int) -> Problem:
        """Turn a violated invariant into a one-line Problem with the operation, the root and its last events."""
        log = self.simulator.take_log()
        self._remember(log, block, first)
        told = self._lives.get(violation.root, []) if self._lives and violation.root is not None else []
        if not told:
            rows = np.flatnonzero(log.root == violation.root)
            rows = rows if len(rows) else np.arange(len(log))
            told = [_told(log, i, block, first) for i in rows[-_HISTORY:].tolist()]
        at = violation.at - first
        where = f"row {block.seq[at]:,}, {Op(int(block.op[at]) & 15).name}" if at >= 0 else "an earlier row"
        name, vm = self.outcome.target.name, self.outcome.vm
        history = f"; before: {', '.join(told)}" if told else ""
        return Problem(f"{name}: VM {vm}, {where}: {violation}{history}", VERDICT_FAILED)

    def _remember(self, log: RootLog, block: Block, first: int) -> None:
        lives = self._lives
        if lives is None:
            return
        for i in range(len(log)):
            root = int(log.root[i])
            lives[root] = [*lives.pop(root, []), _told(log, i, block, first)][-_HISTORY:]
        while len(lives) > _LIVES:
            lives.popitem(last=False)

    def _stop(self, block: Block, first: int) -> None:
        for index, at in enumerate(self.simulator.vcpus.stuck.tolist()):
            if at >= first:
                self.outcome.stuck[index] = int(block.seq[at - first])

    def _read(self, log: RootLog) -> None:
        if not len(log):
            return
        outcome = self.outcome
        freed = log.event == Happened.FREED
        outcome.freed_tables += int(log.tables[freed].sum())
        for cause, count in enumerate(np.bincount(log.cause[freed]).tolist()):
            if count:
                outcome.frees[Cause(cause).name.lower()] += count
        created = log.event == Happened.CREATED
        for word, count in enumerate(np.bincount(log.word[created]).tolist()):
            if count:
                outcome.roles[self.specialized.words[word].word] += count
        outcome.roots_peak = max(outcome.roots_peak, int(log.roots_alive.max()))
        outcome.tables_peak = max(outcome.tables_peak, int((log.tables_alive + np.where(freed, log.tables, 0)).max()))
        if outcome.run.assume_refault:
            outcome.assumed.append(log.leaves[created])

    def finish(self, writer: VmWriter | None, timed: dict[str, list[int]] | None = None) -> Outcome:
        """Return the outcome, and write its count rows to `writer` if there is one.

        `timed` has the time columns of a result's `vcpu` rows, one value per vCPU.
        """
        outcome = self.outcome
        outcome.vcpus, outcome.counters = self.simulator.vcpus, self.simulator.counters
        if writer is not None:
            peaks = {"roots_peak": outcome.roots_peak, "tables_peak": outcome.tables_peak}
            whole = {**vm_counts(outcome.counters), **peaks}
            bound, ids = outcome.run.bound, outcome.vcpu_ids
            writer.counts(self.number, bound, ids, outcome.vcpus, whole, outcome.stuck, timed or {})
        return outcome


def _told(log: RootLog, i: int, block: Block, first: int) -> str:
    """Describe one row of the root log in words, for an error message."""
    what = f"root {log.root[i]} {Happened(int(log.event[i])).name.lower()} ({Cause(int(log.cause[i])).name.lower()})"
    return f"{what} at row {block.seq[log.at[i] - first]:,}" if log.at[i] >= first else what
