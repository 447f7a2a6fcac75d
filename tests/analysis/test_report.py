# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace report` and `export` as users meet them: verdict, exit codes, several files, what cannot be."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import polars as pl
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import kvmtrace
from analysis.formats import renderer
from analysis.queries.registry import queries
from analysis.reading.sources import Recording
from analysis.reporting import Wanted, reported
from replay import plan
from replay.decode.capabilities import Capabilities
from replay.result import KEY, SPENT
from replay.run import replay
from replay.timing.time_text import verdicts
from replay.timing.timed_run import Settings
from tests.analysis.sources import CORPUS, OLD_STORM, ROOT, STORM, TIMING, result_of
from tests.replay.recording import Guest, manifest
from tests.traces.making import stream, trace
from traces.command_line.durations import duration
from traces.errors import Problem
from traces.reader import Trace
from traces.summary import info
from traces.synth import Parameters, synthesize

RUNNER = CliRunner()
TIMED = (
    "clock",
    "recorded_ns",
    "wall_ns",
    "wall_low_ns",
    "wall_high_ns",
    *SPENT,
    "stalls",
    "stalled_ns",
    "longest_stall_ns",
)


def run(*arguments: object) -> Result:
    return RUNNER.invoke(kvmtrace.app, [str(argument) for argument in arguments])


def told(done: Result) -> str:
    """What was printed, in one line: text is wrapped."""
    return " ".join(done.stdout.split())


def document(*arguments: object) -> dict[str, Any]:
    done = run("report", *arguments, "--format", "json")
    assert done.exit_code in (0, 1), done.exception
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["schema"] == 1
    return found


def rewritten(path: Path, to: Path, metadata: dict[str, Any]) -> Path:
    """A result with other metadata."""
    table = pq.read_table(path).replace_schema_metadata(None)
    with pq.ParquetWriter(to, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({KEY: json.dumps(metadata).encode()})
    return to


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [STORM, OLD_STORM, TIMING / "smi-grow-loops-20-6.1.parquet", CORPUS / "wp-toggle-5.10.parquet"],
    ids=lambda path: path.stem,
)
def test_the_verdict_is_the_replays_own(path: Path) -> None:
    (vm,) = replay(plan.make(Capabilities(Trace.open(path)), []), Settings()).times
    with reported(path, Wanted()) as report:
        said = tuple(verdicts(vm, range(len(vm.recorded))))
        assert report.verdict[1 : 1 + len(said)] == said
        assert "as recorded" in report.verdict[0]


def test_a_result_reports_what_its_trace_does(tmp_path: Path) -> None:
    result = result_of(STORM, tmp_path)
    with reported(STORM, Wanted()) as one, reported(result.path, Wanted()) as two:
        assert one.verdict == two.verdict
        assert one.trust == two.trust
        for mine, theirs in zip(one.tables, two.tables, strict=True):
            assert mine.frame.equals(theirs.frame), mine.query


def test_a_result_whose_trace_is_gone_or_another_says_so(tmp_path: Path) -> None:
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(STORM.read_bytes())
    result = result_of(copy, tmp_path).path
    copy.write_bytes(OLD_STORM.read_bytes())
    with reported(result, Wanted()) as report:
        assert "another recording now" in dict(report.trust)["note"]
        assert "windows" not in [table.query for table in report.tables]
        assert "not at hand" not in dict(report.trust)["validated"]
    copy.unlink()
    with reported(result, Wanted(validate=True)) as report:
        assert "without the recording's rows" in dict(report.trust)["note"]
        assert dict(report.trust)["validated"] == "not done: the recording is not at hand"


def test_a_result_may_name_a_trace_that_no_file_can_be(tmp_path: Path) -> None:
    result = result_of(STORM, tmp_path)
    named = {**result.document, "trace": {**result.document["trace"], "path": "a\0\x1b[2Jb"}}
    odd = rewritten(result.path, tmp_path / "odd.parquet", named)
    with reported(odd, Wanted()) as report:
        note = dict(report.trust)["note"]
        assert note.startswith("without the recording's rows")
        assert note.isprintable()
    done = run("report", result.path, "--policy", "async")
    assert "--policy is for traces" in str(done.exception)


