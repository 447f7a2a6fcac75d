# SPDX-License-Identifier: Apache-2.0
"""Reports on fleets: against a plain Python sum over the rows, in any order, and of what is empty or hostile."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvmtrace as command_line
from analysis.fleet.fleet_gates import parse
from analysis.fleet.fleet_report import fleet_report
from analysis.fleet.judged import COLUMNS, dimensions
from analysis.fleet.outcome import FleetOutcome, outcome
from analysis.fleet.outliers import LEAST, outliers
from analysis.formats import renderer
from analysis.report_model.report import Status
from benchmarks.fleet_rows import Fleet, parts, write
from replay.fleet.fleet_schema import RESULTS
from tests.golden import fleets
from tests.thinned import thinned
from tests.verbs import invoke
from traces.errors import Problem

Row = dict[str, Any]
FAILED = "failed"
AGREEMENTS = ("agrees", "agrees", "open", "differs")


def batches(rows: Sequence[Row], size: int = 1 << 17) -> list[pa.RecordBatch]:
    table = pa.Table.from_pylist([{name: row.get(name) for name in COLUMNS} for row in rows], _schema())
    return list(table.to_batches(max_chunksize=size))


def _schema() -> pa.Schema:
    return pa.schema([RESULTS.field(name) for name in COLUMNS])


def added_up(rows: Sequence[Row], size: int = 1 << 17, by: tuple[str, ...] = ("kernel",)) -> FleetOutcome:
    return outcome(iter(batches(rows, size)), by, "results")


ends = st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans())


@st.composite
def tasks(draw: st.DrawFn) -> list[list[Row]]:
    """The rows of some tasks: each of one VM, under some policies."""
    found = []
    for number in range(draw(st.integers(0, 12))):
        task = {
            "trace": f"t{number // 3}", "etag": "e", "vm": number % 3 + 1, "vm_name": f"v{number}",
            "vcpus": draw(st.integers(1, 4)),
            "host": f"h{draw(st.integers(0, 2))}", "kernel": draw(st.sampled_from(["5.15", "6.1"])), "vendor": "any",
            "preset": "mmu", "start": draw(st.sampled_from([None, 10**18, 2 * 10**18])),
            "duration_ns": draw(st.integers(0, 10**10)), "lost": draw(st.integers(0, 1)),
        }  # fmt: skip
        if draw(st.integers(0, 9)) == 0:
            found.append([{**task, "row": FAILED, "reason": draw(st.sampled_from(["cut", "odd"]))}])
            continue
        own = draw(st.sampled_from(["async", "preserve"]))
        task |= {
            "row": "vm", "recorded_policy": own, "own_policy": draw(st.sampled_from(AGREEMENTS)),
        }  # fmt: skip
        timed = draw(st.integers(0, 9)) > 0
        rows = []
        for policy in ("async", "preserve", "sync"):
            row = {**task, "policy": policy}
            for low, high, of_time in (
                ("faults_low", "faults_high", False), ("refaults_low", "refaults_high", False),
                ("stalls_low", "stalls_high", True), ("stalled_low_ns", "stalled_high_ns", True),
                ("longest_stall_low_ns", "longest_stall_high_ns", True),
            ):  # fmt: skip
                least, more, endless = draw(ends)
                scale = 10**9 if low.endswith("_ns") else 1
                if of_time and not timed:
                    continue
                row |= {low: least * scale, high: None if endless and policy != own else (least + more) * scale}
            rows += [row, {**row, "row": "vcpu", "vcpu": 0}]
        found.append(rows)
    return found


def plain(every: list[list[Row]]) -> dict[str, Any]:
    """The same by a loop: what a VM saves under a policy is what it had less what it has."""
    sums: dict[str, Any] = {
        "vms": 0,
        "hung_low": 0,
        "stalled_low_ns": 0,
        "stalled_high_ns": 0,
        "faults_low": 0,
        "vcpu_ms": 0,
    }
    policies: dict[str, dict[str, Any]] = {}
    for task in every:
        vms = [row for row in task if row["row"] == "vm"]
        for own in vms:
            if own["policy"] != own["recorded_policy"]:
                continue
            sums["vms"] += 1
            sums["vcpu_ms"] += own["duration_ns"] // 10**6 * own["vcpus"]
            sums["hung_low"] += own.get("stalls_low", 0) > 0
            sums["faults_low"] += own["faults_low"]
            for name in ("stalled_low_ns", "stalled_high_ns"):
                sums[name] += own.get(name, 0)
            for other in vms:
                if other is own or own["own_policy"] != "agrees" or "stalls_low" not in own:
                    continue
                to = policies.setdefault(
                    other["policy"],
                    {"others": 0, "gain": 0, "lose": 0, "same": 0, "saved_low_ns": 0, "saved_high_ns": 0},
                )
                to["others"] += 1
                least = None if other["stalled_high_ns"] is None else own["stalled_low_ns"] - other["stalled_high_ns"]
                most = own["stalled_high_ns"] - other["stalled_low_ns"]
                to["gain"] += least is not None and least > 0
                to["lose"] += most < 0
                to["same"] += least == most == 0
                if least is not None:
                    to["saved_low_ns"] += least
                    to["saved_high_ns"] += most
    return {**sums, "policies": policies}


@given(tasks(), st.integers(1, 40))
def test_sums_are_those_of_a_plain_loop_whatever_the_batches(every: list[list[Row]], size: int) -> None:
    found = added_up([row for task in every for row in task], size)
    expected = plain(every)
    (whole,) = found.recorded().to_dicts()
    assert {name: whole[name] for name in expected if name != "policies"} == {
        name: value for name, value in expected.items() if name != "policies"
    }
    for policy, sums in expected["policies"].items():
        (row,) = found.under(policy).to_dicts()
        assert {name: row[name] for name in sums} == sums
        assert row["undecided"] == sums["others"] - sums["gain"] - sums["lose"] - sums["same"]
    rows = [row for task in every for row in task]
    assert found.recordings == len({row["trace"] for row in rows})
    assert found.failed == sum(row["row"] == FAILED for row in rows)
    losses: dict[str, int] = {}
    for row in rows:
        losses[row["trace"]] = max(losses.get(row["trace"], 0), row["lost"])
    assert (found.lost, found.lossy) == (sum(losses.values()), sum(map(bool, losses.values())))


@given(tasks(), st.randoms(use_true_random=False))
@pytest.mark.slow
def test_the_order_of_tasks_changes_nothing(every: list[list[Row]], rng: random.Random) -> None:
    def text(order: list[list[Row]]) -> str:
        return str(renderer("json")(fleet_report(added_up([row for task in order for row in task], 7), "results")))

    shuffled = list(every)
    rng.shuffle(shuffled)
    assert text(shuffled) == text(every)


@given(tasks())
@pytest.mark.slow
def test_groups_add_up_to_the_whole(every: list[list[Row]]) -> None:
    rows = [row for task in every for row in task]
    wholes = [added_up(rows, by=by).recorded() for by in (("kernel",), ("host", "day"), ("own_policy", "preset"))]
    assert all(whole.equals(wholes[0]) for whole in wholes)


@pytest.mark.parametrize("form", fleets.FORMS)
def test_golden_reports(form: str) -> None:
    assert renderer(form)(fleets.report()) == fleets.golden(form).read_text()


def test_the_text_fits_80_columns() -> None:
    assert max(map(len, renderer("text")(fleets.report()).splitlines())) <= 80


def test_a_vm_that_does_not_agree_is_never_a_gain() -> None:
    def task(own_policy: str) -> list[Row]:
        one = {
            "row": "vm", "trace": own_policy, "etag": "", "host": "h", "kernel": "k", "vendor": "v", "preset": "mmu",
            "duration_ns": 10**9, "vm": 1, "vcpus": 1, "recorded_policy": "async", "own_policy": own_policy, "lost": 0,
        }  # fmt: skip
        zero = dict.fromkeys(["refaults_low", "refaults_high", "faults_low", "faults_high"], 0)
        stalled = {name: 10**9 for name in COLUMNS if "stall" in name}
        return [
            {**one, **zero, **stalled, "policy": "async"},
            {**one, **zero, **dict.fromkeys(stalled, 0), "policy": "preserve"},
        ]

    found = added_up([*task("open"), *task("differs")])
    report = fleet_report(found, "results")
    assert "1 VM whose replay is not what their rows show (1 would gain, 1.00 s); 1 VM" in " ".join(report.verdict)
    assert report.figures is not None
    assert report.figures.policies["preserve"]["gain"] == (0, 0)
    agreed = fleet_report(added_up([*task("open"), *task("agrees")]), "results")
    assert agreed.figures is not None
    assert agreed.figures.policies["preserve"]["gain"] == (1, 1)


def test_an_empty_set_and_one_of_failures_have_one_answer_each(tmp_path: Path) -> None:
    empty = fleet_report(added_up([]), "results")
    assert empty.verdict == ("no results: nothing is in it",)
    rows = [
        row for task in range(3) for row in [{"row": FAILED, "trace": f"t{task}", "host": "h", "reason": "cut off"}]
    ]
    failed = fleet_report(added_up(rows), "results", (parse("failed > 0"), parse("soft_hang > 0")))
    assert failed.verdict == ("no VM was replayed: 3 tasks failed",)
    assert [check.status for check in failed.checks] == [Status.FAILED, Status.PASSED]
    for report in (empty, failed):
        for form in ("text", "md", "json"):
            renderer(form)(report)


def test_a_host_that_faults_far_more_than_its_like_is_out_of_line() -> None:
    import polars as pl

    rows = [("h", "k", "v", 1, 3_600_000, 1000 + i % 3) for i in range(LEAST - 1)]
    frame = pl.DataFrame(
        [*rows, ("odd", "k", "v", 1, 3_600_000, 50_000)],
        schema=["host", "kernel", "vendor", "vms", "vcpu_ms", "faults_low"], orient="row",
    )  # fmt: skip
    assert outliers(frame)["host"].to_list() == ["odd"]
    assert outliers(frame.tail(LEAST - 1)).is_empty()  # too few to say


def test_gates() -> None:
    found = fleets.found()
    checks = fleet_report(found, "results", tuple(map(parse, ("hosts < 120", "failed > 0", "soft_hang >= 110")))).checks
    assert [check.status for check in checks] == [Status.PASSED, Status.FAILED, Status.UNDECIDED]
    for text in ("stalled_ns > 0", "preserve.failed > 0", "failed > baseline", "failed", "faults > 0"):
        with pytest.raises(Problem, match="--fail-on"):
            parse(text)


@pytest.mark.parametrize("text", ["", "kernel,", "vm", "kernel;host"])
def test_what_is_no_column_to_group_by_is_named(text: str) -> None:
    with pytest.raises(Problem, match="--by"):
        dimensions(text)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write(Fleet(hosts=6, days=2, vms=2), tmp_path / "results", hosts_a_part=3)
    return tmp_path / "results"


@pytest.mark.slow
def test_the_verb_writes_each_format_and_fails_on_a_gate(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("text", "md", "html", "json"):
        invoke(["fleet", "report", str(results), "--format", form, "-o", str(tmp_path / form)])
    assert json.loads((tmp_path / "json").read_text())["schema"] == 1
    assert "host-00005" in (tmp_path / "html").read_text()
    assert command_line.app(["fleet", "report", str(results), "--fail-on", "vms > 0"], standalone_mode=False) == 1
    assert capsys.readouterr().out.startswith("FAILED: vms > 0")


def results_of(path: Path) -> Path:
    return path.parent.parent


def damages(path: Path) -> dict[str, Any]:
    table = pq.read_table(path)
    kept = table.schema.metadata

    def column(name: str, values: Any) -> None:
        at = table.column_names.index(name)
        pq.write_table(table.set_column(at, name, values).replace_schema_metadata(kept), path)

    return {
        "cut": lambda: path.write_bytes(path.read_bytes()[:-100]),
        "no parquet": lambda: path.write_text("hello"),
        "zeros": lambda: path.write_bytes(path.read_bytes()[:4] + bytes(2000) + path.read_bytes()[2004:]),
        "another": lambda: pq.write_table(table.replace_schema_metadata({}), path),
        "no job": lambda: (results_of(path) / "job.json").unlink(),
        "another job": lambda: (results_of(path) / "job.json").write_text("[]"),
        "newer": lambda: (results_of(path) / "job.json").write_text('{"what": "results", "format": {"major": 3}}'),
        "earlier": lambda: (results_of(path) / "job.json").write_text('{"what": "results", "format": {"major": 1}}'),
        "metadata": lambda: pq.write_table(table.replace_schema_metadata({b"kvmtrace.fleet": b"[["}), path),
        "column gone": lambda: pq.write_table(table.drop(["lost"]).replace_schema_metadata(kept), path),
        "another type": lambda: column("lost", pa.array(["x"] * len(table))),
        "below zero": lambda: column("duration_ns", pa.array([-1] * len(table), pa.int64())),
        "far too much": lambda: column("faults_high", pa.array([1 << 62] * len(table), pa.int64())),
        "crossed": lambda: column("stalls_high", pa.array([-5] * len(table), pa.int64())),
        "empty": lambda: column("vm", pa.nulls(len(table), pa.int64())),
        "no agreement": lambda: column("own_policy", pa.array(["yes"] * len(table))),
        "no text": lambda: column("host", pa.array([b"\xff\xfe"] * len(table)).cast(pa.string(), safe=False)),
    }


DAMAGES = (
    "cut", "no parquet", "zeros", "another", "no job", "another job", "newer", "earlier",
    "metadata", "column gone", "another type", "below zero",
    "far too much", "crossed", "empty", "no agreement", "no text",
)  # fmt: skip


@pytest.mark.parametrize("how", thinned(3, DAMAGES))
def test_a_hostile_file_is_one_line(results: Path, how: str) -> None:
    path = sorted((results / "merged").iterdir())[1]
    damages(path)[how]()
    with pytest.raises(Problem) as raised:
        invoke(["fleet", "report", str(results)])
    assert str(results) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_parts_of_a_made_up_fleet_are_of_the_schema() -> None:
    for part in parts(Fleet(hosts=2, days=1, vms=1)):
        assert part.schema.equals(RESULTS)
