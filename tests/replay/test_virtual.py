# SPDX-License-Identifier: Apache-2.0
"""Virtual time on recordings: it gives back what was recorded, and says what rests on what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

import kvmtrace
from benchmarks import time_accuracy
from replay import plan
from replay.decode.capabilities import Capabilities
from replay.result import SPENT
from replay.run import replay
from replay.simulate.operations import Cause
from replay.timing.reference_clock import TimeCategory
from replay.timing.soft_hangs import causes, soft_hangs
from replay.timing.stalls import Rule
from replay.timing.timed_run import Settings, VmTime
from tests.corpus import CORPUS, REPLAYED, each
from tests.replay.recording import Guest
from traces.reader import Trace, kind_codes
from traces.schema import BY_NAME
from traces.synth import Parameters, synthesize


def timed(path: Path, *policies: str, settings: Settings | None = None) -> list[VmTime]:
    return replay(plan.make(Capabilities(Trace.open(path)), policies), settings or Settings()).times


def parts(spent: tuple[int, ...]) -> list[int]:
    """Time breakdown, the switch within the guest's, as recordings have it."""
    guest = spent[TimeCategory.GUEST] + spent[TimeCategory.SWITCH]
    return [guest, *spent[TimeCategory.FAULT : TimeCategory.SWITCH], *spent[TimeCategory.IDLE :]]


@pytest.mark.parametrize("path", each(REPLAYED))
def test_under_its_own_policy_a_recording_takes_as_long_as_it_took(path: Path) -> None:
    """Within 1 % of each vCPU's time, or 0.3 ms of it: recordings of a few ms rest on single costs.

    The time breakdown comes out within 2 points of all of it, or 0.3 ms.
    """
    capabilities = Capabilities(Trace.open(path))
    for vm in replay(plan.make(capabilities, [capabilities.own.name]), Settings()).times:
        (outcome,) = vm.outcomes
        assert all(sum(vcpu.spent) == vcpu.wall for vcpu in outcome.vcpus)
        for recorded, vcpu in zip(vm.recorded, outcome.vcpus, strict=True):
            took = sum(recorded)
            assert abs(vcpu.wall - took) <= max(0.01 * took, 300_000)
            for before, after in zip(parts(recorded), parts(vcpu.spent), strict=True):
                assert abs(after / vcpu.wall - before / took) <= max(0.02, 300_000 / took)


@pytest.mark.slow
def test_a_storm_is_a_soft_hang_under_the_old_policy_alone(tmp_path: Path) -> None:
    path = tmp_path / "storm.parquet"
    synthesize(path, Parameters(policy="async", smi_rate=400, working_set=15_000, duration=0.05))
    (vm,) = timed(path, "async", "preserve", "shadow")
    by_name = {outcome.target.name: outcome.vcpus[0] for outcome in vm.outcomes}
    assert by_name["async"].wall > 10 * by_name["preserve"].wall
    assert by_name["async"].longest > 0.9 * by_name["async"].wall
    assert not by_name["preserve"].stalls
    assert not by_name["shadow"].stalls
    assert by_name["async"].spent[TimeCategory.FAULT] > 0.4 * by_name["async"].wall
    strict = timed(path, "async", settings=Settings(rule=Rule(share=0.001)))[0]
    assert not strict.outcomes[0].vcpus[0].stalls


