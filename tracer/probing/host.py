# SPDX-License-Identifier: Apache-2.0
"""Facts about this host: kernel, CPU, KVM's module parameters, its root policy, symbols, clocks, counters."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tracer.probing.btf import Btf
from tracer.probing.points import Version
from traces.kernels.detect import RunningKernel, root_policy

KALLSYMS = Path("/proc/kallsyms")
MODULES = ("kvm", "kvm_amd", "kvm_intel")
MODULE_DIRECTORY = Path("/sys/module")
CPUINFO = Path("/proc/cpuinfo")
DEBUGFS_KVM = Path("/sys/kernel/debug/kvm")
ALL_VMS = "all"  # the key, in the metadata's `stats`, of counters over all VMs


def kernel_version(release: str | None = None) -> Version:
    """Return (major, minor) of a kernel release string, by default of the running kernel; (0, 0) if there is none."""
    match = re.match(r"(\d+)\.(\d+)", release or platform.release())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def kernel_symbols(functions: Iterable[str], variables: Iterable[str]) -> dict[str, int]:
    """Return which of KVM's `functions` exist, each as 0, and the addresses of the kernel's `variables`.

    An address is 0 where kptr_restrict hides it. The file is searched as a whole, because reading it line by line would
    take most of a recording's start.
    """
    text = KALLSYMS.read_bytes()
    mark = b"\t[kvm]\n"
    first = text.find(mark)
    # The symbols of a module are next to each other.
    kvm = text[text.rfind(b"\n", 0, first) + 1 : text.rfind(mark)] if first >= 0 else text
    wanted = {name.encode() for name in functions}
    found = dict.fromkeys((name.decode() for name in wanted.intersection(kvm.split())), 0)
    for name in variables:
        if (at := text.find(f" {name}\n".encode())) >= 0:
            found[name] = int(text[text.rfind(b"\n", 0, at) + 1 : at].split(b" ")[0], 16)
    return found


def module_parameters() -> dict[str, dict[str, str]]:
    """Return {module: {parameter: value}} of the KVM modules loaded or built in, without unreadable ones."""
    found: dict[str, dict[str, str]] = {}
    for module in MODULES:
        directory = MODULE_DIRECTORY / module / "parameters"
        values = {}
        for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
            try:
                values[entry.name] = entry.read_text().strip()
            except OSError:
                continue
        if values or (MODULE_DIRECTORY / module).is_dir():
            found[module] = values
    return found


def cpu() -> dict[str, str]:
    """Return vendor and model of the first CPU, as /proc/cpuinfo prints them."""
    wanted = {"vendor_id": "vendor", "model name": "model"}
    found: dict[str, str] = {}
    for line in CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in wanted:
            found.setdefault(wanted[key.strip()], value.strip())
        if not line:
            break
    return found


def runs_svm() -> bool:
    """Whether KVM runs its guests by AMD's SVM and nothing else: there are KVMs besides kvm_amd and kvm_intel."""
    modules = {path.name for path in MODULE_DIRECTORY.glob("kvm_*")}
    if "kvm_amd" not in modules or modules - set(MODULES):
        return False
    flags = next((line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")), "")
    return "svm" in flags.split()  # built in, kvm_amd and kvm_intel are both there


def clock_sample() -> dict[str, int]:
    """Return one moment on three clocks, ns: events carry `boot` (CLOCK_BOOTTIME), `real` gives wall time."""
    return {
        "boot": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        "mono": time.clock_gettime_ns(time.CLOCK_MONOTONIC),
        "real": time.clock_gettime_ns(time.CLOCK_REALTIME),
    }


class Suspended(NamedTuple):
    """How long the host was suspended since its boot, as seen at `boot` (boot ns): at `least` and at `most`, ns.

    It is an interval because the two clocks cannot be read at once, and a busy host may take this thread's CPU away in
    between.
    """

    boot: int
    least: int
    most: int


def suspended() -> Suspended:
    """Return how long the host was suspended: CLOCK_BOOTTIME goes on meanwhile, CLOCK_MONOTONIC does not."""
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    return Suspended(boot, boot - after, boot - before)


def host(btf: Btf) -> dict[str, Any]:
    """Return the metadata's `host`, `modules` and `policy`."""
    uname, parameters = platform.uname(), module_parameters()
    return {
        "host": {
            "name": uname.node,
            "kernel": uname.release,
            "build": uname.version,
            "machine": uname.machine,
            "cpus": os.cpu_count(),
            **cpu(),
        },
        "modules": parameters,
        "policy": root_policy(RunningKernel(kernel_version(), btf, parameters)),
    }


def kvm_counters() -> dict[str, int]:
    """Return KVM's own counters from debugfs, each summed over the VMs alive now; empty if not readable.

    Those of each VM are not read: an open file in a VM's own directory holds the VM, and who closes the last one
    destroys it.
    """
    values = {}
    with contextlib.suppress(OSError):
        for entry in DEBUGFS_KVM.iterdir():
            with contextlib.suppress(OSError, ValueError):
                if not entry.is_dir():
                    values[entry.name] = int(entry.read_text())
    return values


def _above_zero(counters: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in counters.items() if value}


class Counted:
    """How far KVM's counters rose. A VM's counts vanish with it, so rises between two looks may be missed."""

    def __init__(self) -> None:
        self.start = self._last = kvm_counters()
        self._risen: dict[str, int] = {}

    def look(self) -> dict[str, Any]:
        """Return the metadata's `stats`: counters at the `start`, and at the `end` by the rises seen since."""
        now = kvm_counters()
        for name, value in now.items():
            self._risen[name] = self._risen.get(name, 0) + max(0, value - self._last.get(name, 0))
        self._last = now
        end = {name: self.start.get(name, 0) + risen for name, risen in self._risen.items()}
        return {"start": {ALL_VMS: _above_zero(self.start)}, "end": {ALL_VMS: _above_zero(end)}}
