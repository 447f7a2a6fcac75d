# SPDX-License-Identifier: Apache-2.0
"""What a trace's VM brings to the design questions: its faults at their own pace, what is mapped, what things cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.batch import Batch
from replay.decode.capabilities import Capabilities
from replay.decode.cases import Case
from replay.decode.inputs import Inputs
from replay.decode.row_counts import RowCounts
from replay.decode.specialize import Specialization
from replay.decode.vm_inputs import vcpu_ids
from replay.own_policy import OwnPolicyCheck, compare
from replay.simulate.engine import Engine
from replay.simulate.operations import LEVEL_SHIFT, VCPU_SHIFT, Block, Op, Ranges
from replay.simulate.reference import Happened
from replay.spool import Spool
from replay.timing.costs import DEFAULT, Costs, LockCosts
from replay.timing.measure import SpanTimes
from replay.timing.measured_vm import measure_vm
from replay.whatif.answers import MOST_PAGES
from replay.whatif.each_vm import UnansweredVm

Ints = NDArray[np.int64]
FAULTS: Final = 500  # of each recorded vCPU that are simulated: the first ones
MOMENTS: Final = 8  # at which it is asked what is mapped, evenly spaced over the trace's rows
APIC_GFN: Final = 0xFEE00
_ALONE: Final = 0.23  # of a fault that it has mmu_lock: `costs`
_PAGE: Final = 12


@dataclass(frozen=True)
class FaultProgram:
    """One recorded vCPU: its faults in order. `gap` is ns from the end of one's mmu_lock to the next one's request."""

    gap: Ints
    links: Ints  # tables that each links

    @property
    def cycle(self) -> float:
        """Mean ns between requests, what is under the lock apart."""
        return float(self.gap.mean())


@dataclass
class Mapped:
    """What the recorded kernel has at one of MOMENTS: SPTEs and tables of all roots, roots, SPTEs of the APIC page."""

    leaves: int
    tables: int
    roots: int
    apic: int


@dataclass
class Workload:
    """One VM. Times are ns."""

    vm: int
    recorded: int  # vCPUs
    programs: list[FaultProgram]  # of those that fault
    hold: int  # of a fault: how long it has mmu_lock
    window: int  # before: a fault has read what it will map, at the earliest
    costs: Costs
    scale: float  # this machine's faults over the table's
    measured: bool  # `hold`
    faults_share: bool
    shadow: bool
    wall: int  # of the slowest vCPU
    leaves: int = 0  # at the end
    alive: int = 0  # roots, at the end
    gfns: int = 0  # distinct ones that were accessed
    tables: int = 0  # linked in all
    freed: int = 0  # unlinked under the read lock, by the zap worker
    roots: int = 0  # created
    nx: bool = True  # the NX huge page workaround may have been on
    moments: list[Mapped] = field(default_factory=list)
    refaults: tuple[int, int] = (0, 0)  # faults more with an inhibit at each moment: by memslot, by gfn
    zaps: list[int] = field(default_factory=list)  # SPTEs that each recorded range zap or unmap removed
    mmio: int = 0  # pages with a cached MMIO SPTE, as far as recorded
    aged: int = 0  # recorded aging walks
    aged_pages: int = 0
    check: OwnPolicyCheck | None = None  # its own policy's replay compared with its rows

    @property
    def locks(self) -> LockCosts:
        """The table's costs on this machine."""
        return LockCosts().times(self.scale)

    @property
    def sptes(self) -> int:
        """SPTEs that map one page, rounded up: of the pages that were accessed, but no more than there are roots.

        (What the shadow MMU prefetches is of other pages.)
        """
        return max(min(-(-self.leaves // max(self.gfns, 1)), self.alive), 1)

    @property
    def faults(self) -> int:
        """Faults that are simulated of all recorded vCPUs."""
        return sum(len(program.gap) for program in self.programs)

    def crowd(self, vcpus: int) -> list[tuple[FaultProgram, int]]:
        """This many vCPUs, each as a recorded one in turn, and when each begins: evenly over a mean cycle."""
        chosen = [self.programs[i % len(self.programs)] for i in range(vcpus)]
        cycle = sum(program.cycle for program in self.programs) / len(self.programs)
        return [(program, round(i * cycle / vcpus)) for i, program in enumerate(chosen)]


def workload(capabilities: Capabilities, vm: Mapping[str, Any]) -> Workload:
    """Of one VM; raises UnansweredVm where the trace has no times, or no fault."""
    with Spool(seq=True) as spool:
        watch = _Watch(capabilities, vm)
        rows = RowCounts(capabilities, len(vcpu_ids(vm)))
        own = measure_vm(capabilities, vm, spool, watch, rows)
        inputs, measured = own.inputs, own.measured
        if measured.refused:
            raise UnansweredVm(measured.refused)
        costs = measured.fitted.costs
        hold = measured.held // measured.requests if measured.held else round(costs.fault * _ALONE)
        found = Workload(
            int(vm["id"]), len(inputs.vcpus), [], max(hold, 1), max(costs.fault - hold, 0), costs,
            max(costs.fault, 1) / DEFAULT.fault, measured.held > 0, capabilities.own.faults_share, capabilities.shadow,
            int(measured.totals.sum(1).max()), nx=not capabilities.off("kvm", "nx_huge_pages"),
            mmio=len(watch.mmio), aged=watch.aged, aged_pages=watch.aged_pages,
        )  # fmt: skip
        _Replay(capabilities, found).run(spool)
        found.check = compare(capabilities, vm, inputs, rows, own.engine)
    if not found.programs:
        raise UnansweredVm("it has no fault with a time of its own: there is nothing to wait for mmu_lock")
    return found


class _Watch(SpanTimes):
    """Sees each batch of rows: pages with a cached MMIO SPTE, and what was aged."""

    def __init__(self, capabilities: Capabilities, vm: Mapping[str, Any]) -> None:
        super().__init__(capabilities, vm)
        self.mmio: Ints = np.empty(0, np.int64)
        self.aged = 0
        self.aged_pages = 0

    def feed(self, batch: Batch) -> tuple[NDArray[np.uint8], Ints, NDArray[np.uint8]]:
        self.mmio = np.union1d(self.mmio, batch.gfn[batch.of("mark_mmio_spte")])
        ranges, pages = batch.of("kvm_age_hva"), batch.of("kvm_test_age_hva")
        self.aged += len(ranges) + len(pages)
        start, end = batch.addr[ranges], batch.value[ranges]
        aged = np.where(end > start, end - start, 0) >> np.uint64(_PAGE)
        self.aged_pages += sum(np.minimum(aged, MOST_PAGES).tolist()) + len(pages)
        return super().feed(batch)


class _Replay:
    """Faults by vCPU, and three engines: as recorded, with inhibits by memslot, with ones by gfn."""

    def __init__(self, capabilities: Capabilities, found: Workload) -> None:
        self._found = found
        self._specialized = Specialization(capabilities.kernel, Case(), capabilities.ad_disabled, found.recorded)
        self._engines = [Engine(capabilities.own, self._specialized.words, found.recorded) for _ in range(3)]
        self._worker = capabilities.own.teardown == "worker"
        events = capabilities.trace.metadata.events
        self._moments = [events * i // (MOMENTS + 1) for i in range(1, MOMENTS + 1)]
        self._done = 0
        self._gaps: list[list[Ints]] = [[] for _ in range(found.recorded)]
        self._links: list[list[Ints]] = [[] for _ in range(found.recorded)]
        self._since = np.zeros(found.recorded, np.int64)  # ns since the vCPU's last fault had mmu_lock
        self._seen: Ints = np.empty(0, np.int64)

    def run(self, parts: Iterable[Inputs]) -> None:
        """Fill the workload."""
        found = self._found
        for part in parts:
            timed = self._specialized.timed(part)
            block = timed.block
            self._faults(block.op, timed.lead, timed.cost, timed.was)
            self._seen = np.union1d(self._seen, block.gfn[block.op & 15 == Op.TOUCH])
            self._feed(block, part.ranges)
        for gaps, links in zip(self._gaps, self._links, strict=True):
            if gaps:
                gap, link = np.concatenate(gaps), np.concatenate(links)
                found.programs.append(FaultProgram(gap[:FAULTS], link[:FAULTS]))
        base, memslot, gfn = (int(engine.vcpus.faults.sum()) for engine in self._engines)
        found.refaults = (memslot - base, gfn - base)
        found.tables = self._engines[0].counters.tables
        found.gfns = len(self._seen)

    def _faults(self, op: NDArray[np.uint32], lead: Ints, cost: Ints, was: NDArray[np.uint8]) -> None:
        vcpu = op >> VCPU_SHIFT
        own = op & 15 <= Op.SWITCH
        for v in range(self._found.recorded):
            mine = np.flatnonzero(own & (vcpu == v))
            faults = np.flatnonzero((was[mine] > 0) & (op[mine] & 15 == Op.TOUCH))
            total = np.append(0, np.cumsum(lead[mine] + cost[mine]))
            if not len(faults):
                self._since[v] += total[-1]
                continue
            # All but the lock's own time goes before the request: after the last SPTE little is done (`contended`).
            ends = total[faults + 1]
            gap = np.diff(np.append(-self._since[v], ends)) - self._found.hold
            self._since[v] = total[-1] - ends[-1]
            if sum(map(len, self._gaps[v])) < FAULTS:
                self._gaps[v].append(np.maximum(gap, 0))
                self._links[v].append(was[mine[faults]].astype(np.int64) - 1)

    def _feed(self, block: Block, ranges: Ranges) -> None:
        kind = block.op & 15
        ends = np.flatnonzero((kind == Op.ZAP_ALL) | (kind == Op.END))
        end = int(ends[0]) if len(ends) else len(block)
        cuts = dict.fromkeys(np.flatnonzero(kind[:end] == Op.ZAP).tolist(), False)
        while self._moments and len(block) and self._moments[0] <= int(block.seq[-1]):
            at = int(np.searchsorted(block.seq, self._moments.pop(0)))
            cuts[min(at, end)] = True
        start = 0
        for cut in sorted(cuts):
            self._do(block, ranges, start, cut)
            start = cut
            if cuts[cut]:
                self._inhibit()
            if cut < end and kind[cut] == Op.ZAP:
                before = self._engines[0].counters.zapped
                self._do(block, ranges, cut, cut + 1)
                start = cut + 1
                self._found.zaps.append(self._engines[0].counters.zapped - before)
        self._do(block, ranges, start, end)
        leaves, _, roots = self._alive
        if leaves:  # what is there before it all goes
            self._found.leaves, self._found.alive = leaves, roots
        self._found.freed = self._engines[0].counters.tables_freed if self._worker else 0
        self._do(block, ranges, end, len(block))

    @property
    def _alive(self) -> tuple[int, int, int]:
        """SPTEs, tables and roots that the recorded kernel has now."""
        roots = self._engines[0].roots
        return sum(root.leaves for root in roots), sum(root.tables for root in roots), len(roots)

    def _do(self, block: Block, ranges: Ranges, start: int, end: int) -> None:
        if end <= start:
            return
        part = slice(start, end)
        piece = Block(block.op[part], block.gfn[part], block.time[part], block.seq[part])
        for engine in self._engines:
            engine.feed(piece, ranges, self._done)
            log = engine.take_log()
            if engine is self._engines[0]:
                self._found.roots += int((log.event == Happened.CREATED).sum())
        self._done += end - start

    def _inhibit(self) -> None:
        """At this moment: as it is in the first engine, by memslot in the second, by gfn in the third."""
        none = np.zeros(1, np.int64)
        memslot, gfn = self._engines[1:]
        memslot.feed(Block(np.array([int(Op.INVALIDATE)], np.uint32), none, none, none), Ranges(), self._done)
        before = gfn.counters.zapped
        for space in (0, 1):
            zap = np.array([int(Op.ZAP) | space << LEVEL_SHIFT], np.uint32)
            gfn.feed(Block(zap, none, none, none), Ranges([(APIC_GFN, APIC_GFN + 1)]), self._done)
        self._found.moments.append(Mapped(*self._alive, gfn.counters.zapped - before))
