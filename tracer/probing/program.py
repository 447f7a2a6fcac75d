# SPDX-License-Identifier: Apache-2.0
"""The BPF program, as C text for bcc: one small function per probe that fills one fixed-size record.

Counting comes before everything: a record is first counted as emitted, then reserved in the ring; if the ring refuses,
it is counted as lost, and the next record that fits on that CPU is preceded by a `gap` record. Counters are per CPU,
and added to atomically because a probe in an interrupt (RCU callbacks) may run between the two halves of an addition.
Programs return 1: a 0 from a tracepoint's program would take the event away from everybody else's perf as well.
The C that does not depend on the kernel lies in `ebpf/`; what is generated here is one function per probe.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tracer.probing.offsets import Layout
from tracer.probing.points import Hook, Point, Probe
from tracer.probing.probes import IOCTL_KINDS, SCHED_KINDS
from tracer.probing.tracefs import Field
from tracer.ring import MAX_RINGS
from traces.schema import BY_NAME, RECORD_FIELDS, RECORD_SIZE

KIND_SLOTS = 64  # the gap mask is one bit a kind
MAX_THREADS = 65536
# What userspace reads and writes of the structs of ebpf/state.c, by their names there.
THREAD = np.dtype({"names": ["tid", "tgid", "comm"], "formats": ["u4", "u4", "S16"], "offsets": [104, 108, 132],
                   "itemsize": 152})  # fmt: skip
SETTINGS = np.dtype([("page_offset", "u8"), ("vmemmap", "u8"), ("page_offset_at", "u8"), ("vmemmap_at", "u8"),
                     ("svm_vmcb", "u8"), ("kinds", "u8"), ("pid_ns", "u8"), ("pid_ns_level", "u4"),
                     ("filter_tgid", "u4"), ("look_at", "u8"), ("first_fd", "u4"), ("part", "u4"),
                     ("files", "u4", 18)])  # fmt: skip
COUNTERS = np.dtype([("emitted", "u8", KIND_SLOTS), ("lost", "u8", KIND_SLOTS), ("gap_count", "u8"),
                     ("gap_kinds", "u8"), ("gap_since", "u8")])  # fmt: skip

_CTYPES = {"u8": "u64", "u4": "u32", "i4": "s32", "u2": "u16", "i2": "s16", "u1": "u8"}

_SOURCES = Path(__file__).parents[1] / "ebpf"
_PARTS = ("state.c", "helpers.c", "ioctl.c", "sched.c", "snapshot.c")


@dataclass(frozen=True)
class Chosen:
    """A probe or hook with the point that holds on this kernel and, for a tracepoint, the fields of its format."""

    probe: Probe | Hook
    point: Point
    how: str  # tp, raw, kprobe, kretprobe, fentry, fexit
    fields: Mapping[str, Field]

    @property
    def kind(self) -> str:
        """The kind of event that it records; empty for a hook."""
        return self.probe.kind if isinstance(self.probe, Probe) else ""

    @property
    def only_tells(self) -> bool:
        """Whether it only writes rows, and nothing that other probes write depends on it."""
        return bool(self.kind) and not self.point.before and not self.point.after

    @property
    def function(self) -> str:
        """The name of its C function."""
        return f"on_{self.kind or 'hook'}_{self.how}_" + re.sub(r"\W", "_", self.point.where)


def _expand(expression: str, chosen: Chosen, arguments: int) -> str:
    """Return the C text of a table's expression: fields, arguments and return value as this attachment has them."""

    def field(match: re.Match[str]) -> str:
        found = chosen.fields.get(match["name"])
        if found is None:
            return "0"
        return f"(*({found.ctype} *)((u8 *)ctx + {found.offset}))"

    def ctype(match: re.Match[str]) -> str:
        return chosen.fields[match["name"]].ctype

    def argument(match: re.Match[str]) -> str:
        index = match["index"]
        if chosen.how == "raw":
            return f"(((struct bpf_raw_tracepoint_args *)ctx)->args[{index}])"
        if chosen.how in ("fentry", "fexit"):
            return f"(((u64 *)ctx)[{arguments if index == 'ret' else index}])"
        if index == "ret":
            return "((u64)PT_REGS_RC((struct pt_regs *)ctx))"
        return f"((u64)PT_REGS_PARM{int(index) + 1}((struct pt_regs *)ctx))"

    expression = re.sub(r"#(?P<name>\w+)", ctype, expression)
    expression = re.sub(r"\$(?P<optional>\??)(?P<name>\w+)", field, expression)
    return re.sub(r"@(?P<index>ret|\d)", argument, expression)


