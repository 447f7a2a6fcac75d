# SPDX-License-Identifier: Apache-2.0
"""Which task of a guest paid for its faults: a host's recording combined with one that was made inside the guest.

The pairs are made by hand: the host's is text of ftrace on its clock; the guest's has sched_switch on a clock that is
100 s behind. vCPU 0 faults while `sh` runs, then while `make` does; vCPU 1 while `idle` and `make` do.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.traces.binary_files import option, recorded, with_options
from tests.traces.test_simultaneous import DIRECTORY
from tests.verbs import invoke
from traces.errors import BAD_INPUT, Problem
from traces.reader import Trace

# vCPU, seconds of its exit, and for how long (us) the fault kept it out of the guest.
FAULTS = ((0, 105.0, 10), (1, 105.1, 30), (0, 106.0, 20), (0, 107.5, 40), (1, 107.6, 50))
SWITCHES = (  # guest CPU, seconds on the guest's clock, from, to
    (0, 4.0, ("swapper/0", 0), ("sh", 41)),
    (0, 7.0, ("sh", 41), ("make", 42)),
    (1, 7.2, ("swapper/1", 0), ("make", 43)),
)
OFFSET = 100


def host(path: Path) -> Path:
    lines = []
    for vcpu, seconds, us in FAULTS:
        task = f"CPU {vcpu}/KVM-{7 + vcpu} [00{vcpu}]"
        lines += [
            (seconds - 1e-3, f"{task} {seconds - 1e-3:.6f}: kvm_entry: vcpu {vcpu}, rip 0x1"),
            (seconds, f"{task} {seconds:.6f}: kvm_exit: reason EPT_VIOLATION rip 0x1 info 6 0"),
            (seconds, f"{task} {seconds:.6f}: kvm_page_fault: address {0x1000 * us:x} error_code 6"),
            (seconds + us / 1e6, f"{task} {seconds + us / 1e6:.6f}: kvm_entry: vcpu {vcpu}, rip 0x1"),
        ]
    text, out = path / "host.txt", path / "host.parquet"
    text.write_text("".join(f"{line}\n" for _, line in sorted(lines, key=lambda line: line[0])))
    invoke(["import", str(text), "-o", str(out), "--kernel", "6.1.20", "--force"])
    return out


def guest(path: Path, plugin: bool = False) -> Path:
    def event(before: tuple[str, int], after: tuple[str, int]) -> str:
        if plugin:  # trace-cmd's own way
            return f"{before[0]}:{before[1]} [120] S ==> {after[0]}:{after[1]} [120]"
        return (
            f"prev_comm={before[0]} prev_pid={before[1]} prev_prio=120 prev_state=S ==> "
            f"next_comm={after[0]} next_pid={after[1]} next_prio=120"
        )

    file = path / "guest.txt"
    file.write_text("".join(
        f"{before[0]}-{before[1]} [00{cpu}] d..2. {seconds:.6f}: sched_switch: {event(before, after)}\n"
        for cpu, seconds, before, after in SWITCHES
    ))  # fmt: skip
    return file


def csv(of: Path, *more: str) -> list[dict[str, Any]]:
    out = of.with_suffix(".csv")
    invoke(["export", str(of), "--csv", "guest_tasks", "-o", str(out), "--force", *more])
    return pl.read_csv(out).to_dicts()


@pytest.mark.parametrize("plugin", [False, True])
def test_faults_are_of_the_task_that_ran(plugin: bool, tmp_path: Path) -> None:
    rows = csv(host(tmp_path), "--guest", str(guest(tmp_path, plugin)), "--guest-offset", str(OFFSET))
    found = {(row["task"], row["pid"]): (row["faults"], row["fault_ns"], row["vcpus"]) for row in rows}
    assert found == {
        ("make", 43): (1, 50_000, 1),
        ("make", 42): (1, 40_000, 1),
        ("sh", 41): (2, 30_000, 1),
        ("swapper/1", 0): (1, 30_000, 1),  # before the first switch of that CPU: who left then
    }
    assert [row["fault_ns"] for row in rows] == sorted((row["fault_ns"] for row in rows), reverse=True)
    assert sum(row["share"] for row in rows) == pytest.approx(1)


def test_the_report_says_whose_time_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = host(tmp_path)
    capsys.readouterr()
    asked = ["report", str(of), "--no-replay", "--guest", f"1={guest(tmp_path)}", "--guest-offset", f"+{OFFSET}.0"]
    invoke([*asked, "--format", "json"])
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    (table,) = [table for table in report["tables"] if table["query"] == "guest_tasks"]
    assert [row["task"] for row in table["rows"]] == ["make", "make", "sh", "swapper/1"]
    invoke(asked)
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "by 3 rows of sched_switch; its times are moved by +100.000000000 s as given; its CPU 0 is taken for vCPU 0"
        in text
    )


def test_without_a_guest_there_is_no_such_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = host(tmp_path)
    capsys.readouterr()
    invoke(["report", str(of), "--no-replay"])
    assert "guest_tasks" not in capsys.readouterr().out
    with pytest.raises(Problem, match="--guest FILE"):
        csv(of)


def test_trace_cmd_s_guest_files_have_their_offsets(tmp_path: Path) -> None:
    """One of its files with the option that says how much the two clocks differ: here 7 s, each CPU with one sample.

    It has no sched_switch: then the tasks are those whose events these are.
    """
    host, inside = DIRECTORY / "smi-storm-6.1.parquet", tmp_path / "guest.dat"
    shift = struct.pack("<QII", 1, 0, 2) + struct.pack("<IQqQ", 1, 0, 7 * 10**9, 1) * 2
    inside.write_bytes(with_options(recorded("smi-storm-6.1.dat"), option(12, shift)))
    with pytest.raises(Problem, match="no time in common"):  # they are of one clock in truth
        invoke(["export", str(host), "--csv", "guest_tasks", "-o", str(tmp_path / "out"), "--guest", str(inside)])
    out = tmp_path / "out.csv"
    options = ["--guest", str(inside), "--guest-offset", "-7"]
    invoke(["export", str(host), "--csv", "guest_tasks", "-o", str(out), *options])
    rows = pl.read_csv(out).to_dicts()
    assert [row["task"] for row in rows] == ["kvmtrace-vmm"]
    assert rows[0]["faults"] == Trace.open(host).metadata.kinds["kvm_page_fault"]


def test_a_clock_that_is_not_known_is_no_clock(tmp_path: Path) -> None:
    of, inside = host(tmp_path), guest(tmp_path)
    wrong = {
        "--guest-offset, the seconds": ["--guest", str(inside)],
        "no time in common": ["--guest", str(inside), "--guest-offset", "5000"],
        "give seconds": ["--guest", str(inside), "--guest-offset", "soon"],
        "there is no guest": ["--guest-offset", "5"],
        "no VM 9": ["--guest", f"9={inside}", "--guest-offset", "100"],
        "No such file": ["--guest", str(tmp_path / "none"), "--guest-offset", "100"],
    }
    for why, options in wrong.items():
        with pytest.raises(Problem, match=why) as caught:
            invoke(["report", str(of), "--no-replay", *options])
        assert caught.value.code == BAD_INPUT


def test_perfetto_has_the_guest_s_tasks_beneath_their_vcpus(tmp_path: Path) -> None:
    out = tmp_path / "out.pftrace"
    invoke(["export", str(host(tmp_path)), "--perfetto", "-o", str(out), "--guest", str(guest(tmp_path)),
            "--guest-offset", str(OFFSET)])  # fmt: skip
    data = out.read_bytes()
    assert b"vCPU 1 guest tasks" in data
    assert b"make" in data
    assert b"swapper" not in data
