# SPDX-License-Identifier: Apache-2.0
"""What the design questions need of a trace's VM: its faults at their own pace, how much is mapped, and the costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.batch import Batch
from replay.decode.capabilities import Capabilities
from replay.decode.row_counts import RowCounts
from replay.decode.vm_inputs import vcpu_ids
from replay.own_policy import OwnPolicyCheck, compare
from replay.simulate.engine import Engine
from replay.simulate.model_state import Happened
from replay.simulate.operations import LEVEL_SHIFT, VCPU_SHIFT, Block, Op, Ranges, Word
from replay.simulate.timed_operations import Timed
from replay.spool import Spool
from replay.timing.costs import DEFAULT, Costs, LockCosts
from replay.timing.measuring.measure import SpanTimes
from replay.timing.measuring.measured_vm import measure_vm
from replay.whatif.answers import MOST_PAGES
from replay.whatif.each_vm import UnansweredVm

Ints = NDArray[np.int64]
FAULTS: Final = 500  # how many faults of each recorded vCPU are simulated, from the first on
MOMENTS: Final = 8  # moments, evenly spaced over the trace's rows, at which mappings are counted
APIC_GFN: Final = 0xFEE00
_ALONE: Final = 0.23  # the share of a fault's handling under mmu_lock if it was not measured (see `timing.costs`)
_PAGE: Final = 12


@dataclass(frozen=True)
class FaultProgram:
    """The faults of one recorded vCPU, in order.

    `gap` is the ns from the moment at which one fault drops mmu_lock to the next one's request for it.
    """

    gap: Ints
    links: Ints  # the number of tables that each fault links

    @property
    def cycle(self) -> float:
        """The mean ns between a fault's release of mmu_lock and the next one's request."""
        return float(self.gap.mean())


@dataclass
class Mapped:
    """What the recorded kernel has at one of MOMENTS: SPTEs and tables of
    all roots, roots, and SPTEs of the APIC page.
    """

    leaves: int
    tables: int
    roots: int
    apic: int


@dataclass
class Workload:
    """What the design questions need of one VM. Times are in ns."""

    vm: int
    recorded: int  # number of recorded vCPUs
    programs: list[FaultProgram]  # of the vCPUs that fault
    hold: int  # how long a fault holds mmu_lock
    window: int  # how long before it asks for mmu_lock a fault looks up its page, at most
    costs: Costs
    scale: float  # the cost of a fault on the recorded machine relative to the table's
    measured: bool  # whether `hold` was measured
    faults_share: bool  # whether faults hold mmu_lock for read
    shadow: bool
    wall: int  # recorded time of the slowest vCPU
    leaves: int = 0  # SPTEs mapped before the VM's end
    alive: int = 0  # roots alive before the VM's end
    gfns: int = 0  # distinct gfns that were accessed
    tables: int = 0  # tables linked in all
    freed: int = 0  # tables unlinked under the read lock, by the zap worker
    roots: int = 0  # roots created
    nx: bool = True  # the NX huge page workaround may have been on
    moments: list[Mapped] = field(default_factory=list)
    refaults: tuple[int, int] = (0, 0)  # further faults if there is an inhibit at each moment: by memslot, by gfn
    zaps: list[int] = field(default_factory=list)  # SPTEs that each recorded range zap or unmap removed
    mmio: int = 0  # pages with a cached MMIO SPTE, as far as recorded
    aged: int = 0  # recorded aging walks
    aged_pages: int = 0  # pages that they covered
    check: OwnPolicyCheck | None = None  # the own policy's replay compared with the rows

    @property
    def locks(self) -> LockCosts:
        """The costs under locks, scaled from the table to the recorded machine."""
        return LockCosts().times(self.scale)

    @property
    def sptes(self) -> int:
        """How many SPTEs map one accessed page, rounded up, but no more than there are roots.

        The shadow MMU also maps other pages by prefetch, so the plain quotient may be too large.
        """
        return max(min(-(-self.leaves // max(self.gfns, 1)), self.alive), 1)

    @property
    def faults(self) -> int:
        """The number of faults that are simulated, of all recorded vCPUs."""
        return sum(len(program.gap) for program in self.programs)

    def crowd(self, vcpus: int) -> list[tuple[FaultProgram, int]]:
        """Return the programs of `vcpus` vCPUs, the recorded ones in turn, and
        when each begins: evenly spread over a mean cycle.
        """
        chosen = [self.programs[i % len(self.programs)] for i in range(vcpus)]
        cycle = sum(program.cycle for program in self.programs) / len(self.programs)
        return [(program, round(i * cycle / vcpus)) for i, program in enumerate(chosen)]


def workload(capabilities: Capabilities, vm: Mapping[str, Any]) -> Workload:
    """Return one VM's workload. Raises UnansweredVm if the trace has no times or no faults for it."""
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
        _Replay(capabilities, found, own.engine.words).run(spool)
        found.check = compare(capabilities, vm, inputs, rows, own.engine)
    if not found.programs:
        raise UnansweredVm("it has no fault with a time of its own: there is nothing to wait for mmu_lock")
    return found


