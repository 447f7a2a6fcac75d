# SPDX-License-Identifier: Apache-2.0
"""The VMM: what it prints, how it fails, and that a run is repeatable. Its MMU events are the recorder's tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tracer import vmm
from tracer.lab.cli import app
from traces.errors import ENVIRONMENT, Problem

NO_KVM = "no usable /dev/kvm: the VMM has nothing to run a guest with"


def needs_kvm(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.kvm(pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason=NO_KVM)(test))


# Run on any KVM, a software one without SMM included, and what their result must say.
WITHOUT_SMM = {
    "wp-toggle": {"passes": 5, "io_exits": 5},
    "efer-toggle": {"passes": 5, "io_exits": 5},
    "slot-delete": {"passes": 5, "io_exits": 5},
    "slot-move": {"passes": 5, "io_exits": 5},
    "slot-create": {"passes": 5, "io_exits": 5},
    "notifier": {"passes": 5, "host_calls": 8},
    "dirty-log": {"passes": 7, "dirty_pages": 4 * 256},
    "mmio-poll": {"passes": 400, "io_exits": 0, "mmio_exits": 400},
    "bar": {"passes": 20, "io_exits": 20, "mmio_exits": 20},
    "flash": {"passes": 20, "io_exits": 20, "mmio_exits": 20 * 16},
    "triple-fault": {"passes": 10, "io_exits": 0, "shutdowns": 10},
    "lost-idt": {"passes": 400, "io_exits": 0, "internal_errors": 400},
    "not-emulated": {"passes": 400, "io_exits": 0, "internal_errors": 400},
    "idle": {"passes": 20, "io_exits": 20, "halts": 0},
    "one-idle": {"passes": 20, "io_exits": 20, "vms": 2},
    "cow": {"passes": 5, "io_exits": 5, "host_calls": 4},
    "notifier-storm": {"passes": 2000, "io_exits": 1},
    "slot-storm": {"passes": 20, "io_exits": 20},
    "mmio": {"passes": 5, "io_exits": 5, "mmio_exits": 5 * 16},
    "churn": {"passes": 3, "vms": 3},
    "other-thread": {"passes": 14, "host_calls": 4},
    "late-vcpu": {"passes": 10_000, "io_exits": 2, "vms": 1},
    "one-mapping": {"passes": 8, "host_calls": 6, "vms": 2},
    "cross-fault": {"passes": 8, "host_calls": 3, "vms": 2},
    "steady": {"passes": 5, "io_exits": 1},
    "roots": {"passes": 300, "io_exits": 300},
    "storm": {"passes": 1000, "io_exits": 0, "mmio_exits": 1000},
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([vmm.binary(), *arguments], capture_output=True, text=True, timeout=1200)


def result(*arguments: str) -> dict[str, Any]:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    parsed: dict[str, Any] = json.loads(line)
    return parsed


def failure(done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """Exit code and message of a run that failed as it should: one line, nothing on stdout."""
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("kvmtrace-vmm: ")
    return done.returncode, line


def test_every_scenario_says_in_one_line_what_it_shows() -> None:
    listed = vmm.scenarios()
    assert len({scenario.name for scenario in listed}) == len(listed)
    assert set(WITHOUT_SMM) <= {scenario.name for scenario in listed}
    for scenario in listed:
        assert 20 < len(scenario.shows) < 130
        assert {"loops", "pages", "vcpus", "huge", "timeout"} <= set(scenario.defaults)


def test_every_scenario_is_known_to_run_without_smm_or_to_need_it() -> None:
    # SMEP and APICv are not offered by every KVM; settings of the host; a KVM that emulates takes a lost page for MMIO.
    needs_more = {"cr4-toggle", "apicv", "ksm", "nx-recovery", "efault"}
    needs_smm = {scenario.name for scenario in vmm.scenarios() if scenario.needs_smm}
    assert {scenario.name for scenario in vmm.scenarios()} == set(WITHOUT_SMM) | needs_smm | needs_more


@needs_kvm
@pytest.mark.parametrize("name", sorted(WITHOUT_SMM))
def test_scenario_does_what_it_says(name: str) -> None:
    said = result(name)
    assert said["schema"] == 1
    assert said["scenario"] == name
    assert {key: said[key] for key in WITHOUT_SMM[name]} == WITHOUT_SMM[name]
    assert all(0 < spent <= said["wall_ns"] for spent in said["guest_ns"])


@needs_kvm
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("dirty-log --how clear", {"passes": 7, "dirty_pages": 2 * (512 + 256)}),
        ("idle --how userspace", {"passes": 20, "halts": 20, "io_exits": 20}),
        ("notifier-storm --how process", {"passes": 2000, "host_calls": 0}),
    ],
)
def test_variation_does_what_it_says(arguments: str, expected: dict[str, int]) -> None:
    said = result(*arguments.split())
    assert {key: said[key] for key in expected} == expected


@needs_kvm
def test_settings_of_the_host_are_put_back() -> None:
    files = [Path("/sys/kernel/mm/ksm") / name for name in ("run", "sleep_millisecs", "pages_to_scan")]
    if not all(os.access(path, os.W_OK) for path in files):
        pytest.skip("only root can have the host merge pages")
    before = [path.read_text() for path in files]
    done = run("ksm", "--loops", "3")
    assert [path.read_text() for path in files] == before
    assert done.returncode == 0, done.stderr
    code, line = failure(run("ksm", "--loops", "1000000", "--timeout", "2"))
    assert (code, "timeout" in line) == (1, True)
    assert [path.read_text() for path in files] == before


@needs_kvm
@pytest.mark.parametrize("arguments", ["slot-delete --vcpus 2", "dirty-log --pages 100 --vcpus 3"])
def test_the_same_run_twice_says_the_same(arguments: str) -> None:
    first, second = result(*arguments.split()), result(*arguments.split())
    for clock in ("setup_ns", "wall_ns", "guest_ns"):
        del first[clock], second[clock]
    assert first == second
    assert first["passes"] == first["loops"] * first["vcpus"]


@needs_kvm
def test_options_reach_the_guest() -> None:
    said = result("mmio", "--loops", "3", "--pages", "40", "--vcpus", "2", "--mmio", "7")
    assert [said[key] for key in ("loops", "pages", "vcpus", "mmio")] == [3, 40, 2, 7]
    assert said["mmio_exits"] == 3 * 2 * 7
    assert len(said["guest_ns"]) == 2


@needs_kvm
def test_scenario_that_needs_smm() -> None:
    done = run("smi-storm")
    if done.returncode == 0:
        assert json.loads(done.stdout)["smis"] == 4
        return
    code, line = failure(done)
    assert code == ENVIRONMENT
    assert "scenario smi-storm needs SMM: this KVM has none" in line


@needs_kvm
def test_a_guest_that_does_not_end_is_ended() -> None:
    code, line = failure(run("steady", "--loops", "1000000000", "--timeout", "1"))
    assert code == 1
    assert "timeout" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "name a scenario"),
        (("no-such",), "no scenario 'no-such'"),
        (("steady", "--loops", "0"), "--loops 0: give a whole number"),
        (("steady", "--loops", "-1"), "--loops -1: give a whole number"),
        (("steady", "--loops", "5x"), "--loops 5x: give a whole number"),
        (("steady", "--loops", "99999999999999999999"), "give a whole number"),
        (("steady", "--loops"), "--loops needs a value"),
        (("steady", "--vcpus", "9"), "from 1 to 8"),
        (("steady", "--trees", "3"), "scenario steady takes no --trees"),
        (("steady", "--frobnicate"), "unknown option --frobnicate"),
        (("steady", "more"), "unexpected argument 'more'"),
        (("notifier", "--how", "x"), "give one of mprotect|dontneed"),
        (("cr4-toggle", "--bit", "vmxe"), "give one of smep|"),
        (("smi-one", "--vcpus", "1"), "needs --vcpus 2 or more"),
        (("slot-delete", "--pages", "200000", "--vcpus", "2"), "fewer --pages or --vcpus"),
        (("smi-grow", "--pages", "100000"), "fewer --pages or --loops"),
    ],
)
def test_bad_usage_is_one_line(arguments: tuple[str, ...], expected: str) -> None:
    code, line = failure(run(*arguments))
    assert code == 2
    assert expected in line


@pytest.fixture
def anyones_copy() -> Iterator[Path]:
    """The program where every user can reach it, which a checkout or pytest's own directories need not be."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(shutil.copy(vmm.binary(), directory))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run it as a user who may not open /dev/kvm")
