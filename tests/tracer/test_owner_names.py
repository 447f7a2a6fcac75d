# SPDX-License-Identifier: Apache-2.0
"""The name of a VM, from the command line of who owns it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.traces.making import KVM_A, event, stream
from tracer import owner_names
from traces.reader import Trace
from traces.recording.compact import compact
from traces.recording.segment_writer import SegmentWriter
from traces.vm_names import VmNames


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("qemu-system-x86_64 -name guest=web1,debug-threads=on -m 1G", "web1"),
        ("qemu-system-x86_64 -m 1G -name debug-threads=on,guest=web2", "web2"),
        ("qemu-kvm --name web3,process=x", "web3"),
        ("firecracker --id a-7 --api-sock x", "a-7"),
        ("firecracker --id=a-8", "a-8"),
        ("vmm -name", ""),
        ("vmm --names x", ""),
        ("", ""),
    ],
)
def test_a_command_line_names_its_vm(line: str, name: str) -> None:
    assert owner_names.name_in(line.split(" ")) == name


def test_names_are_kept_when_their_process_is_gone() -> None:
    names = owner_names.OwnerNames()
    with subprocess.Popen(
        [sys.executable, "-c", "input()", "-name", "guest=\u00e4\x1b[2J"], stdin=subprocess.PIPE
    ) as child:
        while not (found := names.of([child.pid, 0, 2**31 - 1])):
            pass  # until it has become that program
        assert found == {str(child.pid): "\u00e4\x1b[2J"}
    assert names.of([]) == found


def test_a_trace_has_the_name_and_reports_say_it(tmp_path: Path) -> None:
    writer = SegmentWriter(
        tmp_path / "a.kvmt", {"vm_names": {"100": "web1\x1b[2J"}, "threads": {"101": {"comm": "CPU 0/KVM"}}}
    )
    writer.write(stream([event("kvm_entry", kvm=KVM_A, tgid=100, tid=101, vcpu=0)]))
    writer.close({"loss": {}})
    compact(writer.directory, tmp_path / "a.parquet")
    meta = Trace.open(tmp_path / "a.parquet").metadata
    (vm,) = meta.vms
    assert vm["name"] == "web1\x1b[2J"
    names = VmNames(meta)
    assert names.vm(1) == "VM 1 (web1?[2J, 100)"
    assert names.vcpu(1, 0) == "vCPU 0 (CPU 0/KVM) of VM 1 (web1?[2J, 100)"
    assert names.vm(9) == "VM 9"
    assert names.vcpu(9, 3) == "vCPU 3 of VM 9"