@pytest.mark.slow
def test_gates_decide_the_exit_code_and_the_first_line(tmp_path: Path) -> None:
    fine = run("report", OLD_STORM, "--fail-on", "preserve.refaults > 0")
    assert fine.exit_code == 0
    out = tmp_path / "report.md"
    failed = run("report", OLD_STORM, "--fail-on", "refaults > 0", "--format", "md", "-o", out)
    assert failed.exit_code == 1
    assert out.read_text().startswith("**FAILED: async.refaults \\> 0: refaults is 2,055 under async**")
    assert "async.refaults > 0: refaults is 2,055" in failed.stderr.splitlines()[0]
    text = run("report", STORM, "--fail-on", "async.refaults > 0")
    assert text.exit_code == 1
    assert told(text).startswith("FAILED: async.refaults > 0: refaults is 0 .. 2,055 under async: cannot be decided")
    refused = run("report", STORM, "--fail-on", "wall_ns > 5")
    assert isinstance(refused.exception, Problem)
    assert refused.exception.code == 2
    assert not refused.stdout


def test_fidelity_validates_and_holds() -> None:
    (report,) = document(STORM, "--fail-on", "fidelity < 1")["reports"]
    assert report["figures"]["whole"]["fidelity"] == 1
    assert [check["status"] for check in report["checks"] if check["name"] == "fidelity < 1"] == ["passed"]
    (report,) = document(STORM)["reports"]
    assert report["figures"]["whole"]["fidelity"] is None
    (check,) = [check for check in report["checks"] if check["name"] == "responses matched"]
    assert check["status"] == "skipped"
    assert "--validate" in check["why"]


@pytest.mark.slow
def test_a_baseline_of_another_kernel(tmp_path: Path) -> None:
    baseline = tmp_path / "old.json"
    assert run("report", STORM, "--format", "json", "-o", baseline).exit_code == 0
    worse = run("report", OLD_STORM, "--baseline", baseline, "--fail-on", "roots_created > baseline")
    assert worse.exit_code == 1
    assert told(worse).startswith(
        "FAILED: async.roots_created > baseline: roots_created is 9 under async; the baseline's 2"
    )
    same = run("report", STORM, "--baseline", baseline, "--fail-on", "roots_created > baseline")
    assert same.exit_code == 0


