# SPDX-License-Identifier: Apache-2.0
"""The CPUs that a lab kernel can be booted on: which emulator shows which CPU's KVM."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from tracer.lab.modules import WANTED, WANTED_ON_INTEL
from traces.errors import Problem


@dataclass(frozen=True)
class LabCpu:
    """A CPU for lab guests: `wanted` are the modules they load, the last of which is KVM's for this vendor.

    `model` is Bochs's name of it. `counts`: QEMU's clock, which the guest sees, is the count of its instructions, as
    Bochs's always is.
    """

    name: str
    shows: str
    wanted: tuple[str, ...]
    model: str = ""
    counts: bool = False

    @property
    def kvm(self) -> str:
        return self.wanted[-1]

    def runs(self, modules: Iterable[str]) -> bool:
        """Whether a kernel with these modules has KVM for this CPU, as far as modules tell."""
        there = set(modules)
        return "kvm" not in there or self.kvm in there


AMD: Final = "amd"
CPUS: Final = {
    cpu.name: cpu
    for cpu in (
        LabCpu(AMD, "EPYC under QEMU: SVM with nested paging (NPT)", WANTED),
        LabCpu("amd-icount", "the same, one CPU; its clock counts instructions: times repeat", WANTED, counts=True),
        LabCpu("intel", "Haswell under Bochs: VMX with EPT", WANTED_ON_INTEL, "corei7_haswell_4770"),
        LabCpu("intel-pml", "Skylake under Bochs: EPT with PML", WANTED_ON_INTEL, "corei7_skylake_x"),
    )
}


def lab_cpu(name: str) -> LabCpu:
    """Return a CPU of the table. Raises Problem for a name that it does not have."""
    if name in CPUS:
        return CPUS[name]
    raise Problem(f"--cpu {name}: no such CPU; there are {', '.join(CPUS)}")


@lru_cache(maxsize=1)
def qemu_version() -> str:
    """Return QEMU's own version, for the provenance; empty where it is not installed."""
    from tracer.lab.qemu import PROGRAM

    try:
        said = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
    return said.partition("version ")[2].split()[0] if "version " in said else ""
