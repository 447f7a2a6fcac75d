# SPDX-License-Identifier: Apache-2.0
"""How each probe of the table is attached on this kernel: the first of its points that holds, or why none does."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tracer import libbpf, tracefs
from tracer.btf import Btf, kernel_btf
from tracer.host import kernel_symbols, kernel_version, runs_svm
from tracer.offsets import FAULT_MEMBERS, Layout, kernel_layout
from tracer.points import EXIT_IN_MEMORY, PHYSICAL, RIP_IN_MEMORY, Hook, Point, Probe
from tracer.probes import HOOKS, IOCTL_KINDS, PROBES, SCHED_KINDS, SCHED_PREV_STATE
from tracer.program import Chosen, program
from tracer.tracefs import Field

IOCTL_PROGRAMS = (("syscalls:sys_enter_ioctl", "ioctl_enter"), ("syscalls:sys_exit_ioctl", "ioctl_leave"))
_BASES = {"PAGE_OFFSET_BASE": "page_offset_base", "VMEMMAP_BASE": "vmemmap_base"}
SCHED_PROGRAMS = (("sched_switch", "sched_switched"), ("sched_wakeup", "sched_woken"))


@dataclass(frozen=True)
class Attachment:
    """What became of one probe: `how` is the attachment, or "none" with the reason in `why`; a hook has no kind."""

    kind: str
    point: str
    how: str
    why: str = ""

    def metadata(self) -> dict[str, str]:
        return {"kind": self.kind, "point": self.point, "how": self.how, "why": self.why}


@dataclass
class ProbePlan:
    """Which probes this kernel allows, and how; made without root as far as that goes."""

    chosen: list[Chosen] = field(default_factory=list)
    attachments: list[Attachment] = field(default_factory=list)
    hooks: list[Attachment] = field(default_factory=list)
    scheduler: bool = False  # whether the programs of SCHED_PROGRAMS are to be attached
    ioctls: bool = False  # whether those of IOCTL_PROGRAMS are

    @property
    def shown(self) -> frozenset[str]:
        """The kinds of which some probe is attached."""
        return frozenset(attachment.kind for attachment in self.attachments if attachment.how != "none")

    def refused(self, chosen: Chosen, why: str) -> None:
        """Note that the kernel refused a probe or hook."""
        kind = chosen.probe.kind if isinstance(chosen.probe, Probe) else ""
        attachments = self.attachments if kind else self.hooks
        for i, attachment in enumerate(attachments):
            if attachment == Attachment(kind, chosen.point.where, chosen.how, attachment.why):
                attachments[i] = Attachment(kind, attachment.point, "none", why)


def kprobes_available() -> bool:
    return (libbpf.PERF_OF_KPROBES / "type").exists()


def kvm_built_in() -> bool:
    return not Path("/proc/modules").exists() or "kvm " not in Path("/proc/modules").read_text()


def fentry_refused(btf: Btf) -> str:
    """Why fentry cannot be used on KVM's functions here, or "" where it can; as root by trying it."""
    if not kvm_built_in():
        return "fentry is for functions of vmlinux, and kvm is a module"
    nothing = b"\xb7" + bytes(7) + b"\x95" + bytes(7)  # r0 = 0; exit
    try:
        program = libbpf.load("fentry_trial", libbpf.TRACING, nothing, libbpf.FENTRY, btf.function_id("kvm_mmu_load"))
    except OSError as error:
        return f"fentry refused by this kernel ({error.strerror})"
    try:
        os.close(libbpf.attach_traced(program))
    except OSError as error:
        return f"fentry refused by this kernel ({error.strerror})"
    finally:
        os.close(program)
    return ""