def _function(chosen: Chosen, arguments: int) -> str:
    point = chosen.point
    if isinstance(chosen.probe, Hook):
        return "\n".join(
            (
                f"int {chosen.function}(void *ctx)",
                "{",
                "    struct thread local;",
                "    struct thread *self = current_thread(&local);",
                f"    {_expand(point.before, chosen, arguments)}",
                "    return 1;",
                "}",
                "",
            )
        )
    kind = BY_NAME[chosen.probe.kind]
    fill = {name: _expand(text, chosen, arguments) for name, text in point.fill.items()}
    words = [fill.get(column, "0") for column in kind.words]
    values = {
        "root": fill.get("root", "0"),
        **{f"w{i}": words[i] if i < len(words) else "0" for i in range(4)},
        "role": fill.get("role", "0"),
        "n": fill.get(kind.count, "0") if kind.count else "0",
        "level": fill.get("level", "0"),
        "flags": fill.get("flags", "0"),
        "as_id": fill.get("as_id", "0"),
    }
    vcpu = fill.get("vcpu")
    kvm = fill.get("kvm") or ("vcpu_kvm(vcpu)" if vcpu else "CONTEXT_KVM(self)")
    lines = [
        f"int {chosen.function}(void *ctx)",
        "{",
        "    struct thread local;",
        "    struct thread *self = nobody(&local);"
        if point.in_interrupt
        else "    struct thread *self = current_thread(&local);",
    ]
    if point.shared:
        lines.append(f"    {_expand(point.shared, chosen, arguments)}")
    if point.only_if:
        lines.append(f"    if (!({_expand(point.only_if, chosen, arguments)})) return 1;")
    if point.before:
        lines.append(f"    {_expand(point.before, chosen, arguments)}")
    if vcpu:
        lines.append(f"    u64 vcpu = (u64)({vcpu});")
    lines += [f"    u64 kvm = {kvm};"]
    lines += [f"    u64 v_{name} = (u64)({text});" for name, text in values.items() if text != "0"]
    lines += [f"    struct event *e = reserve(self, {kind.code}, kvm);", "    if (e) {"]
    lines += [f"        e->{name} = {f'v_{name}' if text != '0' else '0'};" for name, text in values.items()]
    if vcpu:
        lines.append("        e->vcpu = vcpu_id(vcpu);")
    if point.in_interrupt:
        lines.append("        e->tid = e->tgid = 0;")
    lines += ["        submit(e);", "    }"]
    if point.after:
        lines.append(f"    {_expand(point.after, chosen, arguments)}")
    return "\n".join([*lines, "    return 1;", "}", ""])


def program(
    chosen: Iterable[Chosen], layout: Layout, arguments: Mapping[str, int] | None = None, prev_state: str = ""
) -> str:
    """Return the whole C text; `arguments` has the number of parameters of each fexit function.

    `prev_state` is the C expression for the state of the task that a sched_switch takes off its CPU; empty where that
    is not known. Nothing in the text depends on what is recorded, or on this boot or machine: such things are in the
    map `settings`.
    """
    fields = " ".join(f"{_CTYPES[ctype]} {name};" for name, ctype in RECORD_FIELDS)
    kinds = [f"#define KIND_{name} {BY_NAME[name].code}" for name in (*IOCTL_KINDS, "vm_destroy", *SCHED_KINDS)]
    if prev_state:
        kinds.append(f"#define PREV_STATE(ctx, prev) {prev_state}")
    return "\n".join(
        (
            "#include <uapi/linux/ptrace.h>",
            "#include <uapi/linux/bpf.h>",
            layout.defines(),
            *kinds,
            f"#define RINGS {MAX_RINGS}",
            f"#define MAX_THREADS {MAX_THREADS}",
            f"struct event {{ {fields} }};",
            f'_Static_assert(sizeof(struct event) == {RECORD_SIZE}, "record size");',
            *((_SOURCES / part).read_text(encoding="utf-8") for part in _PARTS),
            *_same_layout("thread", THREAD),
            *_same_layout("config", SETTINGS),
            *_same_layout("percpu", COUNTERS),
            *(_function(c, (arguments or {}).get(c.point.where, 0)) for c in chosen),
        )
    )


def _same_layout(struct: str, dtype: np.dtype[Any]) -> list[str]:
    """Return C assertions that do not compile unless a struct has the layout that userspace assumes."""
    lines = [f'_Static_assert(sizeof(struct {struct}) == {dtype.itemsize}, "size of {struct}");']
    for name, (_, offset, *_) in (dtype.fields or {}).items():
        lines.append(f'_Static_assert(__builtin_offsetof(struct {struct}, {name}) == {offset}, "{struct}.{name}");')
    return lines
