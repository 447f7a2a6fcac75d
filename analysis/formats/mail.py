"""For a mailing list: plain ASCII of 72 columns, few rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from analysis.formats import lines
from analysis.formats.text_table import aligned, listed, turned, wrapped
from analysis.report import Report, ReportTable

WIDTH: Final = 72
ROWS: Final = 4


def render(*reports: Report) -> str:
    """One report after another, no line longer than 72 characters unless one word of it is."""
    text = "\n".join("\n".join(_lines(report)) + "\n" for report in reports)
    return text.encode("ascii", "replace").decode()


def _lines(report: Report) -> Iterator[str]:
    for line in lines(report):
        yield from wrapped(line, WIDTH)
    yield ""
    yield from wrapped(f"of: {report.title}", WIDTH)
    for name, text in report.trust:
        yield from wrapped(f"{name}: {text}", WIDTH)
    for check in report.checks:
        if check.kind == "gate" or check.fails:
            yield from wrapped(f"{check.status.value}: {check.name}: {check.why}", WIDTH)
    yield ""
    yield "Times, roots, faults and tables: lower is better."
    for table in report.tables:
        if len(table.frame):
            yield ""
            yield from wrapped(f"{table.heading}:", WIDTH)
            yield from _table(table)


def _table(table: ReportTable) -> list[str]:
    for laid in (aligned, turned):
        rows = laid(table, table.narrow, ROWS)
        if max(map(len, rows)) <= WIDTH:
            return rows
    return listed(table, table.narrow, ROWS, WIDTH)
