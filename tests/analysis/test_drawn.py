# SPDX-License-Identifier: Apache-2.0
"""Queries that pictures are drawn from, against the rows they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from analysis.queries import drawn, recorded, replayed
from analysis.queries.registry import queries
from analysis.reading.recorded_time import COLUMNS, recorded_times, spans_of
from analysis.reading.sources import Recording
from analysis.report_model.report import Report
from analysis.reporting import Wanted, reported
from replay.decode.batch import Batch
from replay.decode.spans.timeline import Timeline
from replay.decode.spans.vcpu_states import VcpuState
from replay.decode.vm_inputs import dense_numbers, vcpu_ids
from tests.analysis.sources import CORPUS
from traces.errors import Problem
from traces.reader import Trace
from traces.synth import Parameters, synthesize

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("drawn")]  # one storm for all of them


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    path = tmp_path_factory.mktemp("storm") / "storm.parquet"
    synthesize(path, Parameters(policy="async", smi_rate=2000, working_set=3000, events=600_000))
    with reported(path, Wanted()) as report:
        yield report


@pytest.mark.parametrize("parts", [1, 7, 400, 50_000])
@pytest.mark.parametrize("name", ["two-vms-6.1-async", "smi-both-7.x"])
def test_time_is_split_exactly(name: str, parts: int) -> None:
    trace = Trace.open(CORPUS / f"{name}.parquet")
    for vm in trace.metadata.vms:
        first, last = trace.metadata.spans[vm["id"]]
        width = (last - first) // parts + 1
        timeline = Timeline(len(vcpu_ids(vm)), parts=(first, width, parts))
        wanted = np.zeros((len(vcpu_ids(vm)), parts, len(VcpuState)), np.int64)
        for rows in trace.batches(COLUMNS, vm=vm["id"], size=1000):
            spans = spans_of(timeline, Batch(rows, dense_numbers(trace.path, vm)))
            ends = zip(spans.vcpu.tolist(), spans.time.tolist(), spans.ns.tolist(), spans.state.tolist(), strict=True)
            for vcpu, end, ns, state in ends:
                at = end - ns - first
                while at < end - first:  # one part after another
                    stop = min((at // width + 1) * width, end - first)
                    wanted[vcpu, at // width, state] += stop - at
                    at = stop
        found = timeline.parts[:, :parts]
        assert found.sum() > 0
        assert (found == wanted).all()
        assert found.sum(2).max() <= width


def test_vcpu_states_are_the_parts(storm: Report) -> None:
    assert storm.recording is not None
    rows = drawn.vcpu_states(storm.recording).collect()
    (vm,) = recorded_times(storm.recording.trace)
    whole = vm.timeline.totals.sum(0)
    assert rows.select(list(drawn.STATES)).sum().row(0) == tuple(whole[list(drawn.STATES.values())].tolist())
    assert rows.select(list(drawn.STATES)).sum().sum_horizontal()[0] == whole.sum()
    assert rows["time"].is_sorted()
    assert len(rows) <= drawn.PARTS


@pytest.mark.parametrize("parts", [False, True])
def test_the_recorded_time_is_held_in_parts_where_they_are_wanted(parts: bool) -> None:
    with reported(CORPUS / "two-vms-6.1-async.parquet", Wanted(parts=parts)) as report:
        assert report.recording is not None
        held = [time.timeline.parts.shape[1] for time in report.recording.times]
    assert held == [401 if parts else 1] * 2


def test_soft_hangs_are_near_those_of_the_replay(storm: Report) -> None:
    assert storm.recording is not None
    assert storm.result is not None
    own = drawn.soft_hangs(storm.recording).collect()
    virtual = replayed.stalls(storm.result).filter(pl.col("recorded")).collect()
    assert len(own) == len(virtual) == 1
    assert own["length_ns"][0] == pytest.approx(virtual["wall_ns"][0], rel=0.05)
    assert own["guest_ns"][0] < 0.1 * own["length_ns"][0]


def test_soft_hangs_that_cannot_be_known_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording.open(CORPUS / "huge-6.1.parquet")
    kinds = {**recording.metadata.kinds, "kvm_mmu_set_spte": 0}
    probes = tuple(each for each in recording.metadata.probes if each["kind"] != "kvm_mmu_set_spte")
    monkeypatch.setattr(recording.trace, "metadata", replace(recording.metadata, kinds=kinds, probes=probes))
    with pytest.raises(Problem, match=r"query soft_hangs: VM 1: .*leaf installs are not recorded"):
        drawn.soft_hangs(recording).collect()


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_heat_counts_every_install_once(rows: int) -> None:
    recording = Recording.open(CORPUS / "two-vms-6.1-async.parquet")
    found = drawn.heat(recording, rows=rows).collect()
    assert found["installs"].sum() == recording.metadata.kinds["kvm_mmu_set_spte"]
    assert found.group_by("vm").agg(pl.col("gfn").n_unique())["gfn"].max() <= rows
    assert (found["gfn"] % found["pages"] == 0).all()


def test_refills_are_roots_after_the_first_of_their_role(storm: Report) -> None:
    assert storm.result is not None
    rows = drawn.refills(storm.result).collect()
    made = dict(rows.group_by("policy").agg(pl.col("roots").sum()).iter_rows())
    again = dict(rows.filter("refill").group_by("policy").agg(pl.col("roots").sum()).iter_rows())
    assert made == {"async": 67, "preserve": 2}
    assert again == {"async": 65}
    faults = replayed.policies(storm.result).filter(policy="async").collect()["faults_low"][0]
    assert rows.filter(policy="async")["pages"].sum() == pytest.approx(faults, rel=0.01)
    assert (
        (rows["pages"] >= rows["pages_from"] * rows["roots"]) & (rows["pages"] <= rows["pages_to"] * rows["roots"])
    ).all()


def test_fills_count_every_root_and_fault(storm: Report) -> None:
    assert storm.recording is not None
    rows = drawn.fills(storm.recording).collect()
    lives = recorded.lives(storm.recording).collect()
    assert rows["roots"].sum() == len(lives)
    assert rows["pages"].sum() == lives["faults"].sum()


def test_shares_keep_the_guest_time(storm: Report) -> None:
    assert storm.result is not None
    for parts in (1, 10, 400):
        rows = drawn.shares(storm.result, parts=parts).collect()
        ends = replayed.progress(storm.result).group_by("policy").agg(pl.col("guest_ns").max()).collect()
        for policy, guest in ends.iter_rows():
            mine = rows.filter(policy=policy)
            assert (mine["guest_share"] * mine["length_ns"]).sum() == pytest.approx(guest, rel=0.02)


def test_they_are_queries_like_others(storm: Report) -> None:
    for query in queries().values():
        if query.make.__module__ == drawn.__name__:
            source = storm.recording if query.source is Recording else storm.result
            assert source is not None
            assert query(source).collect().height > 0
            assert query.about.endswith((".", "there."))
