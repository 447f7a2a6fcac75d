# SPDX-License-Identifier: Apache-2.0
"""What can be recorded on this machine, what cannot, and the one command that fixes each problem.

Nothing is changed. What an ordinary user may not see is reported as unseen, not as absent.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tracer.lab import qemu
from tracer.lab.bochs import emulator
from tracer.lab.lab_cpus import qemu_version
from tracer.probing import attachments, host, kept, tracefs
from tracer.probing.attachments import Attachment
from tracer.probing.bpf import Probes
from tracer.probing.btf import kernel_btf
from tracer.probing.compiled import INSTALL_BCC, Compiled, import_bcc
from tracer.probing.headers import find_headers
from tracer.probing.probes import preset_kinds
from traces.command_line.layout import GAP
from traces.command_line.screen import Page
from traces.errors import ENVIRONMENT, Problem
from traces.schema import KINDS

OK, WARN, FAIL, UNSEEN = "ok", "note", "FAIL", "unseen"
_STATE: Final = 8  # columns of a check's state, or of a number
SCHEMA = 2  # of --json; 1 said `mend` and "LACKS" for `fix` and "FAIL"
_CAPABILITIES = {"CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}


@dataclass(frozen=True)
class DoctorCheck:
    """One thing examined: FAIL prevents recording, a note limits what can be seen, unseen takes root to know."""

    name: str
    state: str
    said: str
    fix: str = ""


@dataclass
class DoctorReport:
    checks: list[DoctorCheck] = field(default_factory=list)
    probes: list[Attachment] = field(default_factory=list)
    attached: bool = False  # whether the probes were really attached, or only looked up

    @property
    def exit_code(self) -> int:
        return ENVIRONMENT if any(check.state == FAIL for check in self.checks) else 0

    @property
    def observable(self) -> list[str]:
        return [kind.name for kind in KINDS if any(p.kind == kind.name and p.how != "none" for p in self.probes)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "can_record": self.exit_code == 0,
            "checks": [vars(check) for check in self.checks],
            "attached": self.attached,
            "probes": [probe.metadata() for probe in self.probes],
            "observable": self.observable,
        }


def _privileges() -> Iterator[DoctorCheck]:
    effective = int(re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16)  # type: ignore[index]
    held = [name for name, bit in _CAPABILITIES.items() if effective >> bit & 1]
    if os.geteuid() == 0 and len(held) == len(_CAPABILITIES):
        yield DoctorCheck("privileges", OK, "root, with " + ", ".join(held))
    else:
        who = f"uid {os.geteuid()}" + (f" with {', '.join(held)}" if held else "")
        yield DoctorCheck("privileges", FAIL, f"{who}: BPF programs need root", "sudo kvmtrace doctor")


def _kernel() -> Iterator[DoctorCheck]:
    release = platform.release()
    facts = host.cpu()
    state = OK if host.kernel_version() >= (5, 10) else FAIL
    yield DoctorCheck("kernel", state, f"{release} on {facts.get('model', 'an unknown CPU')}",
                "" if state == OK else "install a kernel from 5.10 on")  # fmt: skip
    lockdown = Path("/sys/kernel/security/lockdown")
    if lockdown.exists():
        text = lockdown.read_text().strip()
        mode = re.search(r"\[(\w+)\]", text)
        if mode and mode[1] == "confidentiality":
            yield DoctorCheck(
                "lockdown", FAIL, "confidentiality: BPF may not read kernel memory", "boot with lockdown=integrity"
            )
        else:
            yield DoctorCheck("lockdown", OK, mode[1] if mode else text)
    else:
        yield DoctorCheck("lockdown", OK, "not in this kernel, or securityfs not mounted")


def _kvm() -> Iterator[DoctorCheck]:
    device = Path("/dev/kvm")
    if not device.exists():
        yield DoctorCheck("/dev/kvm", FAIL, "missing", "modprobe kvm_amd || modprobe kvm_intel")
    elif not os.access(device, os.R_OK | os.W_OK):
        yield DoctorCheck(
            "/dev/kvm",
            WARN,
            "there, but this user cannot start VMs with it",
            f"usermod -aG kvm {os.environ.get('USER', 'USER')}",
        )
    else:
        yield DoctorCheck("/dev/kvm", OK, "usable")
    parameters = host.module_parameters()
    said = "; ".join(
        f"{module}: "
        + " ".join(f"{name}={values[name]}" for name in ("tdp_mmu", "npt", "ept", "nx_huge_pages") if name in values)
        for module, values in parameters.items()
    )
    yield DoctorCheck(
        "kvm modules",
        OK if parameters else FAIL,
        said or "none loaded",
        "" if parameters else "modprobe kvm_amd || modprobe kvm_intel",
    )


def _btf() -> Iterator[DoctorCheck]:
    try:
        btf = kernel_btf()
    except Problem as problem:
        yield DoctorCheck("BTF", FAIL, str(problem), "boot a kernel with CONFIG_DEBUG_INFO_BTF=y")
        return
    layout = attachments.this_layout()
    if not (unknown := layout.unknown()):
        yield DoctorCheck("BTF", OK, layout.source)
    elif not Path("/sys/module/kvm").exists():
        yield DoctorCheck("BTF", FAIL, "that of KVM comes with its module, which is not loaded", "modprobe kvm")
    else:
        said, _, fix = unknown.rpartition(": ")
        yield DoctorCheck("BTF", FAIL, said, fix)
    policy = host.host(btf)["policy"]
    yield DoctorCheck("root policy", OK if policy["name"] != "unknown" else WARN, f"{policy['name']}: {policy['why']}")
    if os.geteuid() != 0:
        yield DoctorCheck("symbols", UNSEEN, "kernel addresses are hidden from this user")
    elif not attachments.kernel_bases():
        yield DoctorCheck("symbols", WARN, "page_offset_base is not in kallsyms: `table` holds virtual frames",
                    "boot a kernel with CONFIG_KALLSYMS_ALL=y")  # fmt: skip
    else:
        yield DoctorCheck("symbols", OK, "direct map and page array found")


def _tools() -> Iterator[DoctorCheck]:
    """Check the two ways to get the probes: kept from an earlier compilation, or compiled now."""
    found = _kept_probes()
    ready = isinstance(found, Compiled)
    lacking = WARN if ready else FAIL
    if ready:
        yield DoctorCheck(
            "kept probes", OK, f"there for this kernel, in {kept.directory()}: recording needs no compiler"
        )
    elif found is None:
        yield DoctorCheck("kept probes", UNSEEN, "whether there are any for this kernel is unknown")
    elif found:
        yield DoctorCheck("kept probes", WARN, f"not used: {found}", f"sudo {kept.BUILD}")
    else:
        said = f"none for this kernel in {kept.directory()}: the first recording compiles"
        yield DoctorCheck("kept probes", WARN, said, f"sudo {kept.BUILD}")
    try:
        module = import_bcc()
        yield DoctorCheck("bcc", OK, f"bcc {module.__version__} (python3-bpfcc)")
    except Problem as problem:
        yield DoctorCheck("bcc", lacking, str(problem).rpartition(": ")[0], INSTALL_BCC)
    try:
        trees = find_headers()
        yield DoctorCheck("kernel headers", OK, f"bcc uses {trees[0]}" if trees else f"those of {platform.release()}")
    except Problem as problem:
        text, _, fix = str(problem).rpartition(": ")
        yield DoctorCheck("kernel headers", lacking, text, fix)


def _kept_probes() -> Compiled | str | None:
    """Return what `kept.find` does; None where this kernel or user does not allow the probes' text to be made."""
    if tracefs.tracefs() is None:
        return None
    try:
        layout = attachments.this_layout()
        return None if layout.unknown() else kept.find(attachments.choices().text(kernel_btf(), layout))
    except Problem:
        return None


