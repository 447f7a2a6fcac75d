# SPDX-License-Identifier: Apache-2.0
"""Tables of a report as lines of plain text."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.report_model.report_table import Column, ReportTable
from traces.command_line import layout
from traces.command_line.layout import TextColumn


def aligned(table: ReportTable, columns: Sequence[Column], rows: int) -> list[str]:
    """Return the header and the first rows as lines, columns at least two blanks apart, numbers to the right."""
    cells = [[column.title for column in columns], *table.texts(tuple(columns), rows)]
    return layout.aligned(cells, [column.right for column in columns])


def fitted(table: ReportTable, columns: Sequence[Column], rows: int, width: int) -> list[str]:
    """Return the rows as lines of this width: as a table, as a transposed one, else as a paragraph for each row."""
    shown = [TextColumn(column.title, column.right) for column in columns]
    return layout.fitted(shown, list(table.texts(tuple(columns), rows)), width)
