# SPDX-License-Identifier: Apache-2.0
"""Tables of a report: the rows of a query with the columns that are shown, as text and as exact values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis.report_model.units import Unit, format_value, span


@dataclass(frozen=True)
class Column:
    """A column as shown.

    `name` is its name in the frame; with `high`, a value lies between `name` and that column. `wide` is 1 where the
    column is left out of 72 columns, 2 where a terminal that is too narrow leaves it out first. `signed` is for
    changes, which are shown with their sign.
    """

    name: str
    title: str
    unit: Unit = Unit.COUNT
    high: str = ""
    wide: int = 0
    signed: bool = False

    @property
    def key(self) -> str:
        """The column's name in JSON: without `_low` where it is an interval."""
        return self.name.removesuffix("_low") if self.high else self.name

    @property
    def right(self) -> bool:
        """Whether the column is aligned to the right."""
        return self.unit is not Unit.TEXT

    def text(self, row: dict[str, Any]) -> str:
        if self.high:
            return span(row[self.name], row[self.high], self.unit, signed=self.signed)
        return format_value(row[self.name], self.unit, signed=self.signed)

    def value(self, row: dict[str, Any]) -> Any:
        """Return the exact value: a number or text, null (for 0 / 0 as well), or [low, high] where the two differ."""
        low = _exact(row[self.name])
        high = _exact(row[self.high]) if self.high else low
        return low if low == high else [low, high]


def _exact(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class ReportTable:
    """Rows of a query, as they are shown.

    `query` is the query's name: `kvmtrace export FILE --csv QUERY` gives all of its rows and columns. Where the table
    is not `exported`, as in a report on a fleet, it is the table's name only. `first` is how many rows a first screen
    has room for; `more` says that there are rows which are not in `frame`. A screen that is too small shortens other
    tables than those that are `kept`.
    """

    query: str
    title: str
    columns: tuple[Column, ...]
    frame: pl.DataFrame
    note: str = ""
    first: int = 4
    more: bool = False
    kept: bool = False
    exported: bool = True

    def texts(self, columns: tuple[Column, ...] | None = None, rows: int | None = None) -> list[list[str]]:
        """Return the cells as text, row by row."""
        chosen = self.columns if columns is None else columns
        frame = self.frame if rows is None else self.frame.head(rows)
        return [[column.text(row) for column in chosen] for row in frame.iter_rows(named=True)]

    def values(self) -> list[dict[str, Any]]:
        """Return the exact values of the cells, row by row."""
        return [{column.key: column.value(row) for column in self.columns} for row in self.frame.iter_rows(named=True)]

    def heading(self, rows: int) -> str:
        """Return the title with the query's name, how many rows there are besides these, and the note."""
        left = len(self.frame) - rows
        more = [f"more than {max(left, 0):,} more"] if self.more else [f"{left:,} more"] if left > 0 else []
        said = [*([f"query {self.query}"] if self.exported else []), *more, *([self.note] if self.note else [])]
        return f"{self.title} ({', '.join(said)})" if said else self.title

    @property
    def narrow(self) -> tuple[Column, ...]:
        """The columns that are shown in 72 characters."""
        return self.up_to(0)

    def up_to(self, wide: int) -> tuple[Column, ...]:
        """Return the columns whose `Column.wide` is at most `wide`."""
        return tuple(column for column in self.columns if column.wide <= wide)
