# SPDX-License-Identifier: Apache-2.0
"""What to record, and whether that can work on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from traces.errors import ENVIRONMENT, Problem

_VM_DESCRIPTOR: Final = "anon_inode:kvm-vm"


@dataclass(frozen=True)
class Options:
    """What to record. `vm` is the process that owns the VM, None for all VMs; `kinds` are names of schema.KINDS."""

    out: Path
    kinds: frozenset[str]
    preset: str
    vm: int | None = None
    duration: float | None = None
    max_events: int | None = None
    max_size: int | None = None
    ring_bytes: int | None = None
    command: tuple[str, ...] = ()
    command_stdout: int | None = None  # descriptor for what the command prints; None: our own standard output

    @property
    def directory(self) -> Path:
        """The directory of the recording until it is compacted."""
        return self.out.with_name(self.out.stem + ".kvmt")


def owns_vm(pid: int) -> bool:
    """Whether a process has a descriptor of a KVM virtual machine."""
    with contextlib.suppress(OSError):  # it may end at any moment
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if entry.readlink().name == _VM_DESCRIPTOR:
                    return True
    return False


def check(options: Options) -> None:
    """Raise Problem for what cannot work, before anything is loaded."""
    if os.geteuid() != 0:
        raise Problem("recording needs root (CAP_BPF, CAP_PERFMON, tracefs): run it with sudo", ENVIRONMENT)
    if not Path("/dev/kvm").exists():
        raise Problem("no /dev/kvm: this machine has no KVM; load it with modprobe kvm_amd or kvm_intel", ENVIRONMENT)
    if options.command and shutil.which(options.command[0]) is None:
        raise Problem(f"{options.command[0]}: command not found")
    if options.vm is not None:
        if Path("/proc/self").readlink().name != str(os.getpid()):
            where = "/proc is of another pid namespace than this process: mount -t proc proc /proc"
            raise Problem(f"--vm {options.vm}: {where}", ENVIRONMENT)
        if not Path(f"/proc/{options.vm}").is_dir():
            raise Problem(f"--vm {options.vm}: no such process")
        if not owns_vm(options.vm):
            raise Problem(f"--vm {options.vm}: that process has no KVM virtual machine")
