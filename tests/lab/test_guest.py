# SPDX-License-Identifier: Apache-2.0
"""Running a guest: QEMU's limits and endings, what the guest is given, errors, and the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from tests.lab.synthetic import TREE, add_archive, whole_kernel
from tests.waiting import until
from tracer.lab import lab_kernels, qemu, session
from tracer.lab.cli import app
from tracer.lab.lab_cpus import CPUS
from traces.errors import BAD_INPUT, ENVIRONMENT, Problem

ROOT = Path(__file__).resolve().parents[2]


# QEMU


@pytest.mark.parametrize(
    ("status", "ending"),
    [
        (1, qemu.Ending.ORDERLY),
        (3, qemu.Ending.MODULE_REFUSED),
        (5, qemu.Ending.MOUNT_REFUSED),
        (7, qemu.Ending.NO_KVM),
        (9, qemu.Ending.NO_COMMAND),
        (0, qemu.Ending.PANIC),
        (11, qemu.Ending.EMULATOR_FAILED),
        (2, qemu.Ending.EMULATOR_FAILED),
        (-signal.SIGABRT, qemu.Ending.EMULATOR_FAILED),
    ],
)
def test_exit_status(status: int, ending: qemu.Ending) -> None:
    assert qemu.decode(status) is ending


def test_codes_are_those_of_init() -> None:
    text = (ROOT / "tracer" / "lab" / "init.c").read_text()
    for code, name in enumerate(("ORDERLY", "MODULE_REFUSED", "MOUNT_REFUSED", "NO_KVM", "NO_COMMAND")):
        assert f"\t{name} = {code}," in text
        assert qemu.decode(code << 1 | 1) is qemu.Ending[name]


def test_command_line() -> None:
    machine = qemu.LabMachine(Path("/k"), Path("/i"), Path("/tmp/a,b"), 512, ("kvm.tdp_mmu=0",))
    command = machine.command()
    assert command[command.index("-accel") + 1] == "tcg,thread=single"
    assert command[command.index("-append") + 1].endswith(" rcutree.use_softirq=0 kvm.tdp_mmu=0")
    shares = [command[index + 1] for index, word in enumerate(command) if word == "-virtfs"]
    assert [share.endswith(",readonly=on") for share in shares] == [True, False]
    assert ",path=/tmp/a,,b,mount_tag=lab," in shares[1]
    assert "-icount" not in command
    assert command[command.index("-smp") + 1] == "2"


def test_a_clock_that_counts_instructions_has_one_processor() -> None:
    command = qemu.LabMachine(Path("/k"), Path("/i"), Path("/s"), 512, counts=True).command()
    assert command[command.index("-icount") + 1] == "shift=4,sleep=off"
    assert command[command.index("-smp") + 1] == "1"


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except FileNotFoundError:
        return False


def test_limit_ends_the_whole_process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []
    serial, child = tmp_path / "serial", tmp_path / "child"

    def monotonic() -> float:
        """The limit is over once the guest has said something, however long that takes here."""
        return 1e9 if ticks and serial.read_text() == "said\n" and child.read_text() else 0

    monkeypatch.setattr(qemu, "time", SimpleNamespace(monotonic=monotonic))
    script = f"sleep 600 & echo $! > {child}; echo said; wait"
    ending = qemu.run(["sh", "-c", script], serial, 0.5, lambda: ticks.append(0))
    assert ending is qemu.Ending.TIMEOUT
    assert until(lambda: not alive(int(child.read_text())))


def test_qemu_does_not_outlive_us(tmp_path: Path) -> None:
    text = (
        "import sys; from pathlib import Path; from tracer.lab import qemu\n"
        f"qemu.run(['sh', '-c', 'echo $$ > {tmp_path}/pid; exec sleep 600'], Path('{tmp_path}/serial'), 600)"
    )
    ours = subprocess.Popen([sys.executable, "-c", text], cwd=ROOT)
    assert until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    ours.kill()
    ours.wait()
    assert until(lambda: not alive(pid))


def test_no_qemu(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="no qemu-none: apt-get install qemu-system-x86") as caught:
        qemu.run(["qemu-none"], tmp_path / "serial", 1)
    assert caught.value.code == ENVIRONMENT


# sessions


def own_kernel(tmp_path: Path) -> lab_kernels.Bootable:
    (tmp_path / "modules").mkdir()
    for name, data in TREE.items():
        (tmp_path / "modules" / f"{name}.ko").write_bytes(data)
    return lab_kernels.Bootable("own", tmp_path / "bzImage", (tmp_path / "modules",), version="6.9.0 (me)")


@pytest.mark.parametrize("parameter", ["tdp_mmu=0", "kvm.tdp_mmu", "kvm", "", "kvm.tdp mmu=0", "kvm.tdp_mmu=0 init=/x"])
def test_bad_parameter(tmp_path: Path, parameter: str) -> None:
    with pytest.raises(Problem, match=r"not of the form MODULE\.PARAMETER=VALUE"):
        session.boot(own_kernel(tmp_path), ["true"], parameters=[parameter])


def test_parameter_of_a_module_that_no_guest_loads(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="loads no module kvm_intel"):
        session.boot(own_kernel(tmp_path), ["true"], parameters=["kvm-intel.ept=0"])


def test_no_space_for_a_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5 << 20))
    with pytest.raises(Problem, match="5 MiB free, 256 needed: make room or set TMPDIR") as caught:
        session.boot(own_kernel(tmp_path), ["true"])
    assert caught.value.code == ENVIRONMENT


@pytest.mark.parametrize(
    ("default", "parameters", "policy"),
    [
        ("kvm.tdp_mmu=1", [], "sync"),
        ("kvm.tdp_mmu=1", ["kvm.tdp_mmu=0"], "shadow"),
        ("kvm.tdp_mmu=1", ["kvm.tdp_mmu=N"], "shadow"),
        ("kvm.tdp_mmu=0", ["kvm.tdp_mmu=1", "kvm.mmio_caching=0"], "sync"),
        ("kvm.tdp_mmu=0", ["kvm.mmio_caching=0"], "shadow"),
        ("kvm.tdp_mmu=1", ["kvm-amd.npt=0"], "shadow"),
        ("kvm.tdp_mmu=1", ["kvm-intel.ept=0"], "shadow"),
    ],
)
def test_policy_told_to_the_guest(default: str, parameters: list[str], policy: str) -> None:
    kernel = lab_kernels.Bootable(
        "5.10", Path("k"), (), "sync", (default,), "5.10.0-46-amd64 (b@h) Debian 5.10.262-1 (x)"
    )
    given = session._by_module((*kernel.parameters, *parameters))
    environment = session._environment(kernel, CPUS["intel"], "Bochs 2.7", given)
    assert environment["KVMTRACE_LAB_EMULATOR"] == "Bochs 2.7"
    assert environment["KVMTRACE_LAB_KERNEL"] == "5.10"
    assert environment["KVMTRACE_LAB_PACKAGE"] == "linux-image-5.10.0-46-amd64 5.10.262-1"
    assert environment["KVMTRACE_LAB_POLICY"] == policy


@pytest.mark.parametrize(
    ("ending", "serial", "expected", "code"),
    [
        ("MODULE_REFUSED", "kvmtrace-lab: module: /modules.d/kvm_amd.ko: Operation not supported", "no SVM", BAD_INPUT),
        ("MODULE_REFUSED", "kvmtrace-lab: module: /modules.d/9p.ko: Exec format error", "of the very build", BAD_INPUT),
        ("MOUNT_REFUSED", "kvmtrace-lab: mount: 9p on /host: No such device", "needs 9p over virtio", BAD_INPUT),
        ("NO_KVM", "kvmtrace-lab: kvm: /dev/kvm: No such file or directory", "no /dev/kvm in it", BAD_INPUT),
        ("TIMEOUT", "kvmtrace-lab: ready", "did not end within 7 s", BAD_INPUT),
        ("PANIC", "[  1.2] Kernel panic - not syncing: Oops\nmore", r"\(Kernel panic - not syncing: Oops\)", BAD_INPUT),
        ("EMULATOR_FAILED", "qemu: cannot allocate memory", r"QEMU gave up \(qemu: cannot", ENVIRONMENT),
        ("ORDERLY", "qemu: -virtfs: no such option", r"QEMU gave up \(qemu: -virtfs", ENVIRONMENT),
        ("EMULATOR_FAILED", "", r"QEMU gave up \(without a word\)", ENVIRONMENT),
    ],
)
def test_failures_are_one_line(ending: str, serial: str, expected: str, code: int) -> None:
    kernel = lab_kernels.Bootable("6.1", Path("k"), ())
    failure = session._failure(kernel, qemu.Ending[ending], serial.encode(), 7)
    assert "\n" not in str(failure)
    with pytest.raises(session.GuestFailed, match=f"^kernel 6.1: .*{expected}") as caught:
        raise failure
    assert caught.value.code == code
    assert list(failure.tail) == serial.splitlines()


# the command line


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--kernel", "6.1", "--scenario", "smi-storm"], "give -o OUT.parquet to record, or --bare", BAD_INPUT),
        (["--kernel", "6.1", "--bare", "-o", "x", "--workload", "true"], "give -o OUT.parquet", BAD_INPUT),
        (["--kernel", "6.1", "--bare"], "either --scenario NAME or --workload COMMAND", BAD_INPUT),
        (["--kernel", "6.1", "--scenario", "none", "--bare"], "none: no such scenario; there are smi-storm", BAD_INPUT),
        (["--kernel", "none", "--workload", "true", "--bare"], "none: no such kernel; there are 5.10, 6.1", BAD_INPUT),
        (["--kernel", "6.12", "--workload", "true", "--bare"], "is not here: kvmtrace lab fetch 6.12$", ENVIRONMENT),
        (["--kernel", "6.1-async", "--workload", "true", "--bare"], "in no package: set KVMTRACE_KERNELS", ENVIRONMENT),
        (["--kernel", "/none/bzImage", "--workload", "true", "--bare"], "/none/bzImage: No such file", BAD_INPUT),
        (["--kernel", "6.1", "--workload", "true", "-o", "/none/x.parquet"], "/none: no such directory", BAD_INPUT),
    ],
)
def test_bad_invocations(store: Path, arguments: list[str], message: str, code: int) -> None:
    result = CliRunner().invoke(app, ["run", *arguments])
    assert isinstance(result.exception, Problem)
    with pytest.raises(Problem, match=message):
        raise result.exception
    assert result.exception.code == code
    assert "\n" not in str(result.exception)


def test_list_as_json(store: Path) -> None:
    add_archive(store, whole_kernel())
    listed = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    assert listed["schema"] == 1
    assert {row["name"]: row["here"] for row in listed["kernels"]} == {
        name: name == "6.1" for name in lab_kernels.KERNELS
    }
    assert "smi-storm" in [scenario["name"] for scenario in listed["scenarios"]]


def test_command_line_imports_lightly() -> None:
    text = "import sys, tracer.lab.cli; print(sorted({'pyarrow', 'numpy', 'polars', 'bcc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"
