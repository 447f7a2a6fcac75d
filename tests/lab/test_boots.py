# SPDX-License-Identifier: Apache-2.0
"""Real boots under emulation (3 to 15 s each): nested KVM is there, and every way a guest fails ends the run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tracer import vmm
from tracer.lab import lab_kernels, modules, qemu, session
from tracer.lab.cli import app
from traces.recording.compact import compact

pytestmark = pytest.mark.lab


def quick(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("lab_kernel", names or list(lab_kernels.KERNELS), indirect=True)


@quick()
def test_boots_with_nested_paging(lab_kernel: lab_kernels.Bootable, tmp_path: Path) -> None:
    script = (
        "uname -r; cat /sys/module/kvm/parameters/tdp_mmu; tr 1 Y < /sys/module/kvm_amd/parameters/npt; "
        "test -c /dev/kvm; echo $?; "
        "ls -d /sys/kernel/debug/tracing/events/kvmmmu; echo $KVMTRACE_LAB_KERNEL; pwd; echo aside >&2; exit 5"
    )
    done = session.boot(lab_kernel, ["sh", "-c", script])
    expected = [
        lab_kernel.release,
        "Y",
        "Y",
        "0",
        "/sys/kernel/debug/tracing/events/kvmmmu",
        lab_kernel.name,
        str(Path.cwd()),
    ]
    assert done.stdout.splitlines() == expected
    assert (done.code, done.signalled, done.stderr) == (5, False, "aside\n")
    assert done.warnings == ()


@quick("6.1")
def test_guest_cannot_change_the_host(lab_kernel: lab_kernels.Bootable, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    done = session.boot(
        lab_kernel, ["sh", "-c", f"echo changed > {kept}; cat {kept}; rm {kept}; echo new > {tmp_path}/new"]
    )
    assert done.stdout == "changed\n"
    assert kept.read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@quick("6.1")
def test_panic_ends_the_run(lab_kernel: lab_kernels.Bootable) -> None:
    with pytest.raises(session.GuestFailed, match=r"panicked or reset .*sysrq triggered crash") as caught:
        session.boot(lab_kernel, ["sh", "-c", "echo c > /proc/sysrq-trigger"])
    assert caught.value.tail


@quick("6.1")
def test_hang_ends_at_the_limit(lab_kernel: lab_kernels.Bootable) -> None:
    begin = time.monotonic()
    with pytest.raises(session.GuestFailed, match="did not end within 40 s") as caught:
        session.boot(lab_kernel, ["sleep", "1000"], timeout=40)
    assert time.monotonic() - begin < 500
    assert caught.value.tail[-1] == "kvmtrace-lab: ready"


@quick("6.1")
def test_processor_without_svm(lab_kernel: lab_kernels.Bootable, monkeypatch: pytest.MonkeyPatch) -> None:
    with_svm = qemu.LabMachine.command
    monkeypatch.setattr(
        qemu.LabMachine, "command", lambda machine: [word.replace("+svm,+npt", "-svm") for word in with_svm(machine)]
    )
    with pytest.raises(session.GuestFailed, match="no SVM for its KVM"):
        session.boot(lab_kernel, ["true"])


@quick("6.1")
def test_kernel_without_kvm(lab_kernel: lab_kernels.Bootable, tmp_path: Path) -> None:
    for name, data in modules.Directory(*lab_kernel.modules).items():
        if not name.startswith("kvm"):
            (tmp_path / f"{name}.ko").write_bytes(data)
    with pytest.raises(session.GuestFailed, match="no /dev/kvm in it"):
        session.boot(lab_kernels.own(lab_kernel.image, tmp_path), ["true"])


@quick("6.1")
def test_unknown_parameter_is_reported(lab_kernel: lab_kernels.Bootable) -> None:
    done = session.boot(lab_kernel, ["true"], parameters=["kvm.no_such=1"])
    assert any("unknown parameter 'no_such'" in warning for warning in done.warnings)


@quick("6.1")
def test_scenario_with_the_shadow_mmu(lab_kernel: lab_kernels.Bootable) -> None:
    arguments = ["--kernel", "6.1", "--param", "kvm.tdp_mmu=0", "--bare", "--scenario", "smi-storm", "--loops", "3"]
    result = CliRunner().invoke(app, ["run", *arguments])
    assert result.exit_code == 0, result.exception
    report, seconds = result.stdout.splitlines()
    assert json.loads(report)["smis"] == 2
    assert 0 < float(seconds.removesuffix(" s")) < 60


@quick("6.1")
def test_recording_cut_short_by_a_panic_is_kept(lab_kernel: lab_kernels.Bootable, tmp_path: Path) -> None:
    script = f"{vmm.binary()} smi-storm; sleep 3; echo c > /proc/sysrq-trigger"
    trace = tmp_path / "crash.parquet"
    with pytest.raises(
        session.GuestFailed,
        match=r"panicked or reset .*; what was recorded until then: kvmtrace recover .*crash\.kvmt$",
    ):
        session.boot(lab_kernel, session.recorder(["sh", "-c", script], "mmu"), trace=trace)
    assert not trace.exists()
    assert compact(trace.with_suffix(".kvmt"), trace).events > 3000
