"""For a terminal: one screen, the verdict first."""

from __future__ import annotations

from typing import Final

from analysis.formats import lines
from analysis.formats.text_table import aligned, wrapped
from analysis.report import Report, ReportTable

WIDTH: Final = 120
HEIGHT: Final = 40
_NAMES: Final = 11


def render(*reports: Report) -> str:
    """One report after another, plain text. What there is no room for is named in the last line."""
    return "\n".join("\n".join(_screen(report)) + "\n" for report in reports)


def _screen(report: Report) -> list[str]:
    head = [*_head(report), ""]
    tables = [(table, table.first) for table in report.tables if table.first]
    left_out = [table for table in report.tables if not table.first]
    while tables and len(head) + sum(len(_table(*each)) for each in tables) + bool(left_out) > HEIGHT:
        # The last table with rows to spare gives up one; where none has, the last one goes.
        spare = max((i for i, (table, rows) in enumerate(tables) if min(rows, len(table.frame)) > 1), default=-1)
        if spare < 0:
            left_out.insert(0, tables.pop()[0])
        else:
            tables[spare] = (tables[spare][0], min(tables[spare][1], len(tables[spare][0].frame)) - 1)
    shown = [line for each in tables for line in _table(*each)]
    named = f"-- not here, but in --format md: {', '.join(table.query for table in left_out)}"
    return [*head, *shown, *([named] if left_out else [])]


def _head(report: Report) -> list[str]:
    found = [part for line in lines(report) for part in wrapped(line, WIDTH)]
    found += ["", *wrapped(f"{'of':<{_NAMES}}{report.title}", WIDTH, " " * _NAMES)]
    for name, text in report.trust:
        found += wrapped(f"{name:<{_NAMES - 1}} {text}", WIDTH, " " * _NAMES)
    for check in report.checks:
        if check.kind == "gate" or check.fails:
            found += wrapped(f"{check.status.value:<{_NAMES - 1}} {check.name}: {check.why}", WIDTH, " " * _NAMES)
    return found


def _table(table: ReportTable, rows: int) -> list[str]:
    title = f"-- {table.heading}"
    if not len(table.frame):
        return [f"{title}: none"]
    whole = aligned(table, table.columns, rows)
    return [title, *(whole if max(map(len, whole)) <= WIDTH else aligned(table, table.up_to(1), rows))]
