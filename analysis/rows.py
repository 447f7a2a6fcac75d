"""Questions about a recording's rows, as many as there are answered in one pass over them.

Each batch of rows is decoded once, by the trace's own reader, and every question takes of it what it is about. Memory
grows with the groups of an answer (pages, roots, windows), not with rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import polars as pl

from traces.reader import Trace

# Of one batch: each question costs polars half a ms however few its rows are, and more rows at once take more memory.
BATCH_ROWS: Final = 1 << 17
_MERGED_ROWS: Final = 1 << 17  # parts are merged when they have more rows than this, and than what is merged


class Counting(Protocol):
    """One question on its way through the rows."""

    def feed(self, rows: pl.DataFrame, one_vm: bool) -> None:
        """Take the next rows, in file order. `one_vm`: `vm` is the same in all of them."""

    def answer(self) -> pl.DataFrame:
        """What the rows came to."""


class Question(Protocol):
    """What can be asked of rows. Two of one `name` are the same question."""

    @property
    def name(self) -> str:
        """It, and with which options."""

    @property
    def columns(self) -> frozenset[str]:
        """What it reads of rows."""

    def begin(self, none: pl.DataFrame) -> Counting:
        """Before the first row; `none` is a batch without rows."""


def ask(trace: Trace, questions: Sequence[Question]) -> list[pl.DataFrame]:
    """The answers, after one pass over the rows. Raises Problem where the trace is damaged."""
    wanted = frozenset({"vm"}).union(*(question.columns for question in questions))
    names = [name for name in trace.schema.names if name in wanted]
    none = pl.DataFrame(pl.from_arrow(trace.schema.empty_table().select(names)))
    counting = [question.begin(none) for question in questions]
    for rows in _frames(trace, names):
        vm = rows["vm"]
        one_vm = vm.null_count() in (0, len(vm)) and vm.min() == vm.max()
        for each in counting:
            each.feed(rows, one_vm)
    return [each.answer() for each in counting]


def _frames(trace: Trace, names: list[str]) -> Iterator[pl.DataFrame]:
    """The rows, small row groups (of many VMs) taken together."""
    waiting: list[pl.DataFrame] = []
    count = 0
    for batch in trace.batches(names, size=BATCH_ROWS):
        if waiting and count + batch.num_rows > BATCH_ROWS:
            yield pl.concat(waiting)
            waiting, count = [], 0
        waiting.append(pl.DataFrame(pl.from_arrow(batch)))
        count += batch.num_rows
    if waiting:
        yield pl.concat(waiting)


@dataclass(frozen=True, eq=False)
class Tally:
    """A group_by whose aggregates merge: of the rows `where`, by VM and by `by`, sums, least and most values.

    The answer has columns `vm`, those of `by`, `rows` (how many there are in the group), and one for each value, in no
    order; a sum is an Int64, and of a condition the number of rows where it holds.
    """

    name: str
    where: pl.Expr
    by: Mapping[str, pl.Expr]
    sums: Mapping[str, pl.Expr] = field(default_factory=dict)
    least: Mapping[str, pl.Expr] = field(default_factory=dict)
    most: Mapping[str, pl.Expr] = field(default_factory=dict)

    @property
    def columns(self) -> frozenset[str]:
        every = (self.where, *(each for of in (self.by, self.sums, self.least, self.most) for each in of.values()))
        return frozenset(name for expression in every for name in expression.meta.root_names())

    def begin(self, none: pl.DataFrame) -> Counting:
        return _Tallying(self, none)

    def of(self, rows: pl.DataFrame, one_vm: bool) -> pl.DataFrame:
        """The groups of some rows; of one VM without `vm`, for a key less is a tenth less work."""
        keys = self.by if one_vm else {"vm": pl.col("vm"), **self.by}
        every = {**keys, **self.sums, **self.least, **self.most}
        kept = rows.lazy().filter(self.where).select(each.alias(name) for name, each in every.items())
        return kept.group_by(*keys).agg(pl.len().cast(pl.Int64).alias("rows"), *self._values()).collect()

    def merged(self, parts: Iterable[pl.DataFrame]) -> pl.DataFrame:
        """Parts with `vm`, each group once."""
        return pl.concat(parts).group_by("vm", *self.by).agg(pl.col("rows").sum(), *self._values())

    def _values(self) -> Iterator[pl.Expr]:
        yield from (pl.col(name).sum().cast(pl.Int64) for name in self.sums)
        yield from (pl.col(name).min() for name in self.least)
        yield from (pl.col(name).max() for name in self.most)


class _Tallying:
    """A tally's parts, merged now and then, so that there are never many more rows of them than there are groups."""

    def __init__(self, tally: Tally, none: pl.DataFrame) -> None:
        self._tally = tally
        self._merged = tally.of(none, one_vm=False)
        self._parts: list[pl.DataFrame] = []
        self._rows = 0

    def feed(self, rows: pl.DataFrame, one_vm: bool) -> None:
        part = self._tally.of(rows, one_vm)
        if one_vm:
            part = part.select(pl.lit(rows["vm"].first(), rows.schema["vm"]).alias("vm"), pl.all())
        self._parts.append(part)
        self._rows += len(part)
        if self._rows > max(_MERGED_ROWS, len(self._merged)):
            self._merge()

    def answer(self) -> pl.DataFrame:
        self._merge()
        return self._merged

    def _merge(self) -> None:
        self._merged = self._tally.merged([self._merged, *self._parts])
        self._parts, self._rows = [], 0
