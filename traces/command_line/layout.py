# SPDX-License-Identifier: Apache-2.0
"""Tables and paragraphs as lines of plain text that fit a width."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

GAP: Final = 2
_FEW: Final = 4  # rows that may become columns rather than lose some


@dataclass(frozen=True)
class TextColumn:
    """A column of text; numbers are aligned to the right. Columns of the highest `level` are left out first."""

    title: str
    right: bool = True
    level: int = 0


def aligned(cells: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """Return rows of cells as lines, with columns at least two blanks apart."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        (" " * GAP)
        .join(
            cell.rjust(width) if to else cell.ljust(width) for cell, width, to in zip(row, widths, right, strict=True)
        )
        .rstrip()
        for row in cells
    ]


def turned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines, transposed, each row a column: for few rows that are too wide."""
    return aligned(list(zip(*cells, strict=True)), [False, *[True] * (len(cells) - 1)])


def parted(cells: Sequence[Sequence[str]], right: Sequence[bool], width: int) -> list[str]:
    """Return several tables one below the other, each with the columns that tell rows apart; empty if too wide."""
    titles, *rows = cells
    keys = next((n for n in range(1, len(titles)) if len({tuple(row[:n]) for row in rows}) == len(rows)), len(titles))
    lines: list[str] = []
    at = keys
    while at < len(titles):
        for end in range(len(titles), at, -1):
            kept = [*range(keys), *range(at, end)]
            part = aligned([[row[i] for i in kept] for row in cells], [right[i] for i in kept])
            if not _too_wide(part, width):
                break
        else:
            return []
        lines += part
        at = end
    return lines


def listed(cells: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return a paragraph for each row, without its empty cells: for rows that have no room as columns."""
    titles, *rows = cells
    lines = []
    for row in rows:
        pairs = [f"{title} {text}" for title, text in zip(titles, row, strict=True) if text]
        lines += wrapped("; ".join(pairs), width)
    return lines


def fitted(columns: Sequence[TextColumn], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return header and rows as lines within a width: as a table, transposed if few rows fit so, or with fewer columns.

    Where not even that fits it is in parts, or listed. Columns without any text are left out.
    """
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)] if rows else list(range(len(columns)))
    levels = sorted({columns[i].level for i in used}, reverse=True)
    for level in levels:
        kept = [i for i in used if columns[i].level <= level]
        cells = [[columns[i].title for i in kept], *([row[i] for i in kept] for row in rows)]
        whole = aligned(cells, [columns[i].right for i in kept])
        if not _too_wide(whole, width):
            return whole
        if level == levels[0] and len(rows) <= _FEW:
            whole = turned(cells)
            if not _too_wide(whole, width):
                return whole
    return parted(cells, [columns[i].right for i in kept], width) or listed(cells, width)


def whole_width(columns: Sequence[TextColumn], rows: Sequence[Sequence[str]]) -> int:
    """Return how wide a table with all of its columns is."""
    return max(map(len, aligned([[column.title for column in columns], *rows], [column.right for column in columns])))


def _too_wide(lines: Sequence[str], width: int) -> bool:
    return any(len(line) > width for line in lines)


def wrapped(text: str, width: int, indent: str = "  ") -> list[str]:
    """Return a text in lines of at most this width, all but the first indented."""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