def _lab() -> Iterator[DoctorCheck]:
    """Check what `kvmtrace lab` boots kernels with; recording this machine needs none of it."""
    if version := qemu_version():
        yield DoctorCheck("lab, AMD", OK, f"QEMU {version}")
    else:
        yield DoctorCheck("lab, AMD", WARN, f"no {qemu.PROGRAM}", qemu.INSTALL)
    try:
        yield DoctorCheck("lab, Intel", OK, str(emulator()))
    except Problem as problem:
        said, _, fix = str(problem).rpartition(": ")
        yield DoctorCheck("lab, Intel", WARN, said, fix)


def _filesystems() -> Iterator[DoctorCheck]:
    mount = tracefs.tracefs()
    if mount:
        yield DoctorCheck("tracefs", OK, str(mount))
    elif os.geteuid() == 0:
        yield DoctorCheck("tracefs", FAIL, "not mounted", tracefs.MOUNT_COMMAND)
    else:
        yield DoctorCheck("tracefs", UNSEEN, "not mounted, or not readable by this user")
    if os.access(host.DEBUGFS_KVM, os.R_OK | os.X_OK):
        yield DoctorCheck("KVM's counters", OK, str(host.DEBUGFS_KVM))
    elif os.geteuid() == 0:
        yield DoctorCheck("KVM's counters", WARN, "debugfs is not mounted: no cross-check of fault counts",
                    "mount -t debugfs debugfs /sys/kernel/debug")  # fmt: skip
    else:
        yield DoctorCheck("KVM's counters", UNSEEN, "debugfs is not readable by this user")


