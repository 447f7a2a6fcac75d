"""Where recorded time went: nothing counted twice, nothing left out, and the same wherever batches are cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from replay.decode.capabilities import Evidence
from replay.decode.decoder import VmStimuli
from replay.decode.lookback import COLUMNS, Rows
from replay.simulate.specialize import Case, Lowering
from replay.timing.attribute import Timing
from replay.timing.smis import Driven
from replay.timing.timed_operations import CREATED, FOUND
from replay.timing.timeline import Doing, Timeline
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


def numbers(vm: object) -> np.ndarray:  # type: ignore[type-arg]
    ids = sorted({vcpu["id"] for vcpu in vm["vcpus"]})  # type: ignore[index]
    found = np.full(max(ids) + 2, -1, np.int32)
    found[ids] = np.arange(len(ids))
    return found


def totals(name: str, size: int) -> np.ndarray:  # type: ignore[type-arg]
    trace = Trace.open(CORPUS / f"{name}.parquet")
    vm = trace.metadata.vms[0]
    dense = numbers(vm)
    timeline = Timeline(int(dense.max()) + 1)
    for batch in trace.batches(COLUMNS, vm=vm["id"], size=size):
        timeline.feed(Rows(batch, dense))
    assert timeline.backwards == 0
    return timeline.totals


@pytest.mark.parametrize("name", NAMES)
def test_every_ns_is_put_down_once(name: str) -> None:
    trace = Trace.open(CORPUS / f"{name}.parquet")
    vm = trace.metadata.vms[0]
    found = totals(name, 1 << 16)
    rows = [row for batch in trace.batches(["vcpu", "tid", "kind", "time"], vm=vm["id"]) for row in batch.to_pylist()]
    runners = {row["tid"] for row in rows if row["kind"] == "kvm_entry"}
    for vcpu in range(len(found)):
        times = [row["time"] for row in rows if row["vcpu"] == vcpu and row["tid"] in runners]
        assert found[vcpu].sum() == max(times) - min(times)


@settings(max_examples=25, deadline=None)
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
    assert found[Doing.GUEST] == guest
    assert found[Doing.SMM] == found[Doing.UNLOAD] == 0
    assert found[Doing.FAULT] > found[Doing.OTHER]


@pytest.mark.parametrize("size", [1 << 16, 211])
@pytest.mark.parametrize("name", NAMES)
def test_operations_are_given_all_of_it(name: str, size: int) -> None:
    """Leads, costs, what is the policy's, and what is left behind the last operation make up each vCPU's time."""
    evidence = Evidence(Trace.open(CORPUS / f"{name}.parquet"))
    vm = evidence.trace.metadata.vms[0]
    vcpus = len({vcpu["id"] for vcpu in vm["vcpus"]})
    timing = Timing(vcpus, 0, own=evidence.own)
    stimuli = VmStimuli(evidence, vm, watch=timing.watch, size=size)
    lowering = Lowering(evidence.kernel, Case(), False)
    given_ = np.zeros(vcpus, np.int64)
    guest = np.zeros(vcpus, np.int64)
    for stretch in stimuli:
        timed = timing.join(lowering.apply(stretch))
        for vcpu in range(vcpus):
            mine = timed.queue == vcpu
            given_[vcpu] += timed.lead[mine].sum() + timed.cost[mine].sum()
            guest[vcpu] += timed.guest[mine].sum()
        assert (timed.guest <= timed.lead).all()
        assert (timed.lead >= 0).all()
    lead, rest = timing.rest()
    recorded = timing.timeline.totals
    apart = timing.totals[:, [Doing.ZAP, Doing.PREFETCH]].sum(1)
    apart += timing.contended.waited
    assert (given_ + lead + apart == recorded.sum(1)).all()
    assert (timing.totals.sum(1) + timing.contended.waited == recorded.sum(1)).all()
    assert ((guest + rest) == recorded[:, Doing.GUEST]).all()


def test_what_was_recorded_is_known_of_loads_and_faults() -> None:
    evidence = Evidence(Trace.open(CORPUS / "smi-storm-6.1-async.parquet"))
    vm = evidence.trace.metadata.vms[0]
    timing = Timing(1, 0)
    lowering = Lowering(evidence.kernel, Case(), False)
    was: list[int] = []
    kinds: list[int] = []
    for stretch in VmStimuli(evidence, vm, watch=timing.watch):
        timed = timing.join(lowering.apply(stretch))
        was += timed.was.tolist()
        kinds += (timed.block.op & 15).tolist()
    entered = [w for w, kind in zip(was, kinds, strict=True) if kind == 2 and w]
    assert entered == [CREATED] * 9
    touched = [w for w, kind in zip(was, kinds, strict=True) if kind == 0]
    assert len(touched) == 2569
    assert sum(w - 1 for w in touched) == 32  # tables
    evidence = Evidence(Trace.open(CORPUS / "smi-storm-6.1.parquet"))
    timing = Timing(1, 0)
    was = []
    for stretch in VmStimuli(evidence, evidence.trace.metadata.vms[0], watch=timing.watch):
        timed = timing.join(Lowering(evidence.kernel, Case(), False).apply(stretch))
        was += [w for w, op in zip(timed.was.tolist(), timed.block.op.tolist(), strict=True) if op & 15 == 2 and w]
    assert was == [CREATED, CREATED, *[FOUND] * 7]


def test_smis_of_the_lab_follow_the_guest() -> None:
    trace = Trace.open(CORPUS / "smi-both-6.1.parquet")
    vm = trace.metadata.vms[0]
    driven = Driven()
    for batch in trace.batches(COLUMNS, vm=vm["id"]):
        driven.watch(Rows(batch, numbers(vm)))
    assert (driven.by_guest, driven.by_clock, driven.open) == (8, 0, False)
