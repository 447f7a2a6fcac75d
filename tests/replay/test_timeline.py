# SPDX-License-Identifier: Apache-2.0
"""Where recorded time went: nothing counted twice, nothing left out, and the same wherever batches are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from replay.decode import batch, vm_inputs
from replay.decode.batch import COLUMNS, Batch
from replay.decode.capabilities import Capabilities
from replay.decode.cases import Case
from replay.decode.spans.timeline import Timeline
from replay.decode.spans.vcpu_states import VcpuState
from replay.decode.specialize import Specialization
from replay.decode.vm_inputs import VmInputs, dense_numbers, vcpu_ids
from replay.simulate.operations import Op
from replay.simulate.timed_operations import CREATED, FOUND
from replay.timing import timed_run
from replay.timing.measuring import measure
from replay.timing.measuring.measure import Measurement, SpanTimes
from tests.profiles import examples
from tests.replay.plain import BENEATH_DECODER, plain
from tests.thinned import thinned
from traces.reader import Trace

CORPUS = Path(__file__).parents[2] / "traces" / "corpus"
NAMES = (
    "smi-storm-6.1-async",
    "smi-both-5.10",
    "slot-delete-7.x",
    "cr4-toggle-6.1",
    "mmio-6.12",
    "smi-grow-6.1-shadow",
)


def opened(name: str) -> Capabilities:
    return Capabilities(Trace.open(CORPUS / f"{name}.parquet"))


def totals(name: str, size: int) -> Any:
    trace = Trace.open(CORPUS / f"{name}.parquet")
    vm = trace.metadata.vms[0]
    timeline = Timeline(len(vcpu_ids(vm)))
    for rows in trace.batches(COLUMNS, vm=vm["id"], size=size):
        state, mark, before = (np.empty(rows.num_rows, np.uint8) for _ in range(3))
        batch = Batch(rows, dense_numbers(trace.path, vm))
        timeline.feed(batch, state, np.empty(rows.num_rows, np.int64), mark, before)
    assert timeline.backwards == 0
    return timeline.totals


@pytest.mark.parametrize("name", NAMES)
def test_every_ns_belongs_to_one_state(name: str) -> None:
    trace = Trace.open(CORPUS / f"{name}.parquet")
    vm = trace.metadata.vms[0]
    found = totals(name, 1 << 16)
    rows = [row for batch in trace.batches(["vcpu", "tid", "kind", "time"], vm=vm["id"]) for row in batch.to_pylist()]
    runners = {row["tid"] for row in rows if row["kind"] == "kvm_entry"}
    for vcpu in range(len(found)):
        times = [row["time"] for row in rows if row["vcpu"] == vcpu and row["tid"] in runners]
        assert found[vcpu].sum() == max(times) - min(times)


@examples(25)
@given(st.sampled_from(NAMES), st.integers(1, 3000))
@example("smi-both-5.10", 66)  # between a vCPU's first load and its first entry
def test_batches_may_be_cut_anywhere(name: str, size: int) -> None:
    assert (totals(name, max(size, 37)) == totals(name, 1 << 16)).all()


def test_guest_and_faults_are_told_apart() -> None:
    trace = Trace.open(CORPUS / "steady-6.1.parquet")
    rows = [row for batch in trace.batches(["vcpu", "kind", "time"], vm=1) for row in batch.to_pylist()]
    guest, entered = 0, None
    for row in rows:
        if row["vcpu"] == 0 and row["kind"] == "kvm_entry":
            entered = row["time"]
        elif row["vcpu"] == 0 and row["kind"] == "kvm_exit" and entered is not None:
            guest += row["time"] - entered
    found = totals("steady-6.1", 1 << 16)[0]
    assert found[VcpuState.GUEST] == guest
    assert found[VcpuState.SMM] == found[VcpuState.UNLOAD] == 0
    assert found[VcpuState.FAULT] > found[VcpuState.OTHER]


@pytest.mark.parametrize("size", [1 << 16, 211])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", [Case(), Case(most=True, hidden=True)], ids=["least", "most"])
def test_operations_are_given_all_of_it(name: str, size: int, case: Case) -> None:
    """Leads, costs, what is the policy's, and what is left behind the last operation make up each vCPU's time."""
    capabilities = opened(name)
    vm = capabilities.trace.metadata.vms[0]
    times = SpanTimes(capabilities, vm)
    inputs = VmInputs(capabilities, vm, times=times, size=size)
    vcpus = len(inputs.vcpus)
    specialized = Specialization(capabilities.kernel, case, False, vcpus)
    given_ = np.zeros(vcpus, np.int64)
    guest = np.zeros(vcpus, np.int64)
    for part in inputs:
        timed = specialized.timed(part)
        for vcpu in range(vcpus):
            mine = timed.queue == vcpu
            given_[vcpu] += timed.lead[mine].sum() + timed.cost[mine].sum()
            guest[vcpu] += timed.guest[mine].sum()
        assert (timed.guest <= timed.lead).all()
        assert (timed.lead >= 0).all()
    lead, rest, _ = specialized.rest(inputs.rest)
    recorded = times.timeline.totals
    apart = inputs.decoder.vcpus["zapped"] + inputs.decoder.vcpus["prefetched"]
    others = times.waits.waited + times.steal.lost + times.stolen
    others = others + recorded[:, VcpuState.PAUSED]
    assert (given_ + lead + apart + others == recorded.sum(1)).all()
    programs = specialized.programs
    states = sum(programs[f"total_{name}"] for name in ("guest", "fault", "load", "unload", "other", "idle"))
    assert (states + apart + others == recorded.sum(1)).all()
    if not times.steal.shared:
        assert ((guest + rest) == recorded[:, VcpuState.GUEST]).all()


def _was(name: str) -> list[tuple[int, int]]:
    """The outcome of the operations as recorded: (operation, `was`)."""
    capabilities = opened(name)
    vm = capabilities.trace.metadata.vms[0]
    times = SpanTimes(capabilities, vm)
    inputs = VmInputs(capabilities, vm, times=times)
    measurement = Measurement(capabilities, inputs, times)
    found = []
    for part in inputs:
        timed = measurement.take(part)
        found += list(zip((timed.block.op & 15).tolist(), timed.was.tolist(), strict=True))
    return found


def test_what_was_recorded_is_known_of_loads_and_faults() -> None:
    found = _was("smi-storm-6.1-async")
    assert [was for kind, was in found if kind == Op.ENTER and was] == [CREATED] * 9
    touched = [was for kind, was in found if kind == Op.TOUCH]
    assert len(touched) == 2569
    assert sum(was - 1 for was in touched) == 32  # tables
    kept = _was("smi-storm-6.1")
    assert [was for kind, was in kept if kind == Op.ENTER and was] == [CREATED, CREATED, *[FOUND] * 7]


def test_a_root_that_another_vcpu_built_is_found_not_built() -> None:
    """Two vCPUs, four SMIs: each root is built once."""
    capabilities = opened("smi-both-6.1")
    built = capabilities.trace.metadata.root_count
    found = [was for kind, was in _was("smi-both-6.1") if kind == Op.ENTER and was]
    assert found.count(CREATED) == built == 2
    assert found.count(FOUND) > 8


def test_smis_of_the_lab_follow_the_guest() -> None:
    capabilities = opened("smi-both-6.1")
    inputs = VmInputs(capabilities, capabilities.trace.metadata.vms[0])
    for _ in inputs:
        pass
    assert (inputs.decoder.by_guest, inputs.decoder.by_clock) == (8, 0)


def _everything(name: str, size: int) -> list[Any]:
    """All that decoding and measuring puts out."""
    capabilities = opened(name)
    found: list[Any] = []
    for vm in capabilities.trace.metadata.vms:
        times = SpanTimes(capabilities, vm, (0, 1 << 20, 100))
        inputs = VmInputs(capabilities, vm, times=times, size=size)
        measurement = Measurement(capabilities, inputs, times)
        apart = timed_run.SmisApart(len(inputs.vcpus), 0)
        for part in inputs:
            timed = measurement.take(part)
            columns = (part.op, part.gfn, part.seq, timed.lead, timed.guest, timed.cost, timed.was, timed.queue)
            found.append(([column.tolist() for column in columns], part.ranges.rows))
            moved = apart.move(timed)
            found.append([getattr(moved, name).tolist() for name in ("queue", "lead", "guest", "idle", "wall")])
        nothing = np.zeros(len(inputs.vcpus), np.int64)
        found.append([each.tolist() for each in apart.rest(nothing, nothing, nothing)])
        found.append([(name, each.values.tolist(), each.count, each.total) for name, each in times.samples.items()])
        found.append((times.shortest.values.tolist(), times.shortest.count))
        times.timeline.finish()
        made = (inputs.rest.lead, times.timeline.totals, times.rip_runs.longest, times.timeline.parts)
        progress = np.concatenate(times.timeline.progress)
        found.append([inputs.notes, *(each.tolist() for each in made), progress.tolist()])
        found.append([each.tolist() for each in (times.steal.lost, times.steal.preempted, times.waits.waited)])
    return found


@pytest.mark.parametrize(
    "name", thinned(12, [*NAMES, "dirty-log-huge-7.x", "notifier-5.10", "roots-6.1-shadow", "two-vms-7.x"])
)
def test_compiled_loops_do_what_they_do_as_plain_python(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = _everything(name, 1000)
    decoder, timeline = plain("replay.decode.rows.decoder", *BENEATH_DECODER), plain("replay.decode.spans.timeline")
    monkeypatch.setattr(vm_inputs, "Decoder", decoder.Decoder)
    for name_of in ("kinds_of", "vcpus_of"):
        monkeypatch.setattr(batch, name_of, getattr(plain("replay.decode.dense"), name_of))
    monkeypatch.setattr(measure, "Timeline", timeline.Timeline)
    monkeypatch.setattr(measure, "RipRuns", plain("replay.decode.same_rip").RipRuns)
    monkeypatch.setattr(measure, "Specialization", plain("replay.decode.specialize").Specialization)
    monkeypatch.setattr(measure, "LockWaits", plain("replay.timing.measuring.lock_waits").LockWaits)
    monkeypatch.setattr(measure, "Steal", plain("replay.timing.measuring.steal").Steal)
    monkeypatch.setattr(measure, "RowSpans", plain("replay.timing.measuring.row_spans").RowSpans)
    monkeypatch.setattr(measure, "samples_of", plain("replay.timing.measuring.operation_samples").samples_of)
    monkeypatch.setattr(timed_run, "SmisApart", plain("replay.timing.smis_apart").SmisApart)
    assert not decoder.COMPILED
    assert _everything(name, 1000) == compiled