def _probes() -> tuple[list[Attachment], bool]:
    """Return how each probe attaches, and whether that was tried: only root attaches and detaches them all."""
    if os.geteuid() != 0:
        return attachments.plan(preset_kinds("all"), attachments.choices()).attachments, False
    probes = Probes(preset_kinds("all"), 1, mmap.PAGESIZE)
    try:
        probes.attach()
        probes.detach()
    finally:
        probes.close()
    return probes.plan.attachments, True


def examine() -> DoctorReport:
    """Check everything; never raises for what is merely absent."""
    report = DoctorReport()
    for part in (_kernel, _privileges, _kvm, _btf, _tools, _filesystems, _lab):
        try:
            report.checks.extend(part())
        except PermissionError as error:
            report.checks.append(
                DoctorCheck(part.__name__.strip("_"), UNSEEN, f"{error.filename}: not readable by this user")
            )
    blocked = {check.name for check in report.checks if check.state in (FAIL, UNSEEN)}
    if not blocked & {"bcc", "kernel headers", "tracefs", "BTF"}:
        try:
            report.probes, report.attached = _probes()
        except Problem as problem:
            text, _, fix = str(problem).rpartition(": ")
            report.checks.append(DoctorCheck("probes", FAIL, text, fix))
    return report


def render(report: DoctorReport) -> str:
    """Return the report as text: a line for each check, then what can and cannot be observed."""
    page = Page()
    at = _STATE + max(len(check.name) for check in report.checks) + GAP
    for check in report.checks:
        page.facts([(f"{check.state:>6}  {check.name}", check.said)], at=at)
        if check.fix:
            page.command(check.fix, at)
    page.blank()
    if report.probes:
        page.facts(list(_observed(report)), at=_STATE)
    else:
        page.say("which events can be observed: skipped (see above)")
    page.blank()
    page.say("this machine can record" if report.exit_code == 0 else "this machine cannot record yet: see FAIL above")
    return page.text


def _observed(report: DoctorReport) -> Iterator[tuple[str, str]]:
    """Yield how many probes attach in which way, and which kinds cannot be observed, and why."""
    by_how: dict[str, list[str]] = {}
    missing: dict[str, list[str]] = {}
    for probe in report.probes:
        by_how.setdefault(probe.how, []).append(probe.kind)
        if probe.how == "none" and probe.kind not in report.observable:
            missing.setdefault(probe.why, []).append(probe.kind)
    for how, kinds in by_how.items():
        if how != "none":
            yield f"{len(kinds):>6}", f"probes {'attached' if report.attached else 'to attach'} by {how}"
    for why, kinds in missing.items():
        yield f"{len(kinds):>6}", f"not observable here ({why}): {', '.join(dict.fromkeys(kinds))}"
