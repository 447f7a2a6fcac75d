# SPDX-License-Identifier: Apache-2.0
"""Reports of several VMs: the worst first, each with its name, and none hidden by one that cannot be answered for."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

import kvmtrace
from analysis.formats import renderer
from analysis.queries.by_vm import overview
from analysis.queries.worst import ranked
from analysis.reading.sources import Recording
from analysis.report_model.report import Check, Report, Status
from analysis.reporting import Wanted, reported
from tests.traces.making import event, stream
from traces.recording.compact import compact
from traces.recording.segment_writer import SegmentWriter

FIELD = Path(__file__).parents[1] / "recordings" / "field-6.1.parquet"


def test_a_vm_that_never_ran_hides_no_other() -> None:
    done = CliRunner().invoke(kvmtrace.app, ["export", str(FIELD), "--csv", "soft_hangs"])
    assert done.exit_code == 0
    assert done.stdout.startswith("vm,vcpu,time,")
    (note,) = done.stderr.splitlines()
    assert "VMs 1, 10, 11, and 13 more: it never entered its guest" in note


@pytest.mark.slow
def test_every_vm_is_in_the_table_with_its_process() -> None:
    recording = Recording.open(FIELD)
    rows = overview(recording).collect()
    assert sorted(rows["vm"]) == list(range(1, 27))
    assert rows["faults"].is_sorted(descending=True)
    assert rows.filter(vm=26)["process"].item() == "fieldvm 138"
    silent = rows.filter(pl.col("note") == "never entered its guest")
    assert (len(silent), silent["guest_share"].null_count()) == (16, 16)
    for row in rows.iter_rows(named=True):
        of_vm = recording.scan().filter(pl.col("vm") == row["vm"])
        for name, kind in (("exits", "kvm_exit"), ("faults", "kvm_page_fault")):
            assert row[name] == of_vm.filter(pl.col("kind") == kind).select(pl.len()).collect().item()


def test_the_guests_share_is_that_of_its_entries_and_exits() -> None:
    recording = Recording.open(FIELD)
    rows = recording.scan().filter(pl.col("vm") == 4, pl.col("kind").is_in(["kvm_entry", "kvm_exit"])).collect()
    times = rows["time"].to_list()
    guest = sum(times[1::2]) - sum(times[::2])
    first, last = recording.metadata.spans[4]
    assert overview(recording).filter(vm=4).collect()["guest_share"].item() == pytest.approx(guest / (last - first))


def test_the_worst_vm_is_the_headline_and_stands_first() -> None:
    with reported(FIELD, Wanted()) as report:
        (table,) = (each for each in report.tables if each.query == "overview")
        worst = table.frame["vm"][0]
        assert f"of VM {worst} (fieldvm {worst_pid(report, worst)})" in report.verdict[0]
        assert len(table.frame) == 26
        text = renderer("text")(report)
    assert re.search(r"\(query overview, \d+ more\)", text)
    assert max(map(len, text.splitlines())) <= 80


def worst_pid(report: Report, vm: int) -> int:
    assert report.recording is not None
    return next(int(each["pid"]) for each in report.recording.metadata.vms if each["id"] == vm)


def test_those_that_got_no_further_come_first_then_those_that_stood_still() -> None:
    names = ("vm", "vcpu", "wall_ns", "longest_stall_ns", "faults", "fault_ns", "load_ns", "unload_ns", "wait_ns",
             "switch_ns")  # fmt: skip
    rows = [
        (1, 0, 100, 0, 9, 90, 0, 0, 0, 0), (2, 0, 100, 50, 1, 1, 0, 0, 0, 0), (3, 0, None, None, 99, *[None] * 5),
        (4, 1, 100, 0, 1, 0, 0, 0, 0, 0), (5, 0, 100, 0, 9, 91, 0, 0, 0, 0),
    ]  # fmt: skip
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.Int64), orient="row")
    assert ranked(frame, {(4, 1)})["vm"].to_list() == [4, 2, 5, 1, 3]


def test_loss_stands_in_the_first_line(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path / "a.kvmt", {})
    writer.write(stream([event("kvm_entry")] * 3))
    writer.close({"loss": {"kvm_entry": {"emitted": {"0": 7}, "lost": {"0": 4}}}})
    compact(writer.directory, tmp_path / "a.parquet")
    with reported(tmp_path / "a.parquet", Wanted(replay=False)) as report:
        assert report.headline.startswith("4 of 7 events lost: ")
        for form in ("text", "md", "mail", "json"):
            assert "4 of 7 events lost" in renderer(form)(report)
    failed = Report("x", ("y",), (), (), (Check("gate", "a > 0", Status.FAILED, "a is 1"),), loss="4 of 7 events lost")
    assert failed.lines == ("FAILED: a > 0: a is 1; 4 of 7 events lost", "y")
