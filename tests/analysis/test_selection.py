# SPDX-License-Identifier: Apache-2.0
"""Only some VMs, vCPUs or a window of time: the same rows as of the whole, counted where they are asked for."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner, Result

import kvmtrace
from analysis.queries import exit_times as exits
from analysis.queries import mapped_pages, recorded
from analysis.queries.by_vm import overview
from analysis.reading.result_source import Result as Replayed
from analysis.reading.sources import Recording
from analysis.reading.unseen import lost_windows
from analysis.reporting import Wanted, reported
from tests.analysis.sources import CORPUS, result_of
from tests.replay.test_apart import MS, TimedGuest
from traces.errors import Problem
from traces.reader import Trace
from traces.selection import Selection

pytestmark = pytest.mark.slow

FIELD = Path(__file__).parents[1] / "recordings" / "field-6.1.parquet"
SMP = CORPUS / "smi-both-6.1.parquet"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(kvmtrace.app, [str(argument) for argument in arguments])


def rows(path: Path) -> pl.DataFrame:
    return Recording.open(path).scan().collect()


def test_a_vm_is_what_the_whole_says_of_it() -> None:
    whole, only = Recording.open(FIELD), Recording.open(FIELD, selection=Selection(vms=(4,)))
    assert [vm["id"] for vm in only.metadata.vms] == [4]
    mine = rows(FIELD).filter(vm=4)
    assert only.metadata.events == len(mine)
    assert only.metadata.kinds == dict(mine["kind"].cast(pl.String).value_counts().rows())
    for query in (
        recorded.windows,
        mapped_pages.gfns,
        mapped_pages.unserved,
        exits.exits,
        exits.user_exits,
        exits.rips,
    ):
        one, other = query(whole).filter(pl.col("vm") == 4).collect(), query(only).collect()
        if query is recorded.windows:  # which begin with the first row that counts
            one, other = (each.select(pl.col("exits", "faults").sum()) for each in (one, other))
        assert one.equals(other), query.name


def test_a_window_counts_what_is_in_it() -> None:
    first, last = Trace.open(FIELD).metadata.span
    seconds = (last - first) / 1e9
    since, until = first + round(0.3 * seconds * 1e9), first + round(0.6 * seconds * 1e9)
    selection = Selection(since=f"{(since - first)}ns", until=f"{until - first}ns")
    recording = Recording.open(FIELD, selection=selection)
    inside = rows(FIELD).filter(pl.col("time") >= since, pl.col("time") < until)
    counted = recorded.windows(recording).collect()
    on_vcpu = inside.filter(pl.col("vcpu").is_not_null())
    assert counted["faults"].sum() == len(on_vcpu.filter(kind="kvm_page_fault"))
    assert counted["exits"].sum() == len(on_vcpu.filter(kind="kvm_exit"))
    assert exits.exits(recording).collect()["exits"].sum() == len(on_vcpu.filter(kind="kvm_exit"))
    assert mapped_pages.gfns(recording).collect()["installs"].sum() == len(inside.filter(kind="kvm_mmu_set_spte"))
    assert recording.scan().collect().height == len(inside)


def test_a_vcpu_is_its_own_rows() -> None:
    recording = Recording.open(SMP, selection=Selection(vcpus=(1,)))
    mine = rows(SMP).filter(vcpu=1)
    assert exits.exits(recording).collect()["exits"].sum() == len(mine.filter(kind="kvm_exit"))
    assert set(recorded.windows(recording).collect()["vcpu"]) == {1}
    calls = exits.ioctls(recording).collect()
    assert calls["calls"].sum() == len(mine.filter(kind="ioctl"))
    assert calls["longest_ns"].null_count() == 0
    with reported(SMP, Wanted(selection=Selection(vcpus=(1,)))) as report:
        assert "vCPU 1" in report.verdict[0]
        assert "policies and roots are of all its vCPUs" in dict(report.trust)["note"]


def test_a_replay_up_to_a_moment_is_that_of_the_rows_before_it() -> None:
    done = run("replay", FIELD, "--vm", 4, "--to", "13s", "--no-time", "--json")
    assert done.exit_code == 0, done.exception
    first, _ = Trace.open(FIELD).metadata.span
    mine = rows(FIELD).filter(pl.col("vm") == 4, pl.col("time") < first + 13 * 10**9)
    assert f'"faults": {len(mine.filter(kind="kvm_mmu_spte_requested"))}' in done.stdout
    assert '"vm": 4' in done.stdout
    assert '"vm": 25' not in done.stdout


def test_a_window_that_begins_later_is_not_replayed_and_says_so() -> None:
    with reported(FIELD, Wanted(selection=Selection(vms=(4,), since="12s"))) as report:
        notes = [text for name, text in report.trust if name == "note"]
        assert any(note.startswith("not replayed: of a window that begins later") for note in notes)
        assert any("only of VM 4, from 12s" in note for note in notes)
        assert report.verdict[-1].startswith("VM 4 (fieldvm 110) in ")
    with (
        pytest.raises(Problem, match="give no --policy"),
        reported(FIELD, Wanted(policies=("async",), selection=Selection(since="1s"))),
    ):
        pass


def test_row_groups_of_others_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace.open(FIELD)
    read: list[int] = []
    decode = Trace._decode
    monkeypatch.setattr(
        Trace, "_decode", lambda self, index, *rest: (read.append(index), decode(self, index, *rest))[1]
    )
    chosen = trace.selected([4])
    assert {trace.metadata.row_groups[index].vm for index in read} == {4}
    read.clear()
    _, last = trace.metadata.span
    assert not list(chosen.batches(["time"], since=last + 1))
    late = trace.metadata.spans[26][0]
    list(trace.selected(until=late).batches(["time"]))
    assert 26 not in {trace.metadata.row_groups[index].vm for index in read}


def test_a_window_that_begins_midway_stands_on_what_came_before() -> None:
    """VM 4 is stuck from 12 s on, and VM 26 begins at 31 s: of a window each VM that has ended is left out."""
    with reported(FIELD, Wanted(selection=Selection(vms=(4,), since="12.5s"))) as report:
        assert report.verdict[0].startswith("vCPU 0 of VM 4 (fieldvm 110) is stuck in the recording: 288 exits")
        facts = dict(report.trust)
        first, _ = Trace.open(FIELD).metadata.span
        inside = rows(FIELD).filter(pl.col("vm") == 4, pl.col("time") >= first + 12_500_000_000)
        assert facts["events"].startswith(f"{len(inside):,} of these ")
        assert "01:12:00.799 to 01:12:02.180 UTC, 1.38 s" in facts["recorded"]
    with reported(FIELD, Wanted(selection=Selection(vms=(4, 26), since="32s"))) as report:
        assert report.verdict[0].startswith("vCPU 0 of VM 26 (fieldvm 138) ends in KVM_RUN failing with EFAULT")
        assert not [table for table in report.tables if "vm" in table.frame.columns and 4 in table.frame["vm"]]


def test_who_is_in_the_guest_when_a_window_begins_is_not_said_never_to_have_entered(tmp_path: Path) -> None:
    guest = TimedGuest()
    guest.load()
    for _ in range(20):
        guest.wait(50 * MS)
        guest.fault(16)
    guest.wait(50 * MS)
    guest.exit(0x60)
    recording = Recording.open(guest.saved(tmp_path / "in.parquet"), selection=Selection(since="1010ms"))
    (vm,) = overview(recording).collect().to_dicts()
    assert vm["note"] == ""
    assert (vm["exits"], vm["entries"]) == (1, 0)
    whole = Recording.open(tmp_path / "in.parquet")
    assert vm["guest_share"] == pytest.approx(overview(whole).collect()["guest_share"].item(), abs=0.02)


def test_losses_are_those_of_the_windows_that_they_were_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that begins later numbers its parts from there, and so are losses."""
    whole = Recording.open(FIELD)
    first, _ = whole.metadata.span
    gap = {"since": first + 12_500_000_000, "until": first + 12_550_000_000, "kinds": ["kvm_exit"], "lost": 3, "cpu": 0}
    lossy = replace(whole.metadata, gaps=(gap,), gap_count=1, loss={"kvm_exit": {"lost": {"0": 3}}})
    for since, expected in (("0s", [125]), ("12s", [5])):
        recording = Recording.open(FIELD, selection=Selection(since=since))
        monkeypatch.setattr(recording.trace, "metadata", replace(recording.metadata, **{
            name: getattr(lossy, name) for name in ("gaps", "gap_count", "loss")
        }))  # fmt: skip
        assert lost_windows(recording, "kvm_exit", recorded.WINDOW_NS).tolist() == expected


