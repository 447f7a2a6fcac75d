"""For a terminal: one screen, the verdict first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from analysis.formats import lines
from analysis.formats.layout import aligned, wrapped
from analysis.report import Report

WIDTH: Final = 110
_NAMES: Final = 11


def render(*reports: Report) -> str:
    """One report after another, plain text."""
    return "\n".join("\n".join(_lines(report)) + "\n" for report in reports)


def _lines(report: Report) -> Iterator[str]:
    for line in lines(report):
        yield from wrapped(line, WIDTH)
    yield ""
    yield f"{'of':<{_NAMES}}{report.title}"
    for name, text in report.trust:
        yield from wrapped(f"{name:<{_NAMES - 1}} {text}", WIDTH, " " * _NAMES)
    for check in report.checks:
        if check.kind == "gate" or check.fails:
            yield from wrapped(f"{check.status.value:<{_NAMES - 1}} {check.name}: {check.why}", WIDTH, " " * _NAMES)
    yield ""
    for table in report.tables:
        if table.first:
            yield f"-- {table.heading}"
            yield from aligned(table, table.columns, table.first) if len(table.frame) else ["none"]
