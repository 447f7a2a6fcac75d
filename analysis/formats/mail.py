# SPDX-License-Identifier: Apache-2.0
"""The mail format, for mailing lists: plain ASCII in 72 columns, with few rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from analysis.formats.text_table import fitted
from analysis.report_model.report import Report
from traces.command_line.layout import wrapped

WIDTH: Final = 72
ROWS: Final = 4


def render(*reports: Report) -> str:
    """Render reports one after another; no line is longer than 72 characters unless one word of it is."""
    text = "\n".join("\n".join(_lines(report)) + "\n" for report in reports)
    return text.encode("ascii", "replace").decode()


def _lines(report: Report) -> Iterator[str]:
    for line in report.lines:
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
            yield from wrapped(f"{table.heading(ROWS)}:", WIDTH)
            yield from fitted(table, table.narrow, ROWS, WIDTH)
