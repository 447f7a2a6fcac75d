# SPDX-License-Identifier: Apache-2.0
"""What an imported trace says of itself: where it came from, what its source cannot show, and what was inferred."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from traces import kernels
from traces.imports.findings import Findings
from traces.imports.opening import STANDARD_INPUT
from traces.imports.thread_vms import Assigned, Machine
from traces.imports.told import ToldOfText
from traces.kernels import Kernel
from traces.kernels.fold import parse_version
from traces.kernels.policies import SHADOW
from traces.kernels.printed import PLUGIN, shown_kinds, told_since
from traces.schema import KINDS
from traces.text import count, printable

_WITH_ROLES: Final = frozenset(kind.name for kind in KINDS if "role" in kind.columns)
_MOST_NAMES: Final = 100
_NEVER: Final = "no tracepoint shows it"
_NOT_THERE: Final = "not in what was imported"
_LINE: Final = 200


@dataclass(frozen=True)
class Said:
    """All that is known of a source when it has been read."""

    path: Path
    undone: Sequence[str]  # what the source was packed and wrapped in
    found: Findings
    assigned: Assigned
    options: ToldOfText
    kernel: Kernel | None
    vendor: str  # vendor_id; empty: no exit tells
    roots: bool  # roots were inferred

    @property
    def updates(self) -> tuple[str, ...]:
        """The first and last stable update that the kernel may be: a distribution's release does not say which."""
        major, minor, patch = parse_version(self.options.kernel)
        if patch or re.fullmatch(r"[\d.]+", self.options.kernel):
            return ()
        return f"{major}.{minor}.0", f"{major}.{minor}"

    @property
    def others(self) -> dict[str, int]:
        """Events that a trace has no kind for, by name: each is a row of the kind `other`, with its text."""
        names = sorted(self.found.others.items(), key=lambda item: -item[1])
        return dict(names[:_MOST_NAMES])

    @property
    def text_kinds(self) -> frozenset[str]:
        """The kinds that came as text, not as fields."""
        return frozenset(form.kind for form in self.found.forms)

    @property
    def printed_since(self) -> tuple[int, int]:
        """The version from which on kernels print all of the forms that are there; (0, 0): nothing tells."""
        return max((told_since(form) for form in self.found.forms if form.since != PLUGIN), default=PLUGIN)

    @property
    def first_odd(self) -> str:
        return printable(self.found.first_odd.decode(errors="replace"))[:_LINE]

    def remarks(self) -> list[str]:
        """What a user should know of it, one line each."""
        found, lines, text = self.found, [], self.found.kind == "text"
        if found.odd and text:
            lines.append(f"{count(found.odd, 'line')} not understood, the first: {self.first_odd}")
        elif found.odd:
            lines.append(f"{count(found.odd, 'record')} could not be read: damaged, or without the event's own data")
        if self.others:
            shown = ", ".join(f"{printable(name)} {rows:,}" for name, rows in list(self.others.items())[:3])
            of_none = count(sum(self.others.values()), "event")
            lines.append(f"{of_none} of kinds that a trace does not have, kept as text: {shown}")
        if found.cut_short:
            lines.append(
                f"{count(found.cut_short, 'event')} cut short (...), kept as text: what they lack is not known"
            )
        if found.lost or found.uncounted:
            more = f", and {count(found.uncounted, 'loss', 'losses')} without a number" if found.uncounted else ""
            lines.append(f"lost, as the {found.kind} says: {count(found.lost, 'event')}{more}")
        if found.overrun:
            lines.append(f"overwritten before it was read, as the {found.kind} says: {count(found.overrun, 'event')}")
        if found.backwards:
            lines.append(f"times go back {count(found.backwards, 'time')}: rows stand in the order of the {found.kind}")
        if found.ticks:
            lines.append("times are a clock's ticks, not nanoseconds: spans of time mean nothing")
        if found.bare:
            lines.append(f"without task and time: {count(found.bare, 'line')}, taken for the time of the line before")
        if found.relative:
            lines.append("times are since the recording began")
        if found.cut:
            lines.append(found.cut)
        if self.kernel is None and self.options.kernel:
            lines.append(f"{self.options.kernel}: older than the kernels that are described (5.10): not for replay")
        elif self.kernel is None:
            since = self.printed_since
            like = f" (its lines are as {since[0]}.{since[1]} or later prints them)" if since != PLUGIN else ""
            lines.append(f"the kernel is not in the text{like}: for replay, import it with --kernel")
        return lines


