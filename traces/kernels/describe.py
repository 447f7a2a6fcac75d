# SPDX-License-Identifier: Apache-2.0
"""What a kernel version does, or what changed between two, as a document for programs and as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, Final

from traces.command_line import screen
from traces.kernels import stored
from traces.kernels.changes import CHANGES, Change
from traces.kernels.fold import at, changes_between, newer_than_known
from traces.kernels.kernel import Kernel
from traces.kernels.policies import MEANINGS

_LABEL: Final = 18  # characters of the left column
_LEVELS: Final = {0: "its own", 1: "4 KiB", 2: "2 MiB", 3: "1 GiB"}


def every_change() -> tuple[dict[str, Any], str]:
    """Return the whole list of changes, as a document and as text."""
    head = f"What changed in KVM's MMU since 5.10, as far as kvmtrace needs it ({len(CHANGES)} changes)."
    text = f"{textwrap.fill(head, screen.width())}\n\n{_listed(CHANGES)}"
    return {"changes": [_change(change) for change in CHANGES]}, text


def one(version: str) -> tuple[dict[str, Any], str]:
    """Return what a kernel version does, as a document and as text. Raises Problem for what is no version."""
    kernel = at(version)
    held = [change for change in CHANGES if change.holds(kernel.version)]
    note = newer_than_known(kernel.version)
    lines = [f"KVM's MMU in Linux {kernel.name}", *_noted([kernel])]
    for title, rows in _groups(kernel):
        lines += ["", title]
        for label, value in rows:
            lines += _row(label, value)
    text = "\n".join(lines) + f"\n\nWhat made it so ({len(held)} changes since 5.10)\n" + _listed(held)
    return {"kernel": stored.document(kernel), "changes": [_change(change) for change in held], "note": note}, text


def two(old: str, new: str) -> tuple[dict[str, Any], str]:
    """Return what changed between two versions, as a document and as text. Raises Problem for what is no version."""
    before, after = at(old), at(new)
    gained, lost = changes_between(before.version, after.version)
    was, now = stored.document(before), stored.document(after)
    named = ("name", "version")
    fields = {name: [was[name], now[name]] for name in was if name not in named and was[name] != now[name]}
    lines = [f"KVM's MMU, Linux {before.name} -> {after.name}", *_noted([before, after]), ""]
    if gained:
        lines += [_listed(gained)]
    if lost:
        lines += [f"{before.name} has, and {after.name} has not:", _listed(lost)]
    if not gained and not lost:
        lines += ["no change that kvmtrace knows of\n"]
    if fields:
        lines += ["In the description (--json has all):"]
        for name, (one_, other) in fields.items():
            lines += _row(name, _difference(one_, other))
    document = {
        "old": was,
        "new": now,
        "gained": [_change(change) for change in gained],
        "lost": [_change(change) for change in lost],
        "fields": fields,
        "note": " ".join(_noted([before, after])),
    }
    return document, "\n".join(lines).rstrip() + "\n"


def _noted(kernels: Iterable[Kernel]) -> Iterator[str]:
    for kernel in kernels:
        if note := newer_than_known(kernel.version):
            yield textwrap.fill(f"{kernel.name} is {note}.", screen.width())


def _groups(kernel: Kernel) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    yield "Roots (TDP MMU)", [
        ("policy", f"{kernel.policy}: {MEANINGS[kernel.policy]}"),
        ("unloaded for", ", ".join(trigger.name for trigger in sorted(kernel.unloads))),
        ("CR0.WP", "with EPT written without an exit" if kernel.guest_owns_wp else "each write of it exits"),
        ("zap_all_fast", {"invalidate": "marks roots invalid, then zaps them", "empty": "empties roots, which stay"}[
            kernel.zap_all_fast
        ]),
        ("vCPUs then", {"obsolete": "give up slots with invalid roots", "reload": "give up all slots"}[kernel.request]),
        ("role word", " ".join(name for name, _, _ in kernel.layout.fields)),
        ("", "CR0.WP and EFER.NX in it are " + ("the guest's" if kernel.layout.guest_bits else "always set")),
    ]  # fmt: skip
    yield (
        "Tables and leaves",
        [
            (
                "range zaps",
                f"remove {'whole tables, too' if kernel.zap_tables else 'leaves only'}, of "
                f"{'valid roots' if kernel.zap_leafs_once else 'all roots, by address space'}",
            ),
            ("slot deletion", "takes all roots" + (", or its leaves, as the VMM says" if kernel.slot_zap else "")),
            ("TLB flush", "for each removed table" if kernel.flush_per_table else "once for what was removed"),
            ("huge leaves", "split in place by a small fault" if kernel.split_in_place else "zapped by a small fault"),
            ("dirty logging", "splits them as it begins" if kernel.eager_split else "splits them as the guest writes"),
            ("", "puts them back as it ends" if kernel.recovers else "removes tables as it ends"),
            ("root's zap", ", then ".join(_LEVELS[level] for level in kernel.passes) or "one pass"),
            (
                "shown",
                "what was below first" if kernel.children_first else "a removed entry first, then what was below",
            ),
            ("RET_PF_*", ", ".join(f"{name} {code}" for name, code in vars(kernel.ret_pf).items() if code is not None)),
        ],
    )
    yield (
        "Events",
        [
            ("SPTE changes", "kvm_tdp_mmu_spte_changed" if kernel.spte_changed else "none of the TDP MMU"),
            ("root's creation", "kvm_mmu_get_page" if kernel.root_get_page else "no event"),
            ("table's creation", "kvm_mmu_get_page" + (", twice" if kernel.get_page_twice else "")),
            ("fast faults", "on TDP roots, too" if kernel.fast else "shadow MMU only"),
        ],
    )
    yield (
        "Locks and accounting",
        [
            (
                "mmu_lock",
                f"faults take it for {_mode(kernel.faults_share)}, loads and puts for {_mode(kernel.loads_share)}",
            ),
            ("aging", kernel.aging),
            (
                "range zap",
                f"{kernel.zap_lock} lock, {'counted' if kernel.zap_counted else 'not counted'} as a notifier",
            ),
            ("NX recovery", f"{kernel.nx_recovery} lock"),
            ("APICv inhibit", {"memslot": "deletes the APIC page's memslot", "gfn": "zaps one gfn"}[kernel.apicv]),
            ("TDP pages", {"list": "in a list under a lock", "counter": "counted"}[kernel.tdp_pages]),
            ("pte_list_desc", f"{kernel.pte_list_ext} SPTEs" if kernel.pte_list_ext else "not known"),
        ],
    )


def _mode(shared: bool) -> str:
    return "read" if shared else "write"


def _row(label: str, value: str) -> list[str]:
    indent = f"  {label:{_LABEL}}"
    return textwrap.wrap(
        value, screen.width(), initial_indent=indent, subsequent_indent=" " * len(indent), break_on_hyphens=False
    ) or [indent.rstrip()]


def _listed(changes: Iterable[Change]) -> str:
    lines = []
    for change in changes:
        since = f"{change.since[0]}.{change.since[1]}"
        sources = ", ".join(change.commits)
        if change.backports:
            backports = ", ".join(".".join(map(str, first)) for first in change.backports)
            sources += f"{'; ' if sources else ''}also {backports}"
        text = f"{change.what} ({sources})" if sources else change.what
        lines += textwrap.wrap(text, screen.width(), initial_indent=f"  {since:6}", subsequent_indent=" " * 8)
    return "\n".join(lines) + "\n"


def _change(change: Change) -> dict[str, Any]:
    return {
        "since": f"{change.since[0]}.{change.since[1]}",
        "what": change.what,
        "commits": list(change.commits),
        "backports": [".".join(map(str, first)) for first in change.backports],
        "fields": sorted(change.fields),
        "unloads": list(change.unloads),
        "points": list(change.points),
    }


def _difference(old: Any, new: Any) -> str:
    """Return two values in short; of lists and objects only what differs."""
    if isinstance(old, list) and isinstance(new, list) and all(isinstance(item, str) for item in [*old, *new]):
        gone, come = (sorted(set(one_) - set(other)) for one_, other in ((old, new), (new, old)))
        return " ".join([*(f"-{item}" for item in gone), *(f"+{item}" for item in come)])
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return "; ".join(f"{name}: {_difference(old.get(name), new.get(name))}" for name in names)
    return f"{_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:#x}" if value > 1 << 10 else str(value)
    if isinstance(value, list):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    return str(value)