def test_a_user_without_access_is_told_what_to_do(anyones_copy: Path) -> None:
    nobody = 65534
    done = subprocess.run(
        [anyones_copy, "steady"],
        capture_output=True,
        text=True,
        timeout=1200,
        user=nobody,
        group=nobody,
        extra_groups=[],
    )
    if done.returncode == 0:
        assert Path("/dev/kvm").stat().st_mode & 0o006 == 0o006
        return
    code, line = failure(done)
    assert code == ENVIRONMENT
    assert "cannot open /dev/kvm" in line


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vmm, "BINARY", tmp_path / "kvmtrace-vmm")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Problem, match="apt-get install gcc libc6-dev") as caught:
        vmm.binary()
    assert caught.value.code == ENVIRONMENT


def test_a_build_that_fails_leaves_no_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text("this is not C\n")
    monkeypatch.setattr(vmm, "HERE", tmp_path)
    monkeypatch.setattr(vmm, "BINARY", tmp_path / "kvmtrace-vmm")
    with pytest.raises(Problem, match=r"cannot build kvmtrace-vmm \(.*error"):
        vmm.binary()
    assert [path.name for path in tmp_path.iterdir()] == ["main.c"]


def test_a_program_older_than_its_sources_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "main.c"
    monkeypatch.setattr(vmm, "HERE", tmp_path)
    monkeypatch.setattr(vmm, "BINARY", tmp_path / "kvmtrace-vmm")
    for status in (3, 4):
        source.write_text(f"int main(void) {{ return {status}; }}\n")
        if vmm.BINARY.exists():
            later = vmm.BINARY.stat().st_mtime + 1
            os.utime(source, (later, later))
        assert subprocess.run([vmm.binary()]).returncode == status


def test_kernels_are_listed_where_the_vmm_cannot_be_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vmm, "BINARY", tmp_path / "kvmtrace-vmm")
    monkeypatch.setenv("PATH", str(tmp_path))
    runner = CliRunner()
    listed = runner.invoke(app, ["list"], catch_exceptions=False)
    assert listed.exit_code == 0
    assert "root policies:" in listed.stdout
    assert " ".join(listed.stdout.split()).endswith(
        f"scenarios: not known: no C compiler to build kvmtrace-vmm with: {vmm.INSTALL}"
    )
    document = json.loads(runner.invoke(app, ["list", "--json"], catch_exceptions=False).stdout)
    assert document["scenarios"] is None
    assert vmm.INSTALL in document["lacking"]
    assert document["kernels"]