@pytest.mark.slow
def test_several_files_in_each_format() -> None:
    assert [one["title"] for one in document(STORM, OLD_STORM)["reports"]] == [str(STORM), str(OLD_STORM)]
    text = run("report", STORM, OLD_STORM, "--no-replay").stdout
    assert text.index(str(STORM)) < text.index(str(OLD_STORM))
    suites = Xml.fromstring(run("report", STORM, OLD_STORM, "--format", "junit").stdout)
    assert [suite.attrib["name"] for suite in suites] == [str(STORM), str(OLD_STORM)]


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        # Four passes of five find nothing of what was mapped.
        ("smi-storm-6.1-async", "79.9 % of the recorded faults of VM 1 (kvmtrace-vmm 172) mapped again what had"),
        ("smi-storm-6.1-async", " what had gone with its root (SMI, kvmtrace-vmm 174)"),
        ("cr4-toggle-6.1-async", "mapped again what had gone with its root (CR4 write, "),
        ("notifier-6.1", "kvmtrace-vmm 133) mapped again what had gone (notifier: unmap, kvmtrace-vmm 133)"),
        ("ksm-6.1", "mapped again what had gone (notifier: unmap, ksmd "),
        ("slot-delete-6.12", "80.0 % of the recorded faults"),
        ("dirty-log-how-clear-6.1", "repaired a permission that had gone (KVM_CLEAR_DIRTY_LOG, "),
        ("smi-storm-6.1", ""),
        ("steady-6.1", ""),
        ("smi-storm-5.10", "with its root (SMI, "),
    ],
)
@pytest.mark.parametrize("replayed", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_verdict_names_what_made_most_faults(scenario: str, said: str, replayed: bool) -> None:
    """Also where no soft-hang, whose cause would be named, came of it."""
    with reported(CORPUS / f"{scenario}.parquet", Wanted(replay=replayed)) as report:
        found = [line for line in report.verdict if "of the recorded faults of" in line]
    assert len(found) == bool(said)
    assert said in "".join(found)


def test_without_a_replay_only_what_was_recorded(tmp_path: Path) -> None:
    (report,) = document(OLD_STORM, "--no-replay")["reports"]
    assert report["figures"]["policies"] == {}
    took = duration(info(OLD_STORM)["duration"])
    assert report["verdict"] == [
        f"VM 1 (kvmtrace-vmm 172) in {took}: 9 roots seen, 2,581 exits, 2,569 faults, 9 root loads",
        "79.9 % of the recorded faults of VM 1 (kvmtrace-vmm 172) mapped again what had gone with its root"
        " (SMI, kvmtrace-vmm 174)",
    ]
    assert {table["query"] for table in report["tables"]} <= {
        "refaults",
        "removals",
        "exits",
        "user_exits",
        "ioctls",
        "rips",
        "changes",
        "windows",
        "roles",
        "gfns",
        "regions",
        "unserved",
        "stuck",
    }
    done = run("report", OLD_STORM, "--no-replay", "--fail-on", "refaults > 0")
    assert "nothing was replayed" in str(done.exception)


def test_a_recording_that_cannot_be_replayed_is_reported_all_the_same(tmp_path: Path) -> None:
    guest = Guest()
    guest.slot(0, 16, 1 << 40)
    guest.load()
    guest.fault(3)
    trace(tmp_path / "t.parquet", stream(guest.rows), manifest(kernel="5.4.1"))
    with reported(tmp_path / "t.parquet", Wanted()) as report:
        notes = [text for name, text in report.trust if name == "note"]
        assert notes[0].startswith("not replayed: ")
        assert "gfns" in [table.query for table in report.tables]
    with pytest.raises(Problem), reported(tmp_path / "t.parquet", Wanted(policies=("async",))):
        pass


def test_a_broken_promise_fails(tmp_path: Path) -> None:
    result = result_of(STORM, tmp_path)
    broken = "VM 1, preserve: 7 role words where 6 are promised: 0x1"
    rewritten(result.path, tmp_path / "b.parquet", {**result.document, "broken": [broken]})
    done = run("report", tmp_path / "b.parquet", "--format", "junit")
    assert done.exit_code == 1
    cases = Xml.fromstring(done.stdout).iter("testcase")
    failures = [case.attrib["name"] for case in cases if case.find("failure") is not None]
    assert failures == ["at most 6 role words under preserve"]
    assert told(run("report", tmp_path / "b.parquet")).startswith(
        "FAILED: at most 6 role words under preserve: VM 1, preserve: 7"
    )
    assert run("report", tmp_path / "b.parquet", "--fail-on", "broken > 0").exit_code == 1


@pytest.mark.slow
def test_many_vms_stay_on_a_screen(tmp_path: Path) -> None:
    path = tmp_path / "many.parquet"
    synthesize(path, Parameters(policy="async", vms=12, vcpus=2, smi_rate=200.0, working_set=64, duration=0.05))
    with reported(path, Wanted()) as report:
        text, mail = renderer("text")(report), renderer("mail")(report)
    assert text.count("\n") <= 60
    assert "(query overview, 4 more)" in text
    assert max(map(len, mail.splitlines())) <= 72
    assert "of VM" in report.verdict[0]


@pytest.mark.slow
def test_export_gives_all_rows_of_a_query(tmp_path: Path) -> None:
    windows = run("export", OLD_STORM, "--csv", "windows", "-o", tmp_path / "w.csv")
    assert windows.exit_code == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "w.csv").read_text())))
    frame = queries()["windows"](Recording.open(OLD_STORM)).collect()
    assert [int(row["faults"]) for row in rows] == frame["faults"].to_list()
    result = result_of(STORM, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "kvmtrace", "export", str(result.path), "--csv", "causes"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert pl.read_csv(io.StringIO(done.stdout))["freed_high"].sum() == 11
    assert not done.stderr


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_an_export_quietly() -> None:
    command = [sys.executable, "-m", "kvmtrace", "export", str(CORPUS / "churn-6.1.parquet"), "--csv", "gfns"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as export:
        assert export.stdout is not None
        assert export.stderr is not None
        export.stdout.close()
        assert export.stderr.read() == ""
        assert export.wait(60) == 0


def test_export_lists_what_a_file_can_answer() -> None:
    listed = run("export", OLD_STORM, "--list").stdout
    assert "windows" in listed
    assert "policies" not in listed
    for arguments in ((), ("--list", "--csv", "windows")):
        done = run("export", OLD_STORM, *arguments)
        assert isinstance(done.exception, Problem)
    assert "no such query" in str(run("export", OLD_STORM, "--csv", "x").exception)
    assert "for results" in str(run("export", OLD_STORM, "--csv", "policies").exception)


@pytest.mark.parametrize("verb", ["report", "diff", "export"])
def test_every_verb_shows_an_example(verb: str) -> None:
    done = run(verb, "--help")
    assert f"kvmtrace {verb}" in done.stdout.split("Example")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("report", "/nonexistent.parquet"), "/nonexistent.parquet"),
        (("report", "/etc/passwd"), "neither a trace nor the result of a replay"),
        (("report", STORM, "--format", "pdf"), "--format pdf: give text"),
        (("report", STORM, "-o", "/nowhere/x"), "cannot be written"),
        (("diff", STORM, "/etc/passwd"), "neither a trace nor the result of a replay"),
        (("diff", STORM, OLD_STORM, "--format", "junit"), "always be green"),
        (("export", STORM, "--csv", "windows", "-o", "/nowhere/x"), "cannot be written"),
        (("report", STORM, "--fail-on", "refaults > baseline"), "give the --baseline"),
        (("report", STORM, "--fail-on", "sync.refaults > 0"), "no policy sync; there are preserve, async"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(arguments: tuple[object, ...], said: str) -> None:
    done = run(*arguments)
    assert isinstance(done.exception, Problem), done.exception
    assert said in str(done.exception)
    assert str(done.exception).isprintable()


def test_a_pipe_is_refused_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in str(run("report", tmp_path / "pipe").exception)


def test_a_result_without_times_has_counts_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "untimed.parquet"
    assert run("replay", STORM, "--no-time", "-o", path).exit_code == 0
    with reported(path, Wanted()) as report:
        assert report.verdict == (
            "preserve (as recorded): 2 roots built, 514 faults, 0 re-faults; "
            "async: 9 roots built, 514 .. 2,569 faults, 0 .. 2,055 re-faults",
        )
        assert dict(report.trust)["costs"] == "none: this result has no times"
        assert "stalls" not in [table.query for table in report.tables]
        assert report.tables[0].texts()[0][2] == "-"


def test_a_result_of_format_1_0_reads_as_one_without_times(tmp_path: Path) -> None:
    result = result_of(STORM, tmp_path)
    table = pq.read_table(result.path).replace_schema_metadata(None)
    old = table.select([name for name in table.column_names if name not in TIMED])
    metadata = {**result.document, "format": {"major": 1, "minor": 0}}
    with pq.ParquetWriter(tmp_path / "old.parquet", old.schema) as writer:
        writer.write_table(old)
        writer.add_key_value_metadata({KEY: json.dumps(metadata).encode()})
    with reported(tmp_path / "old.parquet", Wanted()) as report:
        assert report.verdict[0].startswith("preserve (as recorded): 2 roots built")
        (policies,) = [table for table in report.tables if table.query == "policies"]
        assert policies.values()[1]["faults"] == [514, 2569]
        assert policies.values()[1]["wall_ns"] is None
    newer = rewritten(result.path, tmp_path / "new.parquet", {**result.document, "format": {"major": 2, "minor": 0}})
    assert "upgrade kvmtrace" in str(run("report", newer).exception)