def _choose(
    probe: Probe | Hook, btf: Btf, root: Path | None, layout: Layout, fentry: str, kprobe: bool
) -> list[Chosen] | str:
    """The points of a probe that hold on this kernel, best first, up to the one that needs nothing else of a machine.

    Or why none does.
    """
    version, symbols, why = kernel_version(), _symbols(), []
    found: list[Chosen] = []
    for point in probe.points:
        if found and not found[-1].point.needs:
            break
        if not point.since <= version < point.until:
            continue
        if point.how in ("tp", "raw"):
            fields = tracefs.tracepoint(root, point.where) if root else None
            if fields is None:
                why.append(f"no tracepoint {point.where}" if root else f"tracefs not readable: {tracefs.MOUNT_COMMAND}")
            elif point.how == "raw" and not _raw_matches(point, fields, btf, layout):
                why.append(f"raw arguments of {point.where} unknown here")
            else:
                found.append(Chosen(probe, point, point.how, fields))
            continue
        if "NOTIFIED" in point.before and "KVM_NOTIFIER" not in layout.offsets:
            why.append("the place of a VM's struct mmu_notifier is not known")
        elif fentry and not kprobe:
            why.append(f"{fentry}; no kprobes (CONFIG_KPROBES off)")
        elif point.where not in symbols:
            why.append(f"no function {point.where}")
        elif (signature := btf.signature(point.where)) and signature[: len(point.signature)] != point.signature:
            why.append(f"{point.where} has other arguments: {', '.join(signature)}")
        elif not fentry:
            found.append(Chosen(probe, point, "fentry" if point.how == "entry" else "fexit", {}))
        else:
            found.append(Chosen(probe, point, "kprobe" if point.how == "entry" else "kretprobe", {}))
    return found or "; ".join(dict.fromkeys(why)) or f"not in kernel {version[0]}.{version[1]}"


# Members that a raw probe would read: without them it would store 0, where the tracepoint has the value (7.3).
_READ = (
    (r"\bSP_", ("SP_ROLE",)),
    (r"\bKVM_USED", ("KVM_USED_PAGES",)),
    (r"\bFAULT_", (*FAULT_MEMBERS, "FAULT_CODE_SIZE")),
    (r"\b(VCPU|SHOWN)_RIP", ("VCPU_RIP",)),
    (r"\bSHOWN_RIP", ("VCPU_PROTECTED",)),
)


def _raw_matches(point: Point, fields: Mapping[str, Field], btf: Btf, layout: Layout) -> bool:
    """Whether the raw arguments are the ones the table means.

    Without module BTF those are trusted whose format is the very one that the table says, and a leading pointer.
    """
    for used, members in _READ:
        if any(re.search(used, text) for text in point.fill.values()) and not layout.offsets.keys() >= set(members):
            return False
    if point.printed and fields.keys() != set(point.printed):
        return False
    signature = btf.signature("__traceiter_" + point.where.split(":")[1])
    if signature is None:
        return bool(point.printed) or len(point.signature) == 1
    return signature[1 : 1 + len(point.signature)] == point.signature


def kernel_bases() -> dict[str, int]:
    """Addresses of the variables holding the direct map's and the page array's start; empty where symbols hide them."""
    symbols = _symbols()
    return {macro: symbols[name] for macro, name in _BASES.items() if symbols.get(name)}


def svm_vmcb() -> int:
    """Where in a struct kvm_vcpu, the first member of a struct vcpu_svm, the pointer to its VMCB is; 0 without SVM."""
    return _svm_vmcb() if runs_svm() else 0


@lru_cache(maxsize=1)
def _svm_vmcb() -> int:
    btf = Btf(module="kvm_amd")
    vcpu, vmcb = btf.member("vcpu_svm", "vcpu"), btf.member("vcpu_svm", "vmcb")
    return vmcb.offset if vcpu and vmcb and vcpu.offset == 0 else 0


def machine_has() -> frozenset[str]:
    """What points may need and what is there on this machine."""
    there = {
        RIP_IN_MEMORY: runs_svm(),
        EXIT_IN_MEMORY: bool(svm_vmcb()),
        PHYSICAL: "PAGE_OFFSET_BASE" in kernel_bases(),
    }
    return frozenset(need for need, has in there.items() if has)


@lru_cache(maxsize=1)
def _symbols() -> dict[str, int]:
    table: tuple[Probe | Hook, ...] = (*PROBES, *HOOKS)
    functions = {point.where for each in table for point in each.points if ":" not in point.where}
    return kernel_symbols(functions, _BASES.values())


@lru_cache(maxsize=1)
def this_layout() -> Layout:
    """The running kernel's layout, looked up once."""
    return kernel_layout(kernel_btf(), kernel_version(), kernel_bases())


