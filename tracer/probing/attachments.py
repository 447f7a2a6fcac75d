# SPDX-License-Identifier: Apache-2.0
"""How each probe of the table is attached on this kernel: by the first of its points that holds, or why by none."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tracer.probing import libbpf, tracefs
from tracer.probing.btf import Btf, kernel_btf
from tracer.probing.host import kernel_symbols, kernel_version, runs_svm
from tracer.probing.offsets import FAULT_MEMBERS, Layout, kernel_layout
from tracer.probing.points import EXIT_IN_MEMORY, PHYSICAL, RIP_IN_MEMORY, Hook, Point, Probe
from tracer.probing.probes import HOOKS, IOCTL_KINDS, PROBES, SCHED_KINDS, SCHED_PREV_STATE
from tracer.probing.program import Chosen, program
from tracer.probing.tracefs import Field

IOCTL_PROGRAMS = (("syscalls:sys_enter_ioctl", "ioctl_enter"), ("syscalls:sys_exit_ioctl", "ioctl_leave"))
_BASES = {"PAGE_OFFSET_BASE": "page_offset_base", "VMEMMAP_BASE": "vmemmap_base"}
# From 7.0 on (a46023d5616e) what is attached to a tracepoint can be preempted. A raw program that is keeps others on
# its CPU from running it: of three vCPUs on 7.3 faults and exits were missing. A classic one still disables preemption.
_PREEMPTED = (7, 0)
SCHED_PROGRAMS = (("sched_switch", "sched_switched"), ("sched_wakeup", "sched_woken"))


@dataclass(frozen=True)
class Attachment:
    """How one probe or hook is attached.

    `how` is the type of attachment, or "none" with the reason in `why`. A hook has an empty `kind`.
    """

    kind: str
    point: str
    how: str
    why: str = ""

    def metadata(self) -> dict[str, str]:
        return {"kind": self.kind, "point": self.point, "how": self.how, "why": self.why}


@dataclass
class ProbePlan:
    """Which probes and hooks this kernel allows, and how they are attached; made without root as far as possible."""

    chosen: list[Chosen] = field(default_factory=list)
    attachments: list[Attachment] = field(default_factory=list)
    hooks: list[Attachment] = field(default_factory=list)
    scheduler: bool = False  # whether the programs of SCHED_PROGRAMS are to be attached
    ioctls: bool = False  # whether those of IOCTL_PROGRAMS are

    @property
    def shown(self) -> frozenset[str]:
        """The kinds of event for which some probe is attached."""
        return frozenset(attachment.kind for attachment in self.attachments if attachment.how != "none")

    def refused(self, chosen: Chosen, why: str) -> None:
        """Note that the kernel refused to attach a probe or hook, and why."""
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
    """Return why fentry cannot be used on KVM's functions here, or "" where it can; a trial program shows it."""
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
    """Return the points of a probe that hold on this kernel, best first, or why none does.

    The list ends with the first point that needs nothing else of a machine, because no later one would be used.
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
            elif point.how == "raw" and version >= _PREEMPTED and _classic_shows_it(probe, point):
                why.append("a raw probe may be preempted here, and its CPU then skips others")
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
    """Whether the raw arguments of a tracepoint are those that the table means.

    Without module BTF they are trusted where the format has exactly the fields that the table says, or where only the
    first argument, a pointer, is used.
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


def _classic_shows_it(probe: Probe | Hook, raw: Point) -> bool:
    """Whether the same tracepoint's fields fill all that its raw arguments do."""
    classic = (point for point in probe.points if point.how == "tp" and point.where == raw.where)
    return any(point.fill.keys() >= raw.fill.keys() for point in classic)


def kernel_bases() -> dict[str, int]:
    """Return where the kernel keeps page_offset_base and vmemmap_base; empty where symbols are hidden."""
    symbols = _symbols()
    return {macro: symbols[name] for macro, name in _BASES.items() if symbols.get(name)}


def svm_vmcb() -> int:
    """Return the offset of the VMCB's pointer in a struct vcpu_svm, which begins with its kvm_vcpu; 0 without SVM."""
    return _svm_vmcb() if runs_svm() else 0


@lru_cache(maxsize=1)
def _svm_vmcb() -> int:
    btf = Btf(module="kvm_amd")
    vcpu, vmcb = btf.member("vcpu_svm", "vcpu"), btf.member("vcpu_svm", "vmcb")
    return vmcb.offset if vcpu and vmcb and vcpu.offset == 0 else 0


def machine_has() -> frozenset[str]:
    """Return which of the things that points may need (`Point.needs`) this machine has."""
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
    """Return the running kernel's layout, which is looked up once."""
    return kernel_layout(kernel_btf(), kernel_version(), kernel_bases())


@dataclass(frozen=True)
class Choices:
    """For every probe and hook of the table, the points that hold on this kernel, or why none does."""

    probes: list[tuple[Probe, list[Chosen] | str]]
    hooks: list[tuple[Hook, list[Chosen] | str]]
    prev_state: str  # C for the state of the task that a sched_switch takes off its CPU; empty: not known
    syscalls: bool  # whether tracefs shows the tracepoints of system calls
    has: frozenset[str]  # which of the things that points need this machine has

    def text(self, btf: Btf, layout: Layout) -> str:
        """Return the C text of all points, whatever is to be recorded: it is for every machine with this kernel."""
        chosen = [one for _, each in (*self.probes, *self.hooks) if not isinstance(each, str) for one in each]
        arguments = {c.point.where: len(btf.signature(c.point.where) or ()) for c in chosen if c.how == "fexit"}
        return program(chosen, layout, arguments, self.prev_state)


def choices() -> Choices:
    """Return how each probe and hook can be observed on this kernel."""
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
    """Return the first point that this machine can use; the last one needs nothing."""
    return next((each for each in choice if each.point.needs in has), choice[-1])


def _instead(probe: Probe, taken: Chosen, choice: list[Chosen]) -> str:
    """Return which better point was not taken, and what it needs; empty where the taken one is the best."""
    if choice[0] != taken:
        return f"instead of {choice[0].how} {choice[0].point.where}, which needs {choice[0].point.needs}"
    here = (taken.point.how, taken.point.where)
    skipped = [each for each in probe.points[: probe.points.index(taken.point)] if (each.how, each.where) != here]
    return f"instead of {skipped[0].how} {skipped[0].where}" if skipped else ""


def plan(kinds: frozenset[str], among: Choices) -> ProbePlan:
    """Return what is to be attached to record `kinds`."""
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
