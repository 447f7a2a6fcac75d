# SPDX-License-Identifier: Apache-2.0
"""The Markdown format, for job summaries of GitHub and GitLab: no longer than the 1 MiB that these take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from analysis.report_model.report import Report
from analysis.report_model.report_table import ReportTable

LIMIT: Final = (1 << 20) - 1  # bytes
_ROWS: Final = (20, 5, 1, 0)
_KEPT: Final = 200  # rows of a table that is `kept`, such as that of all VMs
_MARKS: Final = re.compile(r"([\\`*_{}\[\]<>#|~&$@!])")


def render(*reports: Report) -> str:
    """Render reports one after another; if that is too long, with fewer rows, and then with fewer reports."""
    for rows in _ROWS:
        text = "\n".join("\n".join(_lines(report, rows)) + "\n" for report in reports)
        if len(text.encode()) <= LIMIT:
            return text
    parts: list[str] = []
    size = 0
    for number, report in enumerate(reports):
        part = "\n".join(_lines(report, 0)) + "\n"
        size += len(part.encode()) + 1
        if size > LIMIT - 200:
            return "\n".join(
                [*parts, f"{len(reports) - number} more reports: too long for a summary, see --format json\n"]
            )
        parts.append(part)
    return "\n".join(parts)


def escaped(text: str) -> str:
    """Escape text so that Markdown shows it as it is, in a table as well."""
    return _MARKS.sub(r"\\\1", text)


def _lines(report: Report, rows: int) -> Iterator[str]:
    first, *more = report.lines
    yield f"**{escaped(first)}**"
    yield ""
    for line in more:
        yield escaped(line)
        yield ""
    yield "| | |"
    yield "|-|-|"
    yield f"| of | {escaped(report.title)} |"
    for name, text in report.trust:
        yield f"| {name} | {escaped(text)} |"
    for check in report.checks:
        yield f"| {check.status.value} | {check.kind} {escaped(check.name)}: {escaped(check.why)} |"
    for table in report.tables:
        yield from _table(table, _KEPT if table.kept and rows == _ROWS[0] else rows) if rows else ()


def _table(table: ReportTable, rows: int) -> Iterator[str]:
    yield ""
    yield f"### {table.title}"
    yield ""
    if not len(table.frame):
        yield f"none (query `{table.query}`)" if table.exported else "none"
        return
    yield f"| {' | '.join(escaped(column.title) for column in table.columns)} |"
    yield f"|{'|'.join('-:' if column.right else '-' for column in table.columns)}|"
    for texts in table.texts(rows=rows):
        yield f"| {' | '.join(map(escaped, texts))} |"
    yield ""
    more = table.more or len(table.frame) > rows
    if table.exported:
        said = f"Query `{table.query}`{', which has more rows' if more else ''}."
    else:
        said = "There are more rows." if more else ""
    yield f"{said} {escaped(table.note)}".strip()
