"""Joins a VM's operations with the time they took: what `timeline` found of an exit is given to its operations.

An exit's handling of faults goes to its touch, of loads to its entry, of unloads to its unload; the rest of it, the
guest time before it, and exits without an operation are the `lead` of the next operation. Nothing is given twice or
left out but inline zaps and what is prefetched, which are the policy's (`totals` has them). What happens to the VM
as a whole takes its turn behind the vCPU that acted last.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from replay.axes import PRESERVE, Axes
from replay.decode.lookback import Ints, Rows
from replay.simulate.operations import VCPU_SHIFT, Block, Op
from replay.timing.costs import Samples
from replay.timing.lock_waits import Contended
from replay.timing.steal import Stolen
from replay.timing.timed_operations import CREATED, FOUND, MORE, NEVER, Timed
from replay.timing.timeline import Doing, Spans, Timeline
from traces.schema import BY_NAME

_EXIT: Final = BY_NAME["kvm_exit"].code
_FAULT: Final = BY_NAME["kvm_page_fault"].code
_GET_PAGE: Final = BY_NAME["kvm_mmu_get_page"].code
_LOADED: Final = (BY_NAME["root_get"].code, BY_NAME["mmu_load"].code, _GET_PAGE)
_DOINGS: Final = len(Doing)


@dataclass
class _Exits:
    """One vCPU's exits that no operation has taken yet: first row's seq, ns by Doing, tables and roots built."""

    seq: Ints
    ns: NDArray[np.int64]
    tables: Ints
    built_root: NDArray[np.bool_]
    still: NDArray[np.bool_]  # the guest before it did next to nothing
    interrupt: NDArray[np.bool_]  # of the host


class Timing:
    """One VM's times. `watch` each batch of rows, then `join` its operations; `samples` are of costs."""

    def __init__(
        self, vcpus: int, cpus: int, workers: Collection[int] = (), own: Axes = PRESERVE, intel: bool = False
    ) -> None:
        """`cpus` that vCPUs and workers share (0: enough); `workers` are the tids of kernel workers."""
        self.timeline = Timeline(vcpus, own.prefetch > 1, intel)
        self.contended = Contended(vcpus, cpus != 1 and not own.faults_share)
        costs = ("switch", "fault", "table", "found", "created", "unload", "prefetch", "bare")
        self.samples = {name: Samples() for name in costs}
        self.interrupts = np.zeros(vcpus, np.int64)  # of the host, by vCPU
        self.interrupted = np.zeros(vcpus, np.int64)  # ns they took
        self.stolen = Stolen(vcpus, cpus == 1, workers)
        # ns by vCPU and Doing, without what others took; OTHER has all that is no operation's.
        self.totals = np.zeros((vcpus, _DOINGS), np.int64)
        self.rows = np.zeros(vcpus, np.int64)  # of each vCPU's thread
        self.fault_rows = np.zeros(vcpus, np.int64)  # of these, of faults
        self.faults = np.zeros(vcpus, np.int64)
        self._vcpus = vcpus
        self._exits = [_empty() for _ in range(vcpus)]
        self._lead = np.zeros(vcpus, np.int64)  # carried to the next operation
        self._guest = np.zeros(vcpus, np.int64)
        self._last_root = 0
        self._actor = 0

    def watch(self, rows: Rows) -> None:
        """Take in a batch of rows."""
        spans = self.timeline.feed(rows)
        spans = self.contended.purge(self.stolen.purge(rows, spans))
        of_fault = spans.doing == Doing.FAULT
        faults = of_fault & (spans.kind == _FAULT)
        self.rows += np.bincount(spans.vcpu, minlength=self._vcpus)
        self.faults += np.bincount(spans.vcpu[faults], minlength=self._vcpus)
        self.fault_rows += np.bincount(spans.vcpu[of_fault], minlength=self._vcpus)
        self.samples["bare"].add(spans.ns[spans.bare])
        self.samples["prefetch"].add(spans.ns[spans.doing == Doing.PREFETCH])
        roots = np.where(np.isin(spans.kind, _LOADED), spans.root, 0)
        for vcpu in range(self._vcpus):
            start, stop = np.searchsorted(spans.vcpu, [vcpu, vcpu + 1])
            if stop > start:
                part = slice(int(start), int(stop))
                self._exits[vcpu] = _joined(self._exits[vcpu], self._gather(_cut(spans, part), roots[part]))
        self._last_root = max(self._last_root, int(roots.max(initial=0)))

    def join(self, block: Block) -> Timed:
        """The times of operations whose rows have been watched."""
        n = len(block)
        lead, guest, cost = (np.zeros(n, np.int64) for _ in range(3))
        was = np.zeros(n, np.uint8)
        still = np.zeros(n, np.bool_)
        vcpu = (block.op >> VCPU_SHIFT).astype(np.int32)
        own = block.op & 15 <= Op.SWITCH
        for v in range(self._vcpus):
            mine = np.flatnonzero(own & (vcpu == v))
            if len(mine):
                self._take(v, mine, block, (lead, guest, cost), was, still)
        acted = np.where(own, np.arange(n), -1)
        acted = np.maximum.accumulate(acted)
        queue = np.where(acted >= 0, vcpu[acted], self._actor).astype(np.int32)
        wall = np.full(n, MORE, np.int64)
        ends = block.op & 15 == Op.END
        queue[ends], wall[ends] = 2 * self._vcpus, NEVER  # no vCPU waits for what is left to free then
        self._actor = int(queue[~ends][-1]) if not ends.all() else self._actor
        self._sample(block, (lead, guest, cost), was, still)
        return Timed(block, queue, lead, guest, cost, was, wall)

    def rest(self) -> tuple[Ints, Ints]:
        """What came after the last operation, by vCPU: (ns, ns in the guest)."""
        for v, exits in enumerate(self._exits):
            self._keep_apart(v, exits.ns)
            self._count(v, exits.ns)
            self._interrupted(v, exits, slice(None))
            self._lead[v] += exits.ns.sum()
            self._guest[v] += exits.ns[:, Doing.GUEST].sum()
            self._exits[v] = _empty()
        return self._lead, self._guest

    def _keep_apart(self, v: int, ns: NDArray[np.int64]) -> None:
        """Take out of exits what is the policy's."""
        for doing in (Doing.ZAP, Doing.PREFETCH):
            self.totals[v, doing] += int(ns[:, doing].sum())
            ns[:, doing] = 0

    def _count(self, v: int, lead: NDArray[np.int64]) -> None:
        ran = int(lead[:, Doing.GUEST].sum())
        self.totals[v, Doing.GUEST] += ran
        self.totals[v, Doing.OTHER] += int(lead.sum()) - ran

    def _gather(self, spans: Spans, roots: Ints) -> _Exits:
        """A vCPU's spans by exit; what is before the first kvm_exit goes on with the exit before."""
        exit_of = np.cumsum(spans.kind == _EXIT)
        count = int(exit_of[-1]) + 1
        ns = np.zeros((count, _DOINGS), np.int64)
        np.add.at(ns, (exit_of, spans.doing), spans.ns)
        seq = np.full(count, -1, np.int64)
        at = np.flatnonzero(spans.kind == _EXIT)
        seq[1:] = spans.seq[at]
        table = (spans.kind == _GET_PAGE) & (spans.doing == Doing.FAULT)
        tables = np.bincount(exit_of[table], minlength=count)
        newest = np.maximum.accumulate(np.maximum(roots, self._last_root))
        before = np.append(self._last_root, newest[:-1])
        built = np.zeros(count, np.bool_)
        built[exit_of[roots > before]] = True
        still = np.zeros(count, np.bool_)
        still[exit_of[spans.still]] = True
        interrupt = np.zeros(count, np.bool_)
        interrupt[exit_of[spans.interrupt]] = True
        return _Exits(seq, ns, tables.astype(np.int64), built, still, interrupt)

    def _take(
        self,
        v: int,
        mine: Ints,
        block: Block,
        times: tuple[Ints, Ints, Ints],
        was: NDArray[np.uint8],
        still: NDArray[np.bool_],
    ) -> None:
        lead, guest, cost = times
        exits = self._exits[v]
        if not len(exits.seq):
            lead[mine[0]] += self._lead[v]
            guest[mine[0]] += self._guest[v]
            self._lead[v] = self._guest[v] = 0
            return
        at = np.maximum(np.searchsorted(exits.seq, block.seq[mine], "right") - 1, 0)
        kind = block.op[mine] & 15
        still[mine] = exits.still[at]
        fixed = exits.ns.copy()
        for doing, kinds in (
            (Doing.FAULT, (Op.TOUCH, Op.FIX)),
            (Doing.LOAD, (Op.ENTER, Op.SWITCH)),
            (Doing.UNLOAD, (Op.UNLOAD,)),
        ):
            takes = np.flatnonzero(np.isin(kind, kinds))
            takes = takes[np.unique(at[takes], return_index=True)[1]]
            cost[mine[takes]] = exits.ns[at[takes], doing]
            fixed[at[takes], doing] = 0
            self.totals[v, doing] += int(cost[mine[takes]].sum())
            if doing == Doing.FAULT:
                was[mine[takes]] = 1 + np.minimum(exits.tables[at[takes]], 200)
            elif doing == Doing.UNLOAD:
                was[mine[(kind == Op.UNLOAD) & (exits.ns[at, Doing.UNLOAD] > 0)]] = 1
            elif doing == Doing.LOAD:
                loaded = takes[cost[mine[takes]] > 0]
                was[mine[loaded]] = np.where(exits.built_root[at[loaded]], CREATED, FOUND)
        end = int(at[-1]) + 1
        self._keep_apart(v, fixed[:end])
        self._interrupted(v, exits, slice(end))
        # An exit's first operation takes what no operation owns of it and of the exits since the last one.
        first = np.unique(at, return_index=True)[1]
        total = np.append(0, np.cumsum(fixed.sum(1)))
        ran = np.append(0, np.cumsum(fixed[:, Doing.GUEST]))
        upto = at[first] + 1
        self._count(v, fixed[:end])
        lead[mine[first]] = np.diff(total[np.append(0, upto)])
        guest[mine[first]] = np.diff(ran[np.append(0, upto)])
        lead[mine[0]] += self._lead[v]
        guest[mine[0]] += self._guest[v]
        self._lead[v] = self._guest[v] = 0
        # The last exit may go on in the next batch: what it has been given is gone from it.
        left = _part(exits, slice(end - 1, None))
        left.ns[0] = 0
        left.interrupt[0] = False
        self._exits[v] = left

    def _interrupted(self, v: int, exits: _Exits, part: slice) -> None:
        """Count host interrupts, and the time they took: another run has as many as its length brings."""
        hit = exits.interrupt[part]
        self.interrupts[v] += int(hit.sum())
        self.interrupted[v] += int(exits.ns[part][hit, Doing.OTHER].sum())

    def _sample(
        self, block: Block, times: tuple[Ints, Ints, Ints], was: NDArray[np.uint8], still: NDArray[np.bool_]
    ) -> None:
        _, guest, cost = times
        kind = block.op & 15
        fault = (kind == Op.TOUCH) & (was > 0)
        plain = fault & (was == 1)
        self.samples["fault"].add(cost[plain])
        self.samples["switch"].add(guest[plain & still & (guest > 0)])
        tables = fault & (was > 1)
        if tables.any() and self.samples["fault"].count:
            extra = cost[tables] - round(self.samples["fault"].mean)
            self.samples["table"].add(np.maximum(extra, 0) // (was[tables] - 1))
        load = kind == Op.ENTER
        self.samples["found"].add(cost[load & (was == FOUND)])
        self.samples["created"].add(cost[load & (was == CREATED)])
        self.samples["unload"].add(cost[(kind == Op.UNLOAD) & (cost > 0)])


def _empty() -> _Exits:
    none = np.empty(0, np.int64)
    return _Exits(none, np.empty((0, _DOINGS), np.int64), none, *[none.astype(np.bool_)] * 3)


def _cut(spans: Spans, part: slice) -> Spans:
    return Spans(*(getattr(spans, each.name)[part] for each in fields(Spans)))


def _part(exits: _Exits, part: slice) -> _Exits:
    return _Exits(*(getattr(exits, each.name)[part].copy() for each in fields(_Exits)))


def _joined(old: _Exits, new: _Exits) -> _Exits:
    """`new` begins with what still belongs to the last exit of `old`."""
    if not len(old.seq):
        return new
    old.ns[-1] += new.ns[0]
    old.tables[-1] += new.tables[0]
    old.built_root[-1] |= new.built_root[0]
    return _Exits(
        np.concatenate([old.seq, new.seq[1:]]),
        np.concatenate([old.ns, new.ns[1:]]),
        np.concatenate([old.tables, new.tables[1:]]),
        np.concatenate([old.built_root, new.built_root[1:]]),
        np.concatenate([old.still, new.still[1:]]),
        np.concatenate([old.interrupt, new.interrupt[1:]]),
    )
