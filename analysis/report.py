# SPDX-License-Identifier: Apache-2.0
"""The report: what every format renders, so that the same figures are in each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from analysis.units import Unit, format_value, span

if TYPE_CHECKING:
    from analysis.charts import Picture
    from analysis.gates import Figures
    from analysis.sources import Recording, Result

SCHEMA: Final = 1  # of the JSON format


@dataclass(frozen=True)
class Column:
    """One column as shown. `name` is the frame's; with `high` a value lies between `name` and that column.

    `wide`: 1 where it is left out of 72 columns, 2 where a terminal too small leaves it out too. `signed`: a change.
    """

    name: str
    title: str
    unit: Unit = Unit.COUNT
    high: str = ""
    wide: int = 0
    signed: bool = False

    @property
    def key(self) -> str:
        """Its name in JSON: without `_low` where it is an interval."""
        return self.name.removesuffix("_low") if self.high else self.name

    @property
    def right(self) -> bool:
        """Whether it is aligned to the right."""
        return self.unit is not Unit.TEXT

    def text(self, row: dict[str, Any]) -> str:
        if self.high:
            return span(row[self.name], row[self.high], self.unit, signed=self.signed)
        return format_value(row[self.name], self.unit, signed=self.signed)

    def value(self, row: dict[str, Any]) -> Any:
        """Exact: a number or text, null (for 0 / 0 as well), or [low, high] where the two differ."""
        low = _exact(row[self.name])
        high = _exact(row[self.high]) if self.high else low
        return low if low == high else [low, high]


def _exact(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class ReportTable:
    """A query's rows. `first`: how many of them a first screen has room for; `more`: there are rows that are not here.

    `kept`: a screen that is too small does without other tables first.

    `query` is the query's name: `kvmtrace export FILE --csv QUERY` gives all of its rows and columns. Where it is not
    `exported` it is the table's name only, as in a report on a fleet.
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
        """The cells as text, row by row."""
        chosen = self.columns if columns is None else columns
        frame = self.frame if rows is None else self.frame.head(rows)
        return [[column.text(row) for column in chosen] for row in frame.iter_rows(named=True)]

    def values(self) -> list[dict[str, Any]]:
        """The cells as they are, row by row."""
        return [{column.key: column.value(row) for column in self.columns} for row in self.frame.iter_rows(named=True)]

    def heading(self, rows: int) -> str:
        """Its title with the query that made it, how many rows there are below these, and what to know of it."""
        left = len(self.frame) - rows
        more = [f"more than {max(left, 0):,} more"] if self.more else [f"{left:,} more"] if left > 0 else []
        said = [*([f"query {self.query}"] if self.exported else []), *more, *([self.note] if self.note else [])]
        return f"{self.title} ({', '.join(said)})" if said else self.title

    @property
    def narrow(self) -> tuple[Column, ...]:
        """The columns for 72 characters."""
        return self.up_to(0)

    def up_to(self, wide: int) -> tuple[Column, ...]:
        """The columns that are no wider than this (`Column.wide`)."""
        return tuple(column for column in self.columns if column.wide <= wide)


class Status(Enum):
    """How a check came out. What cannot be decided, for the trace leaves it open, counts as failed."""

    PASSED = "passed"
    FAILED = "failed"
    UNDECIDED = "undecided"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Check:
    """A gate (`--fail-on`) or an invariant. `name` is the condition or the invariant; `why` is one line."""

    kind: str  # gate, invariant
    name: str
    status: Status
    why: str

    @property
    def fails(self) -> bool:
        return self.status in (Status.FAILED, Status.UNDECIDED)


@dataclass(frozen=True)
class Report:
    """All that is said of one trace or result.

    `verdict`: sentences, the most important first. `trust`: name and text of what the figures rest on. `figures`: all
    that gates can be on, exactly. `loss`: what is missing of the events, if anything.
    `drawn`: pictures that are made already. `listed`: a table of thousands of rows, which a page has a search for.
    `recording`, `result`: what it is made from, for formats that draw; either may be missing.
    """

    title: str
    verdict: tuple[str, ...]
    trust: tuple[tuple[str, str], ...]
    tables: tuple[ReportTable, ...]
    checks: tuple[Check, ...] = ()
    figures: Figures | None = None
    loss: str = ""
    drawn: tuple[Picture, ...] = field(default=(), compare=False)
    listed: ReportTable | None = field(default=None, compare=False)
    recording: Recording | None = field(default=None, compare=False)
    result: Result | None = field(default=None, compare=False)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.fails)

    @property
    def headline(self) -> str:
        """The first line of every format: why a check failed, if one did, else the verdict; and what was lost."""
        failed = self.failed
        if failed:
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            lost = f"; {self.loss}" if self.loss else ""
            return f"FAILED: {failed[0].name}: {failed[0].why}{more}{lost}"
        said = self.verdict[0] if self.verdict else "nothing to say"
        return f"{self.loss}: {said}" if self.loss else said

    @property
    def lines(self) -> tuple[str, ...]:
        """The first line and the rest of the verdict: the same in every format for people."""
        return (self.headline, *(self.verdict if self.failed else self.verdict[1:]))