def test_validate_compares_from_a_moment_on() -> None:
    """The state at that moment is that of the rows before it."""
    whole = json.loads(run("validate", FIELD, "--vm", 26, "--json").stdout)
    part = json.loads(run("validate", FIELD, "--vm", 26, "--from", "33s", "--json").stdout)
    assert part["holds"]
    assert not part["complete"]
    assert 0 < part["responses"] < whole["responses"]
    first, _ = Trace.open(FIELD).metadata.span
    inside = rows(FIELD).filter(pl.col("vm") == 26, pl.col("time") >= first + 33 * 10**9)
    of_kind = dict(inside["kind"].cast(pl.String).value_counts().rows())
    assert part["kinds"]["kvm_mmu_set_spte"]["matched"] == of_kind["kvm_mmu_set_spte"]
    done = run("validate", FIELD, "--vm", 26, "--from", "33s")
    assert "rows before --from are not compared" in done.stdout
    with reported(FIELD, Wanted(replay=False, validate=True, selection=Selection(vms=(26,), since="33s"))) as report:
        assert dict(report.trust)["validated"].startswith(f"100 %: {part['responses']} of {part['responses']}")


def test_validate_names_each_vm_that_differs_or_cannot_be_answered_for(tmp_path: Path) -> None:
    done = run("validate", FIELD, "--to", "13s")
    assert done.exit_code == 0
    said = " ".join(done.stdout.split())
    assert "VM 4 (fieldvm 110): the VM was not destroyed in the recording" in said
    done = run("validate", FIELD, "--policy", "async")
    assert done.exit_code == 1
    assert re.search(r"VM \d+ \(fieldvm \d+\), first divergence at row", " ".join(done.stdout.split()))


