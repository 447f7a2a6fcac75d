# SPDX-License-Identifier: Apache-2.0
"""The text format, for a terminal: some 60 lines, the verdict first, in its width, or 80 columns without one."""

from __future__ import annotations

from typing import Final

from analysis.formats.text_table import aligned, fitted
from analysis.report_model.report import Report
from analysis.report_model.report_table import ReportTable
from traces.command_line import screen
from traces.command_line.layout import wrapped

HEIGHT: Final = 60
_NAMES: Final = 11


def render(*reports: Report) -> str:
    """Render reports as plain text, one after another; the last line names the tables that have no room."""
    return "\n".join("\n".join(_screen(report, screen.width())) + "\n" for report in reports)


def _screen(report: Report, width: int) -> list[str]:
    head = [*_head(report, width), ""]
    tables = [(table, table.first) for table in report.tables if table.first]
    left_out = [table for table in report.tables if not table.first]
    while tables and len(head) + sum(len(_table(*each, width)) for each in tables) + bool(left_out) > HEIGHT:
        # The last table that can spare a row loses one; where none can, the last table is left out.
        spare = max(
            (i for i, (table, rows) in enumerate(tables) if min(rows, len(table.frame)) > 1 and not table.kept),
            default=-1,
        )
        if spare < 0:
            left_out.insert(0, tables.pop()[0])
        else:
            tables[spare] = (tables[spare][0], min(tables[spare][1], len(tables[spare][0].frame)) - 1)
    shown = [line for each in tables for line in _table(*each, width)]
    named = f"-- not here, but in --format md: {', '.join(table.query for table in left_out)}"
    return [*head, *shown, *(wrapped(named, width, "   ") if left_out else [])]


def _head(report: Report, width: int) -> list[str]:
    found = [part for line in report.lines for part in wrapped(line, width)]
    found += ["", *wrapped(f"{'of':<{_NAMES}}{report.title}", width, " " * _NAMES)]
    for name, text in report.trust:
        found += wrapped(f"{name:<{_NAMES - 1}} {text}", width, " " * _NAMES)
    for check in report.checks:
        if check.kind == "gate" or check.fails:
            found += wrapped(f"{check.status.value:<{_NAMES - 1}} {check.name}: {check.why}", width, " " * _NAMES)
    return found


def _table(table: ReportTable, rows: int, width: int) -> list[str]:
    title = f"-- {table.heading(rows)}"
    if not len(table.frame):
        return wrapped(f"{title}: none", width, "   ")
    whole = aligned(table, table.columns, rows)
    if max(map(len, whole)) > width:
        whole = aligned(table, table.up_to(1), rows)
    if max(map(len, whole)) > width:
        whole = fitted(table, table.narrow, rows, width)
    return [*wrapped(title, width, "   "), *whole]
