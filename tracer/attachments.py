# SPDX-License-Identifier: Apache-2.0
"""How each probe of the table is attached on this kernel: the first of its points that holds, or why none does."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tracer import libbpf, tracefs
from tracer.btf import Btf, kernel_btf
from tracer.host import kernel_symbols, kernel_version
from tracer.offsets import Layout, kernel_layout
from tracer.probes import HOOKS, IOCTL_KINDS, PROBES, SCHED_KINDS, SCHED_PREV_STATE, Hook, Point, Probe
from tracer.program import Chosen, program

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
) -> Chosen | str:
    """The first of the probe's points that holds on this kernel, or why none does."""
    version, symbols, why = kernel_version(), _symbols(), []
    for point in probe.points:
        if not point.since <= version < point.until:
            continue
        if point.how in ("tp", "raw"):
            fields = tracefs.tracepoint(root, point.where) if root else None
            if fields is None:
                why.append(f"no tracepoint {point.where}" if root else f"tracefs not readable: {tracefs.MOUNT_COMMAND}")
            elif point.how == "raw" and not _raw_matches(point, btf, layout):
                why.append(f"raw arguments of {point.where} unknown here")
            else:
                return Chosen(probe, point, point.how, fields)
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
            return Chosen(probe, point, "fentry" if point.how == "entry" else "fexit", {})
        else:
            return Chosen(probe, point, "kprobe" if point.how == "entry" else "kretprobe", {})
    return "; ".join(dict.fromkeys(why)) or f"not in kernel {version[0]}.{version[1]}"


def _raw_matches(point: Point, btf: Btf, layout: Layout) -> bool:
    """Whether the raw arguments are the ones the table means. Without module BTF only leading pointers are trusted."""
    # Members that the probe would read: without them it would store 0, where the tracepoint has the value (7.3).
    for macro, member in (("SP_", "SP_ROLE"), ("KVM_USED", "KVM_USED_PAGES")):
        if member not in layout.offsets and any(macro in text for text in point.fill.values()):
            return False
    signature = btf.signature("__traceiter_" + point.where.split(":")[1])
    if signature is None:
        return len(point.signature) == 1
    return signature[1 : 1 + len(point.signature)] == point.signature


def kernel_bases() -> dict[str, int]:
    """Addresses of the variables holding the direct map's and the page array's start; empty where symbols hide them."""
    symbols = _symbols()
    return {macro: symbols[name] for macro, name in _BASES.items() if symbols.get(name)}


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
    """For every probe and hook of the table the point that holds on this kernel, or why none does."""

    probes: list[tuple[Probe, Chosen | str]]
    hooks: list[tuple[Hook, Chosen | str]]
    prev_state: str  # how a sched_switch tells the state of the task that leaves; empty where that is not known
    syscalls: bool  # whether the tracepoints of system calls are to be seen

    def text(self, btf: Btf, layout: Layout) -> str:
        """The C text of all of them, whatever is to be recorded."""
        chosen = [each for _, each in (*self.probes, *self.hooks) if isinstance(each, Chosen)]
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
    )


def plan(kinds: frozenset[str], among: Choices) -> ProbePlan:
    """What is to be attached for `kinds`."""
    made = ProbePlan()
    for probe, choice in among.probes:
        if probe.kind not in kinds:
            continue
        if isinstance(choice, str):
            made.attachments.append(Attachment(probe.kind, probe.points[0].where, "none", choice))
        else:
            made.chosen.append(choice)
            skipped = probe.points[: probe.points.index(choice.point)]
            why = f"instead of {skipped[0].how} {skipped[0].where}" if skipped else ""
            made.attachments.append(Attachment(probe.kind, choice.point.where, choice.how, why))
    taken = {(chosen.how, chosen.point.where) for chosen in made.chosen}
    for hook, choice in among.hooks:
        if kinds.isdisjoint(hook.serves):
            continue
        if isinstance(choice, str):
            made.hooks.append(Attachment("", hook.points[0].where, "none", choice))
        elif (choice.how, choice.point.where) not in taken:  # else the probe there does the same
            made.chosen.append(choice)
            made.hooks.append(Attachment("", choice.point.where, choice.how))
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