@dataclass(frozen=True)
class Choices:
    """For every probe and hook of the table the points that hold on this kernel, or why none does."""

    probes: list[tuple[Probe, list[Chosen] | str]]
    hooks: list[tuple[Hook, list[Chosen] | str]]
    prev_state: str  # how a sched_switch tells the state of the task that leaves; empty where that is not known
    syscalls: bool  # whether the tracepoints of system calls are to be seen
    has: frozenset[str]  # what of the points' needs this machine has

    def text(self, btf: Btf, layout: Layout) -> str:
        """The C text of all of them, whatever is to be recorded, for every machine with this kernel."""
        chosen = [one for _, each in (*self.probes, *self.hooks) if not isinstance(each, str) for one in each]
        arguments = {c.point.where: len(btf.signature(c.point.where) or ()) for c in chosen if c.how == "fexit"}
        return program(chosen, layout, arguments, self.prev_state)


def choices() -> Choices:
    """How each probe and hook can be observed here."""
    btf, layout, root = kernel_btf(), this_layout(), tracefs.tracefs()
    fentry, kprobe = fentry_refused(btf), kprobes_available()
    signature = btf.signature("__traceiter_sched_switch") or ()
    return Choices(
        [(probe, _choose(probe, btf, root, layout, fentry, kprobe)) for probe in PROBES],
        [(hook, _choose(hook, btf, root, layout, fentry, kprobe)) for hook in HOOKS],
        SCHED_PREV_STATE.get(signature[1:], ""),
        root is not None,
        machine_has(),
    )


def _best(choice: list[Chosen], has: frozenset[str]) -> Chosen:
    """The first that this machine can use; the last needs nothing."""
    return next((each for each in choice if each.point.needs in has), choice[-1])


def _instead(probe: Probe, taken: Chosen, choice: list[Chosen]) -> str:
    """Which point would have been better, and what of this machine it lacks; empty where the taken one is the best."""
    if choice[0] != taken:
        return f"instead of {choice[0].how} {choice[0].point.where}, which needs {choice[0].point.needs}"
    here = (taken.point.how, taken.point.where)
    skipped = [each for each in probe.points[: probe.points.index(taken.point)] if (each.how, each.where) != here]
    return f"instead of {skipped[0].how} {skipped[0].where}" if skipped else ""


def plan(kinds: frozenset[str], among: Choices) -> ProbePlan:
    """What is to be attached for `kinds`."""
    made = ProbePlan()
    for probe, choice in among.probes:
        if probe.kind not in kinds:
            continue
        if isinstance(choice, str):
            made.attachments.append(Attachment(probe.kind, probe.points[0].where, "none", choice))
        else:
            taken_here = _best(choice, among.has)
            made.chosen.append(taken_here)
            made.attachments.append(
                Attachment(probe.kind, taken_here.point.where, taken_here.how, _instead(probe, taken_here, choice))
            )
    taken = {(chosen.how, chosen.point.where) for chosen in made.chosen}
    for hook, choice in among.hooks:
        if kinds.isdisjoint(hook.serves):
            continue
        if isinstance(choice, str):
            made.hooks.append(Attachment("", hook.points[0].where, "none", choice))
            continue
        (only,) = choice
        if (only.how, only.point.where) not in taken:  # else the probe there does the same
            made.chosen.append(only)
            made.hooks.append(Attachment("", only.point.where, only.how))
    for kind in SCHED_KINDS:
        if kind in kinds:
            where = ", ".join(f"sched:{name}" for name, _ in SCHED_PROGRAMS)
            why = "" if among.prev_state else "raw arguments of sched:sched_switch unknown here"
            made.attachments.append(Attachment(kind, where, "none" if why else "raw", why))
    for kind in IOCTL_KINDS:
        if kind in kinds:
            made.attachments.append(
                Attachment(kind, "syscalls:sys_enter_ioctl, sys_exit_ioctl", "tp" if among.syscalls else "none")
            )
    made.scheduler = bool(among.prev_state) and not kinds.isdisjoint(SCHED_KINDS)
    made.ioctls = not kinds.isdisjoint(IOCTL_KINDS)
    return made