class _Watch(SpanTimes):
    """Also notes, from each batch of rows, the pages with a cached MMIO SPTE and the aging walks."""

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
    """Collects the faults by vCPU, and runs three engines: as recorded, with
    inhibits by memslot, and with inhibits by gfn.
    """

    def __init__(self, capabilities: Capabilities, found: Workload, words: list[Word]) -> None:
        self._found = found
        self._engines = [Engine(capabilities.own, words, found.recorded) for _ in range(3)]
        self._worker = capabilities.own.teardown == "worker"
        events = capabilities.trace.metadata.events
        self._moments = [events * i // (MOMENTS + 1) for i in range(1, MOMENTS + 1)]
        self._done = 0
        self._gaps: list[list[Ints]] = [[] for _ in range(found.recorded)]
        self._links: list[list[Ints]] = [[] for _ in range(found.recorded)]
        self._since = np.zeros(found.recorded, np.int64)  # ns since the vCPU's last fault dropped mmu_lock
        self._seen: Ints = np.empty(0, np.int64)

    def run(self, parts: Iterable[tuple[Timed, Ranges]]) -> None:
        """Replay the operations, and fill in the workload."""
        found = self._found
        for timed, ranges in parts:
            block = timed.block
            self._faults(block.op, timed.lead, timed.cost, timed.was)
            self._seen = np.union1d(self._seen, block.gfn[block.op & 15 == Op.TOUCH])
            self._feed(block, ranges)
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
            # All handling time except `hold` is taken to precede the request, since little is done after the last SPTE.
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
        if leaves:  # keep what was mapped before everything is zapped
            self._found.leaves, self._found.alive = leaves, roots
        self._found.freed = self._engines[0].counters.tables_freed if self._worker else 0
        self._do(block, ranges, end, len(block))

    @property
    def _alive(self) -> tuple[int, int, int]:
        """The numbers of SPTEs, tables and roots that the recorded kernel has now."""
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
        """Insert an inhibit at this moment: none in the first engine, by memslot in the second, by gfn in the third."""
        none = np.zeros(1, np.int64)
        memslot, gfn = self._engines[1:]
        memslot.feed(Block(np.array([int(Op.INVALIDATE)], np.uint32), none, none, none), Ranges(), self._done)
        before = gfn.counters.zapped
        for space in (0, 1):
            zap = np.array([int(Op.ZAP) | space << LEVEL_SHIFT], np.uint32)
            gfn.feed(Block(zap, none, none, none), Ranges([(APIC_GFN, APIC_GFN + 1)]), self._done)
        self._found.moments.append(Mapped(*self._alive, gfn.counters.zapped - before))