@pytest.mark.parametrize("working_set", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_guest_work_between_faults_is_kept(tmp_path: Path, working_set: int) -> None:
    """A storm made for either policy is the same guest's: the time of the one is predicted from the other's recording.

    A guest that stores in a loop faults at one RIP: only faults that ended no instruction tell the switch from work.
    """
    made = {}
    for policy in ("async", "preserve"):
        made[policy] = tmp_path / f"{policy}.parquet"
        synthesize(made[policy], Parameters(policy=policy, smi_rate=400, working_set=working_set, duration=0.5))
    (vm,) = timed(made["async"], "preserve")
    (truth,) = (sum(spent) for spent in timed(made["preserve"], "preserve")[0].recorded)
    (vcpu,) = vm.outcomes[0].vcpus
    assert abs(vcpu.wall / truth - 1) < 0.02
    assert vcpu.band[0] < truth < vcpu.band[1]
    assert not vm.fitted.open
    assert vm.fitted.costs.switch < 1000
    (kept,) = timed(made["preserve"], "async")
    assert "at most" in kept.fitted.source["switch"]
    assert kept.fitted.costs.switch < 1000, "the shortest times in the guest bound it"
    low, high = kept.outcomes
    (slow,) = (sum(spent) for spent in vm.recorded)
    assert low.vcpus[0].band[0] < slow < high.vcpus[0].band[1]


@pytest.mark.slow
def test_wall_clock_smis_strike_a_slow_guest_more_often(tmp_path: Path) -> None:
    """Closed: as many SMIs as recorded, wherever they come. Open: at their times, of which fewer fit in a quick run."""
    path = tmp_path / "storm.parquet"
    synthesize(path, Parameters(policy="async", smi_rate=400, working_set=15_000, duration=0.05))
    closed = timed(path, "async", "preserve", settings=Settings(smi="closed"))[0]
    opened = timed(path, "async", "preserve", settings=Settings(smi="open"))[0]
    assert not closed.open
    assert opened.open
    quick = {outcome.target.name: outcome.vcpus[0].wall for outcome in opened.outcomes}
    slow = {outcome.target.name: outcome.vcpus[0].wall for outcome in closed.outcomes}
    assert quick["preserve"] < slow["preserve"], "SMIs that come later than the guest's end do not delay it"
    assert abs(quick["async"] - slow["async"]) < 0.02 * slow["async"], "the recorded policy meets its SMIs as recorded"


def test_costs_say_where_they_are_from() -> None:
    (vm,) = timed(CORPUS / "smi-storm-6.1-async.parquet", "preserve")
    assert vm.fitted.source["fault"].startswith("measured")
    assert vm.fitted.source["created"].startswith("measured")
    assert vm.fitted.source["found"].startswith("dated table")
    assert 0 < vm.fitted.error["fault"] < 1
    (vm,) = timed(CORPUS / "smi-storm-6.1.parquet", "preserve")
    assert vm.fitted.source["found"].startswith("measured")


def progress(*periods: tuple[int, Cause, TimeCategory]) -> NDArray[np.int64]:
    """Moments 1 ms apart through periods of (ms, cause of the last unload, what the time is spent on)."""
    rows = [np.zeros(2 + len(TimeCategory), np.int64)]
    for ms, cause, on in periods:
        for _ in range(ms):
            row = rows[-1].copy()
            row[0] += 1_000_000
            row[1] = cause
            row[2 + on] += 1_000_000
            rows.append(row)
    return np.array(rows)


def test_a_soft_hang_has_what_began_it_and_what_it_went_on() -> None:
    guest, fault, other = TimeCategory.GUEST, TimeCategory.FAULT, TimeCategory.OTHER
    found = soft_hangs(
        progress(
            (300, Cause.FIRST, guest), (200, Cause.RSM, fault), (300, Cause.RSM, guest), (200, Cause.CR0_WP, fault),
            (300, Cause.CR0_WP, guest), (200, Cause.CR0_WP, other), (100, Cause.CR0_WP, guest),
        ), Rule(),
    )  # fmt: skip
    assert [hang.why for hang in found] == ["an SMI", "a write of CR0.WP", "exits for other than faults and roots"]
    assert [hang.cause for hang in found] == [Cause.RSM, Cause.CR0_WP, Cause.CR0_WP]
    assert [hang.spent[on] for hang, on in zip(found, (fault, fault, other), strict=True)] == [200_000_000] * 3
    assert all(sum(hang.spent) == hang.ns for hang in found)
    assert causes(found[:1]) == "cause: an SMI"
    assert causes(found[:1] * 3) == "cause of each: an SMI"
    assert causes(found) == "causes: an SMI (1), a write of CR0.WP (1), exits for other than faults and roots (1)"


def test_a_clock_that_runs_backwards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from replay.timing.measuring.measure import SpanTimes

    real = SpanTimes.feed

    def feed(self: SpanTimes, batch: Any) -> Any:
        self.timeline.backwards += 3
        return real(self, batch)

    monkeypatch.setattr(SpanTimes, "feed", feed)
    (vm,) = timed(CORPUS / "smi-storm-6.1.parquet", "preserve")
    assert "backwards" in vm.refused
    assert vm.outcomes == []


def test_the_command_gives_a_verdict_and_a_document() -> None:
    runner = CliRunner()
    trace = str(CORPUS / "smi-storm-6.1-async.parquet")
    done = runner.invoke(kvmtrace.app, ["replay", trace])
    assert done.exit_code == 0
    said = " ".join(done.stdout.split())
    assert "the time under async as under preserve" in said
    assert "costs measured: " in said
    assert "(dated table of 2026-11, times " in said
    assert "SMIs move with the guest's progress" in said
    document = json.loads(runner.invoke(kvmtrace.app, ["replay", trace, "--json"]).stdout)
    (vm,) = document["time"]["vms"]
    for policy in vm["policies"]:
        for vcpu in policy["vcpus"]:
            assert sum(vcpu[f"{each.name.lower()}_ns"] for each in TimeCategory) == vcpu["wall"]
            assert vcpu["band"][0] <= vcpu["wall"] <= vcpu["band"][1]
    assert "time" not in json.loads(runner.invoke(kvmtrace.app, ["replay", trace, "--json", "--no-time"]).stdout)
    done = runner.invoke(kvmtrace.app, ["replay", trace, "--smi", "often"])
    assert "give auto, open or closed" in str(done.exception)


def test_a_guest_that_is_well_is_not_stuck() -> None:
    (vm,) = timed(CORPUS / "steady-6.1.parquet", "preserve")
    assert vm.stuck == []


@pytest.mark.slow
def test_what_it_predicts_is_kept_in_the_documents() -> None:
    found = time_accuracy.lines()
    assert time_accuracy.DOCUMENT.read_text() == time_accuracy.document(found)
    assert {(line.recorded, line.policy) for line in found} == {each[:2] for each in time_accuracy.DIRECTIONS}
    worse = replace(found[0], measured=(10**12,))
    assert not worse.inside
    assert worse.error < -0.9


@pytest.mark.slow
def test_the_result_has_times_in_rows(tmp_path: Path) -> None:
    trace, out = tmp_path / "storm.parquet", tmp_path / "result.parquet"
    synthesize(trace, Parameters(policy="async", smi_rate=400, working_set=15_000, duration=0.05))
    done = CliRunner().invoke(kvmtrace.app, ["replay", str(trace), "-o", str(out), "--json"])
    vms = json.loads(done.stdout)["time"]["vms"]
    rows = pl.read_parquet(out)
    for policy in vms[0]["policies"]:
        (vcpu,) = policy["vcpus"]
        of_policy = rows.filter(pl.col("policy") == policy["policy"])
        row = of_policy.filter(pl.col("row") == "vcpu").to_dicts()[0]
        assert row["wall_ns"] == vcpu["wall"] == sum(row[name] for name in SPENT)
        assert [row["wall_low_ns"], row["wall_high_ns"]] == vcpu["band"]
        assert row["recorded_ns"] == vms[0]["recorded"][0]
        stalls = of_policy.filter(pl.col("row") == "stall").to_dicts()
        assert row["stalls"] == len(stalls) == len(vcpu["stalls"])
        assert row["stalled_ns"] == sum(stall["wall_ns"] for stall in stalls)
        for stall, said in zip(stalls, vcpu["stalls"], strict=True):
            assert stall["cause"] == said["cause"] in ("smi", "rsm")
            assert (stall["clock"], stall["clock"] + stall["wall_ns"]) == (said["begin"], said["end"])
            assert sum(stall[name] for name in SPENT) == stall["wall_ns"]
            assert stall["guest_ns"] < 0.1 * stall["wall_ns"]
        progress = of_policy.filter(pl.col("row") == "progress").select("clock", *SPENT)
        assert progress.row(0) == (0,) * (1 + len(SPENT))
        assert progress["clock"].is_sorted()
        assert (progress.select(pl.sum_horizontal(SPENT)).to_series() == progress["clock"]).all()
    assert "cause: an SMI" in CliRunner().invoke(kvmtrace.app, ["replay", str(trace)]).stdout


def guest_with_faults() -> Guest:
    guest = Guest()
    guest.slot(0, 64, 0x4000)
    guest.load()
    for page in range(20):
        guest.fault(page)
    return guest


def test_without_entries_counts_stand_and_times_are_refused(tmp_path: Path) -> None:
    guest = guest_with_faults()
    dropped = ("kvm_entry", "kvm_exit")
    guest.rows = [row for row in guest.rows if row["kind"][0] not in [BY_NAME[kind].code for kind in dropped]]
    capabilities = guest.write(tmp_path / "counts.parquet", lacking=dropped)
    done = CliRunner().invoke(kvmtrace.app, ["replay", str(capabilities.trace.path), "--json"])
    document = json.loads(done.stdout)
    assert document["vms"][0]["policies"][0]["faults"] == 20
    (vm,) = document["time"]["vms"]
    assert "--events time records them" in vm["refused"]
    text = CliRunner().invoke(kvmtrace.app, ["replay", str(capabilities.trace.path)]).stdout
    assert "no times: no entry" in text
    assert "entries into the guest are not recorded" in text


def test_gaps_mark_the_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = guest_with_faults().write(tmp_path / "gap.parquet").trace.path
    assert timed(path, "async")[0].marked == ""
    real = Trace.open
    loss = {"kvm_page_fault": {"emitted": {"0": 25}, "lost": {"0": 5}, "stored": {"0": 20}}}

    def lossy(path: Path, recorded_policy: str = "") -> Trace:
        trace = real(path, recorded_policy)
        monkeypatch.setattr(trace, "metadata", replace(trace.metadata, loss=loss, gap_count=1))
        return trace

    monkeypatch.setattr(Trace, "open", lossy)
    (vm,) = timed(path, "async")
    assert vm.outcomes
    assert vm.marked.startswith("5 events were lost in 1 gap: their time counts")
    assert "marked: 5 events were lost" in CliRunner().invoke(kvmtrace.app, ["replay", str(path)]).stdout


def test_how_long_is_stuck_is_adjustable(tmp_path: Path) -> None:
    guest = guest_with_faults()
    for _ in range(3000):
        guest.fault(5, installs=False)
    path = guest.write(tmp_path / "stuck.parquet").trace.path
    assert timed(path, "async", settings=Settings(stuck=5000))[0].stuck == []
    (found,) = timed(path, "async")[0].stuck
    assert found.exits >= 3000


@pytest.mark.parametrize("name", ["smi-both-5.10", "smi-storm-6.1-async", "cr4-toggle-6.1", "mmio-7.x-shadow"])
def test_counts_need_no_entries_and_no_exits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads are seen by their functions: what entries and exits add is time, and why registers were reset."""
    real = Trace.batches
    trace = Trace.open(CORPUS / f"{name}.parquet")

    def counts() -> list[dict[str, int]]:
        capabilities = Capabilities(trace)
        return [
            outcome.counts()
            for outcome in replay(plan.make(capabilities, [capabilities.own.name, "preserve"])).outcomes
        ]

    def batches(self: Trace, columns: Sequence[str] | None = None, *given: Any, **named: Any) -> Iterator[Any]:
        names = list(columns or self.schema.names)
        for batch in real(self, [*names, *({"kind"} - set(names))], *given, **named):
            kept = np.isin(kind_codes(batch), [BY_NAME["kvm_entry"].code, BY_NAME["kvm_exit"].code], invert=True)
            yield batch.filter(pa.array(kept)).select(names)

    whole = counts()
    monkeypatch.setattr(Trace, "batches", batches)
    kinds = {kind: rows for kind, rows in trace.metadata.kinds.items() if kind not in ("kvm_entry", "kvm_exit")}
    monkeypatch.setattr(trace, "metadata", replace(trace.metadata, kinds=kinds, probes=()))
    assert counts() == whole
