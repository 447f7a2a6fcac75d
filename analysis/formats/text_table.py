"""Tables as lines of plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Final

from analysis.report import Column, ReportTable

GAP: Final = 2


def aligned(table: ReportTable, columns: Sequence[Column], rows: int) -> list[str]:
    """The header and the first rows, columns at least two blanks apart, numbers to the right."""
    cells = [[column.title for column in columns], *table.texts(tuple(columns), rows)]
    return _lines(cells, [column.right for column in columns])


def turned(table: ReportTable, columns: Sequence[Column], rows: int) -> list[str]:
    """The same, a row of the table a column: for few rows that are too wide."""
    cells = [[column.title for column in columns], *table.texts(tuple(columns), rows)]
    return _lines(list(zip(*cells, strict=True)), [False, *[True] * (len(cells) - 1)])


def _lines(cells: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        (" " * GAP)
        .join(
            cell.rjust(width) if to else cell.ljust(width) for cell, width, to in zip(row, widths, right, strict=True)
        )
        .rstrip()
        for row in cells
    ]


def fitted(table: ReportTable, columns: Sequence[Column], rows: int, width: int) -> list[str]:
    """The rows within this width: as a table, as one that is turned, else a paragraph a row."""
    for laid in (aligned, turned):
        lines = laid(table, columns, rows)
        if max(map(len, lines)) <= width:
            return lines
    return listed(table, columns, rows, width)


def listed(table: ReportTable, columns: Sequence[Column], rows: int, width: int) -> list[str]:
    """The same where there is no room for columns: a paragraph a row."""
    lines = []
    for texts in table.texts(tuple(columns), rows):
        pairs = [f"{column.title} {text}" for column, text in zip(columns, texts, strict=True)]
        lines += wrapped("; ".join(pairs), width)
    return lines


def wrapped(text: str, width: int, indent: str = "  ") -> list[str]:
    """Text in lines of at most this width, all but the first indented."""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
