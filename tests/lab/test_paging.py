# SPDX-License-Identifier: Apache-2.0
"""A Linux guest under real shadow paging: its page tables go out of sync thousands of times, and `validate` holds."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from replay.validate.compare import validate
from replay.validate.validate_text import render
from tracer.lab import lab_kernels, session
from traces.reader import Trace

pytestmark = pytest.mark.lab

# It boots until it finds no root file system, which takes an idle machine two minutes. Emulation aborts where a nested
# guest writes CR8 while an interrupt is pending, hence no interrupt controller in the kernel; asynchronous page faults
# would look pages up without a fault.
QEMU = (
    "qemu-system-x86_64 -accel kvm -m 512 -nodefaults -display none -no-reboot -net none"
    " -machine q35,kernel-irqchip=off -cpu host,-kvm-asyncpf-int,-kvm-pv-eoi,-kvm-asyncpf,-kvm-steal-time"
    ",-kvm-poll-control,-kvm-msi-ext-dest-id"
)
LINUX = "console=ttyS0 panic=-1 mitigations=off nokaslr"


@pytest.mark.parametrize("lab_kernel", ["6.1"], indirect=True)
def test_a_guest_that_writes_its_page_tables(lab_kernel: lab_kernels.Bootable, tmp_path: Path) -> None:
    guest = f"{QEMU} -serial stdio -kernel {shlex.quote(str(lab_kernel.image))} -append {shlex.quote(LINUX)}"
    out = tmp_path / "linux.parquet"
    session.boot(
        lab_kernel,
        session.recorder(["sh", "-c", f"timeout 600 {guest}"], "mmu"),
        trace=out,
        parameters=["kvm_amd.npt=0"],
        memory=3072,
        timeout=1200,
    )
    report = validate(out)
    assert report.holds, render(report)
    assert report.complete, report.notes
    found = {kind: tally.matched for kind, tally in report.tallies.items()}
    assert found == {kind: rows for kind, rows in Trace.open(out).counts().items() if kind in found}
    assert min(found[f"kvm_mmu_{turn}_page"] for turn in ("sync", "unsync")) > 1000
    assert found["kvm_mmu_get_page"] > 100
