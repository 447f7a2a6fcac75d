# SPDX-License-Identifier: Apache-2.0
"""The output of `kvmtrace validate`: a JSON document, or one screen of text."""

from __future__ import annotations

from typing import Any, Final

from replay.validate.compare import ConformanceReport, VmReport
from replay.validate.row_tuples import RowTuple
from replay.validate.threads import Divergence, MatchTally
from traces.command_line.layout import TextColumn
from traces.command_line.screen import VMS_SHOWN, Page
from traces.text import count

_TALLIES: Final = ("matched", "mismatched", "missing", "share")
# The version of the JSON document. Version 1 had `reproduced` and `wrong` for `matched` and `mismatched`; version 2 had
# no `not_modelled`.
SCHEMA: Final = 3
_HEX: Final = frozenset(("role", "old", "new", "table", "addr", "code", "value", "rip"))
_PLACE: Final = frozenset(("seq", "time", "cpu", "kind"))


def to_dict(report: ConformanceReport) -> dict[str, Any]:
    """Return the document of `kvmtrace validate --json`."""
    return {
        "path": str(report.path),
        "kernel": report.kernel,
        "policy": report.policy,
        "policy_by": report.policy_by,
        "holds": report.holds,
        "complete": report.complete,
        "responses": report.expected,
        "matched": report.matched,
        "share": report.matched / report.expected if report.expected else 1.0,
        "not_modelled": {
            "responses": sum(report.not_modelled.values()),
            "vms": [vm.vm for vm in report.vms if vm.not_modelled],
            "kinds": report.not_modelled,
        },
        "left_at_vm_end": report.left,
        "kinds": {
            kind: {"matched": tally.matched, "mismatched": tally.mismatched, "missing": tally.missing}
            for kind, tally in report.tallies.items()
        },
        "vms": [
            {
                "id": vm.vm,
                "process": report.names.process(vm.vm) if report.names is not None else "",
                "skipped": vm.skipped,
                "until": vm.until,
                "left": vm.left,
                "inferred_removals": vm.inferred,
                "role_words_taken": vm.role_words_taken,
                "taken": dict(vm.taken),
                "roots_mistaken": vm.mistaken,
                "not_modelled": dict(vm.not_modelled),
                "first_divergence": None if vm.first is None else {"seq": vm.first.row.seq, "why": vm.first.why},
            }
            for vm in report.vms
        ],
        "notes": report.notes,
    }


def headline(report: ConformanceReport) -> str:
    """Return the verdict in one line.

    A share below 100 % is never rounded up to it, and counts only what is modelled.
    """
    share = _share(report.matched, report.expected)
    by = f", by {report.policy_by}" if report.policy_by else ""
    where = f"{report.path} ({report.kernel}, policy {report.policy}{by})"
    left = f"; {report.left:,} tables and roots left at the end" if report.left else ""
    part = "" if report.complete else " of what could be validated (see the notes)"
    if apart := sum(report.not_modelled.values()):
        vms = count(sum(bool(vm.not_modelled) for vm in report.vms), "nested VM")
        what = f"{share} of {report.expected:,} modelled{part}; {apart:,} rows of {vms} not modelled"
        return f"{what}{left}: {where}"
    return f"{share}{part}: {report.matched:,} of {report.expected:,} responses matched{left}: {where}"


def render(report: ConformanceReport) -> str:
    """Return the report as text: the verdict, the tallies, what was not compared, and where the worst VMs diverge."""
    page = Page()
    page.say(headline(report), "bold green" if report.holds else "bold red")
    rows = [
        [kind, *(f"{number:,}" if number else "" for number in _counts(tally)), _of(tally)]
        for kind, tally in report.tallies.items()
    ]
    page.table([TextColumn("response of the MMU", right=False), *map(TextColumn, _TALLIES)], rows)
    for kind, number in report.not_modelled.items():
        page.say(f"not modelled, of nested guests' own paging: {number:,} {kind}")
    for note in report.notes:
        page.say(f"note: {note}")
    diverge = sorted((vm for vm in report.vms if vm.first is not None), key=_share_of_vm)
    for vm in diverge[:VMS_SHOWN]:
        name = report.names.vm(vm.vm) if report.names is not None else f"VM {vm.vm}"
        for line in _divergence(name, vm.first) if vm.first is not None else ():
            page.say(line, indent="        ")
    page.more(len(diverge) - VMS_SHOWN, "VMs diverge")
    return page.text


def _share_of_vm(vm: VmReport) -> float:
    matched = sum(tally.matched for tally in vm.tallies.values())
    return matched / max(sum(sum(_counts(tally)) for tally in vm.tallies.values()), 1)


def _share(part: int, whole: int) -> str:
    return "100 %" if part == whole else f"{int(10_000 * part / whole) / 100:.2f} %"


def _counts(tally: MatchTally) -> tuple[int, int, int]:
    return tally.matched, tally.mismatched, tally.missing


def _of(tally: MatchTally) -> str:
    return _share(tally.matched, sum(_counts(tally)))


def _divergence(vm: str, first: Divergence) -> list[str]:
    return [
        f"{vm}, first divergence at row {first.row.seq}: {first.why}",
        *(f"    {_line(row)}" for row in first.before),
        f" -> {_line(first.row)}",
        *(f"    {_line(row)}" for row in first.after if row.seq != first.row.seq),
    ]


def _line(row: RowTuple) -> str:
    cells = []
    for name, value in zip(row._fields, row, strict=True):
        if name not in _PLACE and (value or (name == "gfn" and value is not None)):
            cells.append(f"{name}={value:#x}" if name in _HEX else f"{name}={value}")
    return f"{row.seq} {row.kind} {' '.join(cells)}"
