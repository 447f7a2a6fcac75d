# SPDX-License-Identifier: Apache-2.0
"""A recording's time: what each vCPU did in each part of it, where it hardly ran its guest, where it was stuck.

All of it comes from one pass over a VM's rows, which is the replay's pass where a report replays the VM anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.batch import Batch
from replay.decode.capabilities import Capabilities
from replay.decode.inputs import Ints
from replay.decode.same_rip import RipRuns
from replay.decode.spans.timeline import Timeline
from replay.decode.spans.vcpu_states import NO_SPAN, VcpuState
from replay.decode.vm_inputs import dense_numbers, parts_of, vcpu_ids
from replay.simulate.pools import by_vcpu
from replay.timing.measuring.measure import Measured, SpanTimes
from replay.timing.measuring.measured_vm import measure_vm
from replay.timing.stalls import Rule, Stall, stalls
from replay.timing.timed_run import VmTime
from traces.command_line.durations import duration
from traces.errors import Problem
from traces.reader import Trace

PARTS: Final = 400  # equal parts of a VM's time
COLUMNS: Final = (
    "seq", "time", "vcpu", "tid", "kind", "root", "role", "code", "rip", "addr", "value", "ret", "flags",
)  # fmt: skip


@dataclass(frozen=True)
class Switch:
    """The ns of an exit and entry, which a recording shows as guest time: at most `ns`, at least `least`."""

    ns: int
    least: int

    @property
    def text(self) -> str:
        return duration(self.ns) + (
            f" (the most that it can be; the least is {duration(self.least)})" if self.open else ""
        )

    @property
    def open(self) -> bool:
        return self.least < self.ns


@dataclass(frozen=True)
class RecordedTime:
    """The recorded time of one VM.

    `switch` is what a replay takes the switch to be; None where no replay can determine it, and `unknown` says why.
    """

    vm: int
    ids: list[int]
    first: int  # boot ns at which the first of the PARTS begins; each is `width` ns long
    width: int
    timeline: Timeline
    rip_runs: RipRuns | None  # None where there is no vCPU, or no replay
    switch: Switch | None
    unknown: str = ""
    unplaced: int = 0  # ns in which its threads had no CPU, but no row says when that was

    @property
    def parts(self) -> NDArray[np.int64]:
        """The ns by vCPU (dense number), part of the time, and VcpuState, as a three-dimensional array."""
        parts: NDArray[np.int64] = self.timeline.parts
        assert parts.shape[1] > PARTS, "the replay was not asked for parts"
        return parts[: len(self.ids), :PARTS]

    def stalls(self, rule: Rule) -> dict[int, list[Stall]]:
        """Return soft-hangs by vCPU id, the switch not counted as guest time; none where it is not known."""
        if self.switch is None:
            return {}
        moments = np.concatenate(self.timeline.progress)
        found = {}
        for number, places in zip(self.ids, by_vcpu(moments["vcpu"], len(self.ids)), strict=True):
            mine = moments[places]
            ran = guest_time(mine["guest"], mine["guests"], self.switch.ns)
            found[number] = stalls(mine["time"], ran + mine["idle"], rule, mine["away"])
        return found


def guest_time(guest: Ints, guests: Ints, switch: int) -> Ints:
    """Return the ns that a guest ran until some moments: `guest` ns in `guests` spans, less a switch in each.

    Between two moments it is never below 0, although the switch is a mean.
    """
    ran = np.diff(guest, prepend=0) - np.diff(guests, prepend=0) * switch
    total: Ints = np.cumsum(np.maximum(ran, 0))
    return total


def recorded_times(trace: Trace) -> list[RecordedTime]:
    """Return the time of each VM, from one pass. Raises Problem where a row's time or vCPU is impossible."""
    capabilities: Capabilities | None = None
    why = ""
    try:
        capabilities = Capabilities(trace)
    except Problem as problem:
        why = str(problem)
    found = []
    for vm in trace.metadata.vms:
        if capabilities is not None and vcpu_ids(vm):
            spans = SpanTimes(capabilities, vm, parts_of(trace, vm, PARTS))
            measured = measure_vm(capabilities, vm, None, spans).measured
            found.append(_of(trace, vm, measured))
        else:
            found.append(_unmeasured(trace, vm, why))
    return found


def of_replay(trace: Trace, times: Iterable[VmTime]) -> list[RecordedTime]:
    """Return the time of each VM, where a replay has made the pass (`Settings.parts`)."""
    made = {time.vm: time.measured for time in times}
    found = []
    for vm in trace.metadata.vms:
        measured = made.get(int(vm["id"]))
        found.append(_unmeasured(trace, vm, "") if measured is None else _of(trace, vm, measured))
    return found


def _of(trace: Trace, vm: Mapping[str, Any], measured: Measured) -> RecordedTime:
    first, width, _ = parts_of(trace, vm, PARTS)
    ns, open_ = measured.fitted.costs.switch, measured.fitted.open
    switch = None if measured.refused else Switch(ns, ns - open_)
    shown = int(measured.timeline.totals[:, VcpuState.STEAL].sum())
    return RecordedTime(
        int(vm["id"]), vcpu_ids(vm), first, width, measured.timeline, measured.rip_runs, switch, measured.refused,
        max(int(measured.stolen.sum()) - shown, 0),
    )  # fmt: skip


def _unmeasured(trace: Trace, vm: Mapping[str, Any], why: str) -> RecordedTime:
    ids = vcpu_ids(vm)
    first, width, _ = parts = parts_of(trace, vm, PARTS)
    timeline = Timeline(len(ids), parts=parts)
    numbers = dense_numbers(trace.path, vm)
    for rows in trace.batches(COLUMNS, vm=int(vm["id"])):
        batch, ended = Batch(rows, numbers).of_vm()
        spans_of(timeline, batch)
        if ended:
            break
    timeline.finish()
    return RecordedTime(int(vm["id"]), ids, first, width, timeline, None, None, why)


@dataclass(frozen=True)
class Spans:
    """Spans of vCPUs' time in one batch, by vCPU and in order: each is `ns` long and ends at `time` with row `at`."""

    at: Ints
    vcpu: NDArray[np.int32]
    time: Ints
    ns: Ints
    state: NDArray[np.uint8]


def spans_of(timeline: Timeline, batch: Batch) -> Spans:
    """Return the spans that end in a batch."""
    rows = len(batch)
    state, mark, before = (np.empty(rows, np.uint8) for _ in range(3))
    ns = np.empty(rows, np.int64)
    timeline.feed(batch, state, ns, mark, before)
    at = np.flatnonzero(state != NO_SPAN)
    at = at[np.argsort(batch.vcpu[at], kind="stable")]
    return Spans(at, batch.vcpu[at], batch.time[at], ns[at], state[at])