def manifest(said: Said, machines: Sequence[Machine], kinds: Mapping[str, int]) -> dict[str, Any]:
    """The manifest that compaction takes over."""
    kernel, options = said.kernel, said.options
    release = options.kernel
    made: dict[str, Any] = {
        "origin": "imported",
        "source": _source(said),
        "recorder": "",
        "command": ["kvmtrace", "import"],
        "preset": "imported",
        "host": {"kernel": release, "machine": "x86_64", "vendor": said.vendor},
        "probes": _probes(said, kinds),
        "clock": {"name": said.found.clock or "unknown", "samples": []},
        "missed": {},
        "threads": {str(tid): {"comm": comm} for tid, comm in said.assigned.comms.items()},
        "snapshot": {"vms": [_vm(number + 1, machine, options) for number, machine in enumerate(machines)]},
    }
    if kernel is not None:
        made["policy"] = _policy(said, kernel)
        made["layout"] = {
            "role": {name: list(place) for name, place in kernel.layout.shifts.items()},
            "spte": kernel.spte.to_dict(),
            "source": release,
            "missing": [],
            "table_is_physical": True,
        }
    return made


def _policy(said: Said, kernel: Kernel) -> dict[str, Any]:
    """`or` are the other policies that updates of the release have."""
    if kernel.policy == SHADOW.name:
        why = "its rows: leaves are installed, and none of them by the TDP MMU"
        return {"name": kernel.policy, "why": why, "by": "rows"}
    others = sorted({kernels.at(other).policy for other in said.updates} - {kernel.policy})
    return {"name": kernel.policy, "why": f"what {kernel.name} has", "by": "release", "or": others}


def _source(said: Said) -> dict[str, Any]:
    path, found = said.path, said.found
    inferred = list(said.assigned.inferred)
    if said.roots:
        inferred.append("roots: by order of the tables made at their level; each has a number in place of its frame")
    if said.roots and said.text_kinds & _WITH_ROLES:
        inferred.append("roles: by what the text says, in SMM by the transitions before")
    if said.options.kernel:
        by = "as the file says" if said.options.kernel == found.release else "as given"
        inferred.append(f"kernel: {said.options.kernel}, {by}")
    cannot = ["which VM", "ioctls", "what is lost but for what it says"]
    cannot += [] if said.roots else ["roots"]
    cannot += [] if said.options.slots else ["memslots"]
    return {
        "kind": found.kind,
        "path": "standard input" if path == STANDARD_INPUT else str(path),
        "undone": list(said.undone),
        "lines": found.lines,
        "joined": found.joined,
        "as_fields": found.raw,
        "others": said.others,
        "odd": found.odd,
        "overrun": found.overrun,
        "first_odd": said.first_odd,
        "printed_since": list(said.printed_since),
        "cannot_show": cannot,
        "inferred": inferred,
        "remarks": said.remarks(),
    }


def _probes(said: Said, kinds: Mapping[str, int]) -> list[dict[str, Any]]:
    """What is there was watched, as was what the source says so of; of all else a text does not tell whether it was.

    `lacks`: columns not known.
    """
    probes = []
    shown = shown_kinds()
    for kind in KINDS:
        if kind.name == "gap":
            continue
        probe: dict[str, Any] = {"kind": kind.name, "point": kind.name, "how": "none", "why": _NEVER}
        if kinds.get(kind.name):
            lacks = [] if said.roots else [name for name in ("root",) if name in kind.columns]
            if kind.name in said.text_kinds and "role" in kind.columns and said.kernel is None:
                lacks.append("role")
            if kind.name == "kvm_page_fault":
                lacks.append("role")
            if kind.name == "fast_page_fault" and said.kernel is None:
                lacks.append("ret")
            probe |= {"how": "imported", "why": "", "lacks": lacks}
        elif kind.name in said.found.watched:
            probe |= {"how": "imported", "why": "", "lacks": []}
        elif kind.name in shown:
            probe["why"] = _NOT_THERE
        probes.append(probe)
    return probes


def _vm(number: int, machine: Machine, options: ToldOfText) -> dict[str, Any]:
    slots = [slot for slot in options.slots if slot.vm in ("", machine.name)]
    return {
        "kvm": number,
        "tgid": machine.tgid,
        "comm": machine.comm,
        **({"name": machine.name} if machine.name else {}),
        "vcpus": [{"id": thread.vcpu, "tid": thread.tid} for thread in machine.threads if thread.vcpu is not None],
        "slots": [slot.to_dict(index) for index, slot in enumerate(slots)],
        "roots": [],
    }
