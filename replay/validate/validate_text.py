"""What `kvmtrace validate` says: a document for programs, one screen for people."""

from __future__ import annotations

from typing import Any, Final

from rich.table import Table
from rich.text import Text

from replay.validate.compare import ConformanceReport
from replay.validate.row_tuples import RowTuple
from replay.validate.threads import Divergence, MatchTally
from traces.screen import page, text_of
from traces.text import count, printable

WIDTH: Final = 110
# Of the document. 1 said `reproduced` and `wrong` for `matched` and `mismatched`; 2 had no `not_modelled`.
SCHEMA: Final = 3
_HEX: Final = frozenset(("role", "old", "new", "table", "addr", "code", "value", "rip"))
_PLACE: Final = frozenset(("seq", "time", "cpu", "kind"))


def to_dict(report: ConformanceReport) -> dict[str, Any]:
    """The document of `kvmtrace validate --json`."""
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
    """The verdict in one line; a share is never rounded up to 100 %, and is one of what is modelled."""
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
    """One screen, plain text where standard output is no terminal."""
    console = page(WIDTH)
    console.print(Text(printable(headline(report)), style="bold green" if report.holds else "bold red"), soft_wrap=True)
    console.print(_kinds(report))
    for kind, rows in report.not_modelled.items():
        console.print(Text(f"not modelled, of nested guests' own paging: {rows:,} {kind}"), soft_wrap=True)
    for note in report.notes:
        console.print(Text(printable(f"note: {note}")), soft_wrap=True)
    for vm in report.vms:
        for line in _divergence(vm.vm, vm.first) if vm.first is not None else ():
            console.print(Text(printable(line)), soft_wrap=True)
    return text_of(console)


def _share(part: int, whole: int) -> str:
    return "100 %" if part == whole else f"{int(10_000 * part / whole) / 100:.2f} %"


def _kinds(report: ConformanceReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("response of the MMU")
    for name in ("matched", "mismatched", "missing", "share"):
        table.add_column(name, justify="right")
    for kind, tally in report.tallies.items():
        table.add_row(kind, *(f"{count or '':,}" if count else "" for count in _counts(tally)), _of(tally))
    return table


def _counts(tally: MatchTally) -> tuple[int, int, int]:
    return tally.matched, tally.mismatched, tally.missing


def _of(tally: MatchTally) -> str:
    return _share(tally.matched, sum(_counts(tally)))


def _divergence(vm: int, first: Divergence) -> list[str]:
    return [
        f"VM {vm}, first divergence at row {first.row.seq}: {first.why}",
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
