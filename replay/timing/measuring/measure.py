# SPDX-License-Identifier: Apache-2.0
"""Measure, while one VM is decoded, what its actions cost and what its time was spent on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.batch import Batch
from replay.decode.capabilities import Capabilities
from replay.decode.cases import Case
from replay.decode.inputs import Inputs, Ints
from replay.decode.same_rip import RipRuns
from replay.decode.spans.timeline import Timeline
from replay.decode.spans.vcpu_states import BARE, VcpuState
from replay.decode.specialize import Specialization
from replay.decode.vm_inputs import VmInputs, vcpu_ids
from replay.simulate.timed_operations import NEVER, Timed
from replay.timing.costs import Fitted, Samples, Shortest, fit
from replay.timing.measuring.lock_waits import LockWaits
from replay.timing.measuring.operation_samples import samples_of
from replay.timing.measuring.row_spans import RowSpans
from replay.timing.measuring.steal import Steal
from replay.timing.measuring.steal_curve import StealCurve, steal_curve
from replay.timing.reference_clock import TimeCategory

_LAB_CPUS: Final = 1  # QEMU emulates the lab's CPUs in turn, in one thread
_COSTS: Final = ("switch", "fault", "table", "found", "created", "unload", "prefetch", "bare")


class SpanTimes:
    """The time between the rows of each vCPU's thread, by state, and samples of costs taken from it.

    Time that other tasks took from a vCPU is kept separately (`stolen`, `steal.lost`).
    """

    def __init__(
        self, capabilities: Capabilities, vm: Mapping[str, Any], parts: tuple[int, int, int] | None = None
    ) -> None:
        """`parts` is passed to `Timeline`."""
        vcpus, own, cpus = max(len(vcpu_ids(vm)), 1), capabilities.own, cpus_of(capabilities)
        self._prefetches = own.prefetch > 1
        self.timeline = Timeline(vcpus, self._prefetches, capabilities.kernel.vendor, parts, capabilities.suspends)
        self.rip_runs = RipRuns(vcpus, capabilities.kernel.vendor, capabilities.kernel.ret_pf.fixed)
        self.steal = Steal(vcpus, cpus == 1, capabilities.workers, capabilities.has("sched_in"))
        self.waits = LockWaits(vcpus, cpus != 1 and not own.faults_share)
        self._spans = RowSpans()
        self.samples = {name: Samples() for name in _COSTS}
        self.shortest = Shortest()  # the shortest times in the guest

    def curves(self) -> list[StealCurve]:
        """Return each vCPU's steal time over time, after the timeline's end.

        Empty unless the trace has `sched_in` rows.
        """
        if not self.steal.known:
            return []
        moments, slept = np.concatenate(self.timeline.progress), self.timeline.slept
        spent, stolen = self.timeline.totals.sum(1), self.stolen
        found = []
        for vcpu in range(len(stolen)):
            mine = moments[moments["vcpu"] == vcpu]
            began = int(mine["time"][-1] - spent[vcpu] - slept[vcpu]) if len(mine) else 0
            found.append(steal_curve(mine, began, self.steal.taken_of(vcpu), int(stolen[vcpu])))
        return found

    @property
    def stolen(self) -> Ints:
        """By vCPU, the ns for which its thread could run and had no CPU, without the time that zap workers took."""
        waited: Ints = self.timeline.totals[:, VcpuState.STEAL] + self.steal.preempted
        return waited - np.minimum(self.steal.lost, waited) if self.steal.known else waited

    def feed(self, batch: Batch) -> tuple[NDArray[np.uint8], Ints, NDArray[np.uint8]]:
        """Take in a batch, and return by row the VcpuState that ends there (or NO_SPAN), its length in ns, and the
        span's marks, as arrays that the next call uses again.
        """
        spans = self._spans
        spans.resize(len(batch))
        state, ns, mark, before = spans.state, spans.ns, spans.mark, spans.before
        self.rip_runs.feed(batch)
        self.timeline.feed(batch, state, ns, mark, before)
        self.steal.feed(batch, state, ns, mark, before)
        self.waits.feed(batch, state, ns, before)
        self.samples["bare"].add(spans.times_marked(BARE))
        self.shortest.add(*spans.times_in(VcpuState.GUEST, self.shortest.limit))
        if self._prefetches:
            self.samples["prefetch"].add(spans.times_in(VcpuState.PREFETCH, NEVER)[1])
        return state, ns, mark


@dataclass(frozen=True)
class Measured:
    """What one VM's recording shows of time. Lists and arrays are by vCPU unless stated otherwise, and times are in ns.

    `refused` is the reason if there are no times, else empty. `began` is the boot time of the VM's first entry.
    `recorded` is the time by TimeCategory; the switch is part of guest time there. `totals` is the time by VcpuState,
    without steal time; OTHER has everything that belongs to no operation. `faults` are those of the recorded policy's
    replay. `rest` is the time after each vCPU's last operation of the recorded kernel (`Specialization.rest`).
    """

    refused: str
    began: int
    by_guest: int  # number of the VM's SMIs that followed port I/O of the guest, or a KVM_SMI ioctl
    by_clock: int  # number of the VM's other SMIs
    fitted: Fitted
    recorded: list[tuple[int, ...]]
    totals: Ints
    lost: Ints  # time taken by zap workers, where all tasks share one CPU
    waited: Ints  # time waiting for mmu_lock
    stolen: Ints  # time for which the thread could run and had no CPU
    curves: list[StealCurve]  # steal time over time; empty if the trace does not show it
    rows: Ints  # number of rows of the vCPU's thread
    fault_rows: Ints  # number of those rows that belong to faults
    fault_events: Ints  # number of fault events
    awaited: Ints  # time in userspace while a memslot change waited for a zap worker that was not zapping
    slept: Ints  # time for which the host was suspended, which is in no state
    interrupts: Ints  # number of exits for interrupts of the host
    interrupted: Ints  # time of those exits
    faults: Ints
    held: int  # time under mmu_lock, all vCPUs
    requests: int  # number of acquisitions of mmu_lock in `held`
    timeline: Timeline
    rip_runs: RipRuns
    rest: tuple[Ints, Ints, Ints]

    @property
    def weights(self) -> list[int]:
        """The relative share of each vCPU in the time that a zap worker takes:
        as recorded, or equal if nothing was recorded.
        """
        most = int(self.lost.max(initial=0))
        return [1000 * int(lost) // most for lost in self.lost] if most else [1] * len(self.lost)

    @property
    def smis_open(self) -> bool:
        """Whether most SMIs came from the wall clock and not from the guest itself."""
        return self.by_clock > self.by_guest


class Measurement:
    """Measures one VM part by part: `take` each part of its inputs, then call `result`.

    `own` makes the operations of the recorded kernel.
    """

    def __init__(self, capabilities: Capabilities, inputs: VmInputs, times: SpanTimes) -> None:
        self._capabilities, self._inputs, self._times = capabilities, inputs, times
        count = max(len(inputs.vcpus), 1)
        self.own = Specialization(capabilities.kernel, Case(), capabilities.ad_disabled, count)

    def take(self, part: Inputs) -> Timed:
        """Sample what the operations of a part took, and return these
        operations as the recorded kernel performed them.
        """
        timed = self.own.timed(part)
        self._sample(timed)
        return timed

    def result(self, faults: Ints, tables_freed: int) -> Measured:
        """Return what was measured, after the last part.

        `faults` (by vCPU) and `tables_freed` (tables of roots that were freed) are counts of the recorded policy's own
        replay.
        """
        decoder, times = self._inputs.decoder, self._times
        rest = self.own.rest(self._inputs.rest)
        times.timeline.finish()
        times.rip_runs.finish()
        vcpus = decoder.vcpus
        totals = self._totals()
        lost, stolen, waited = times.steal.lost, times.stolen, times.waits.waited
        counted = {name: vcpus[name].copy() for name in ("rows", "fault_rows", "interrupts", "interrupted")}
        return Measured(
            refused=self._refusal(), began=decoder.began, by_guest=decoder.by_guest, by_clock=decoder.by_clock,
            fitted=self._fitted(totals, tables_freed), recorded=_breakdown(totals, lost + waited, stolen),
            totals=totals, lost=lost, waited=waited, stolen=stolen, curves=times.curves(), awaited=times.steal.awaited,
            slept=times.timeline.slept, fault_events=vcpus["faults"].copy(), faults=faults, held=times.waits.held,
            requests=times.waits.faults, timeline=times.timeline,
            rip_runs=times.rip_runs, rest=rest, **counted,
        )  # fmt: skip

    def _refusal(self) -> str:
        backwards = self._times.timeline.backwards
        if self._inputs.decoder.began < 0:
            if self._capabilities.has("kvm_entry"):
                return "it never entered its guest"
            return "no entry into the guest is recorded: times are not known (--events time records them)"
        return f"the clock runs backwards at {backwards:,} rows: times are not available" if backwards else ""

    def _totals(self) -> Ints:
        """Return the ns by vCPU (rows) and VcpuState (columns)."""
        programs, vcpus = self.own.programs, self._inputs.decoder.vcpus
        totals = np.zeros((len(programs), len(VcpuState)), np.int64)
        measured = (VcpuState.GUEST, VcpuState.FAULT, VcpuState.LOAD, VcpuState.UNLOAD, VcpuState.OTHER, VcpuState.IDLE)
        for state in measured:
            totals[:, state] = programs[f"total_{state.name.lower()}"]
        totals[:, VcpuState.ZAP], totals[:, VcpuState.PREFETCH] = vcpus["zapped"], vcpus["prefetched"]
        totals[:, VcpuState.PAUSED] = self._times.timeline.totals[:, VcpuState.PAUSED]
        return totals

    def _fitted(self, totals: Ints, tables_freed: int) -> Fitted:
        times, own = self._times, self._capabilities.own
        samples, waits, steal = dict(times.samples), times.waits, times.steal
        if waits.faults:
            samples["hold"] = Samples.alike(waits.faults, waits.held)
        # In `reference_clock` each vCPU gives up its share of a job's time, so a job costs what they lost on average.
        lost = int(steal.lost.mean())
        taken = lost if own.teardown == "worker" else int(totals[:, VcpuState.ZAP].sum())
        if tables_freed and taken:
            samples["zap_table"] = Samples.alike(tables_freed, taken)
        elif steal.removed:
            samples["zap_table"] = Samples.alike(steal.removed, steal.removing)
        return fit(samples, cpus_of(self._capabilities), times.shortest)

    def _sample(self, timed: Timed) -> None:
        samples, seen = self._times.samples, samples_of(timed, self.own.still[: len(timed)])
        for name in ("fault", "switch", "found", "created", "unload"):
            samples[name].add(seen[name])
        if len(seen["tables"]) and samples["fault"].count:
            extra: Ints = seen["with_tables"] - round(samples["fault"].mean)
            samples["table"].add(np.maximum(extra, 0) // seen["tables"])


def _breakdown(totals: Ints, waited: Ints, stolen: Ints) -> list[tuple[int, ...]]:
    spent = np.zeros((len(totals), len(TimeCategory)), np.int64)
    for state in VcpuState:
        spent[:, _SPENT[state]] += totals[:, state]
    spent[:, TimeCategory.WAIT] += waited
    spent[:, TimeCategory.STEAL] += stolen
    return [tuple(row) for row in spent.tolist()]


_SPENT: Final = {
    VcpuState.GUEST: TimeCategory.GUEST, VcpuState.FAULT: TimeCategory.FAULT, VcpuState.PREFETCH: TimeCategory.FAULT,
    VcpuState.LOAD: TimeCategory.LOAD, VcpuState.UNLOAD: TimeCategory.UNLOAD, VcpuState.ZAP: TimeCategory.UNLOAD,
    VcpuState.SMM: TimeCategory.OTHER, VcpuState.USER: TimeCategory.OTHER, VcpuState.OTHER: TimeCategory.OTHER,
    VcpuState.IDLE: TimeCategory.IDLE, VcpuState.STEAL: TimeCategory.STEAL, VcpuState.PAUSED: TimeCategory.PAUSED,
}  # fmt: skip


def cpus_of(capabilities: Capabilities) -> int:
    """Return how many CPUs vCPUs and the worker share: one in the lab, else 0, which means enough for all."""
    return _LAB_CPUS if capabilities.trace.metadata.raw.get("lab") else 0
