# SPDX-License-Identifier: Apache-2.0
"""Two sets of a fleet's results compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given

from analysis.fleet.fleet_diff import FleetSide, compare, side
from analysis.fleet.judged import COLUMNS
from analysis.formats import renderer
from analysis.report_model.report import Report
from benchmarks.fleet_rows import Fleet, parts, write
from tests.analysis.test_fleet_report import Row, batches, tasks
from tests.verbs import invoke
from traces.errors import Problem

OLD = Fleet(hosts=30, days=2, vms=2)


def of(fleet: Fleet, where: str = "old") -> FleetSide:
    tables = (part.select(list(COLUMNS)) for part in parts(fleet))
    return side((batch for table in tables for batch in table.to_batches()), ("kernel",), where)


def table(report: Report, name: str) -> list[dict[str, object]]:
    return next((each.values() for each in report.tables if each.query == name), [])


def test_a_set_and_itself_have_no_difference() -> None:
    report = compare(of(OLD), of(OLD))
    assert not table(report, "vms")
    assert not table(report, "agreement")
    assert not table(report, "only_old")
    assert all(row["change"] == 0 for row in table(report, "groups"))


def test_what_only_one_has_is_named() -> None:
    report = compare(of(OLD), of(replace(OLD, days=3), "new"))
    assert "60 recordings in both, 0 only in the first, 30 only in the second" in report.verdict[1]
    assert len(table(report, "only_new")) == 20
    assert not table(report, "vms")
    backwards = compare(of(replace(OLD, days=3), "new"), of(OLD))
    assert "30 only in the first, 0 only in the second" in backwards.verdict[1]


def changed(every: list[list[Row]]) -> tuple[list[list[Row]], int]:
    """The same with one more fault in every second task's rows, and how many rows of VMs that are."""
    found, count = [], 0
    for number, task in enumerate(every):
        rows = [dict(row) for row in task]
        for row in rows if number % 2 else []:
            if row["row"] == "vm":
                row["faults_low"] += 1
                row["faults_high"] = None if row["faults_high"] is None else row["faults_high"] + 1
                count += 1
        found.append(rows)
    return found, count


@given(tasks())
@pytest.mark.slow
def test_each_vm_that_came_out_otherwise_is_counted(every: list[list[Row]]) -> None:
    other, count = changed(every)
    old, new = (
        side(iter(batches([row for task in rows for row in task])), ("kernel",), where)
        for rows, where in ((every, "old"), (other, "new"))
    )
    report = compare(old, new)
    replays = sum(row["row"] == "vm" for task in every for row in task)
    if replays:
        many = f"{replays:,} replay{'' if replays == 1 else 's'}"
        assert f"of {many} in both {count:,} came out otherwise" in report.verdict[2]
    for form in ("text", "md", "json"):
        renderer(form)(report)


def test_an_object_that_was_replaced_is_told_of() -> None:
    def replaced() -> FleetSide:
        tables = [part.select(list(COLUMNS)) for part in parts(OLD)]
        at = list(COLUMNS).index("etag")
        odd = [each.set_column(at, "etag", pa.array(["other"] * len(each))) for each in tables]
        return side((batch for each in odd for batch in each.to_batches()), ("kernel",), "new")

    assert dict(compare(of(OLD), replaced()).trust)["replaced"].startswith("60 recordings")
    assert "replaced" not in dict(compare(of(OLD), of(OLD)).trust)


def test_a_set_in_which_all_failed() -> None:
    rows = [{"row": "failed", "trace": "t", "host": "h", "reason": "cut off"}]
    failed = side(iter(batches(rows)), ("kernel",), "new")
    assert compare(of(OLD), failed).verdict == ("new: no VM was replayed, 1 task failed",)


@pytest.mark.slow
def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(OLD, tmp_path / "old")
    write(replace(OLD, seed=2), tmp_path / "new")
    line = ["fleet", "diff", str(tmp_path / "old"), str(tmp_path / "new")]
    invoke(line)
    out = capsys.readouterr().out
    assert out.startswith("soft-hangs as recorded")
    assert max(map(len, out.splitlines())) <= 80
    invoke([*line, "--format", "json", "-o", str(tmp_path / "diff.json")])
    assert json.loads((tmp_path / "diff.json").read_text())["schema"] == 1
    before = sorted((tmp_path / "old").rglob("*"))
    for name in ("x.txt", "job.json", "merged/part-00000.parquet"):
        with pytest.raises(Problem, match="is in what is read"):
            invoke([*line, "-o", str(tmp_path / "old" / name), "--force"])
    assert sorted((tmp_path / "old").rglob("*")) == before