def test_diff_of_one_vm(tmp_path: Path) -> None:
    """Of a host before and after: each VM by its own id."""
    old = CORPUS / "two-vms-6.1-async.parquet"
    new = CORPUS / "two-vms-6.1.parquet"
    document = json.loads(run("diff", new, old, "--vm", "1=2", "--format", "json").stdout)
    (report,) = document["reports"]
    facts = [(each["name"], each["text"]) for each in report["trust"]]
    assert ("matched", "VM 1 (kvmtrace-vmm 179) with VM 2 (kvmtrace-vmm 180)") in facts
    faults = next(row for table in report["tables"] if table["query"] == "policies" for row in table["rows"]
                  if row["what"] == "faults")  # fmt: skip
    counted = [len(rows(path).filter(vm=vm, kind="kvm_mmu_spte_requested")) for path, vm in ((new, 1), (old, 2))]
    assert [faults["base"], faults["new"]] == counted
    done = run("diff", SMP, SMP, "--policy", "preserve", "--policy", "async", "--vcpu", 1)
    assert done.exit_code == 0
    assert done.stdout.startswith("vCPU 1 of VM 1")
    assert "policies and roots are of all its vCPUs" in " ".join(done.stdout.split())
    for wrong, said in (("1=2=3", "or two, such as 4=2"), ("9", "no VM 9 in it"), ("0", "give a VM's id")):
        done = run("diff", new, old, "--vm", wrong)
        assert isinstance(done.exception, Problem)
        assert said in str(done.exception)


def test_diff_up_to_a_moment() -> None:
    done = run("diff", FIELD, FIELD, "--vm", 4, "--to", "13s", "--format", "json")
    assert "no difference" in json.loads(done.stdout)["reports"][0]["headline"]
    done = run("diff", FIELD, FIELD, "--to", "13s")
    assert "only of to 13s" not in done.stdout


def test_export_takes_them_all() -> None:
    done = run("export", FIELD, "--csv", "windows", "--vm", 4, "--vm", 25, "--from", "01:12:00")
    assert done.exit_code == 0, done.exception
    assert {row["vm"] for row in csv.DictReader(io.StringIO(done.stdout))} == {"4", "25"}


def test_a_result_has_its_vms(tmp_path: Path) -> None:
    path = result_of(FIELD, tmp_path).path
    only = Replayed.open(path).selected((4,))
    assert set(only.scan().collect()["vm"]) == {4}
    with reported(path, Wanted(selection=Selection(vms=(4,)))) as report:
        assert report.verdict[0].startswith("vCPU 0 of VM 4 ")
    done = run("report", path, "--from", "1s")
    assert "--from and --to are for traces" in str(done.exception)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--vm", 99), "no VM 99 in it; there are 1, 2, 3, and 23 more"),
        (("--vcpu", 7), "no vCPU 7 in it; there are 0"),
        (("--vm", 4, "--vcpu", 7), "no vCPU 7 of VM 4 in it; there are 0"),
        (("--vm", 4, "--to", "1s"), "what is selected has its first row 11.923915 s after the recording's begin"),
        (("--vm", 4, "--from", "20s"), "--from 20s: the last row of what is selected is 13.881354 s after"),
        (("--from", "1h"), "the recording ends 34"),
        (("--to", "0"), "nothing of the recording is before it"),
        (("--from", "2s", "--to", "1s"), "nothing of the recording is before it"),
        (("--from", "then"), "give a time since"),
    ],
)
def test_what_is_not_there_is_one_line(options: tuple[object, ...], said: str) -> None:
    for verb in (("report", FIELD, "--no-replay"), ("export", FIELD, "--csv", "windows")):
        done = run(*verb, *options)
        assert isinstance(done.exception, Problem)
        assert said in str(done.exception)
        assert done.exception.code == 2
