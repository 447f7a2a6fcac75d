# SPDX-License-Identifier: Apache-2.0
"""Questions about a recording's rows, any number of which are answered in one pass over them.

Each batch of rows is decoded once, by the trace's own reader, and every question takes from it what it needs. Memory
grows with the groups of an answer (pages, roots, windows), not with rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Final, Protocol, TypeAlias

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from traces.reader import Trace, kind_codes

# Rows of a batch: each batch costs polars 2 ms or so, however small it is; twice the rows take 45 MiB more.
BATCH_ROWS: Final = 1 << 18
KIND: Final = "kind_code"  # these columns are computed once for all questions: a kind's code,
VCPU: Final = "vcpu_id"  # a vCPU's id, a gfn and a VM's id, -1 where there is none
GFN: Final = "gfn_if_any"
VM: Final = "vm_id"
_MADE: Final = {KIND: "kind", VCPU: "vcpu", GFN: "gfn", VM: "vm"}
_MERGED_ROWS: Final = 1 << 17  # partial groups are merged when they are more than this, and than the merged ones


class DecodedRows:
    """Some rows, with what several questions need of them computed once."""

    def __init__(self, *parts: pl.DataFrame) -> None:
        """`parts` follow one another; usually each has the rows of one VM."""
        self._parts = parts

    @cached_property
    def frame(self) -> pl.DataFrame:
        """All rows, each column in one piece."""
        return self._parts[0] if len(self._parts) == 1 else pl.concat(self._parts, rechunk=True)

    @cached_property
    def one_vm(self) -> bool:
        """Whether all rows are of one VM."""
        return _one_vm(self.frame)

    @cached_property
    def by_vm(self) -> list[tuple[int, pl.DataFrame]]:
        """The rows of each VM in order, in one or more parts; rows of no VM are left out."""
        parts = [
            part
            for some in self._parts
            for part in ([some] if _one_vm(some) else some.partition_by("vm", maintain_order=True))
        ]
        return [(part["vm"][0], part) for part in parts if len(part) and part["vm"][0] is not None]


def _one_vm(rows: pl.DataFrame) -> bool:
    vm = rows["vm"]
    return vm.null_count() in (0, len(vm)) and vm.min() == vm.max()


class Counting(Protocol):
    """A question during a pass over the rows."""

    def feed(self, rows: DecodedRows) -> None:
        """Take the next rows, in file order."""

    def answer(self) -> pl.DataFrame:
        """Return the answer over all rows."""


class Followed(Protocol):
    """A question that goes through the rows with code of its own, not with a polars expression."""

    @property
    def name(self) -> str:
        """Identifies the question and its options: questions of one name are the same."""

    @property
    def columns(self) -> frozenset[str]:
        """The columns that the question needs, computed ones such as KIND and VCPU among them."""

    def begin(self) -> Counting:
        """Begin a pass over the rows."""


@dataclass(frozen=True)
class Window:
    """Which rows count: those from boot ns `since` on (None: all), of these vCPUs (empty: of all)."""

    since: int | None = None
    vcpus: frozenset[int] = frozenset()

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"time"} if self.since is not None else ()) | ({"vcpu", "kind"} if self.vcpus else frozenset())

    def of(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Return the rows that count, of some rows."""
        if self.since is not None:
            rows = rows.filter(pl.col("time") >= self.since)
        if self.vcpus:  # the end of an ioctl names no vCPU, only its begin does
            rows = rows.filter(pl.col("vcpu").is_in(list(self.vcpus)) | (pl.col("kind") == "ioctl_end"))
        return rows


ALL: Final = Window()


class Asking:
    """Questions during a pass over a trace's rows: first those that a replay has read, then the others.

    Rows may be given by several threads. Small batches, as those of many VMs, are counted together.
    """

    def __init__(self, trace: Trace, questions: Sequence[Question], window: Window = ALL) -> None:
        self._trace, self._window = trace, window
        wanted = frozenset({"vm"}).union(window.columns, *(question.columns for question in questions))
        made = [name for name in _MADE if name in wanted]
        read = wanted.union(_MADE[name] for name in made)
        self.columns: Final = [name for name in trace.schema.names if name in read]
        self._kept = [*(name for name in self.columns if name in wanted), *made]
        none = self._rows(pa.RecordBatch.from_pylist([], schema=trace.schema))
        self._tallies = Tallies([question for question in questions if isinstance(question, Tally)], none)
        self._counting = {question.name: question.begin() for question in questions if not isinstance(question, Tally)}
        self._seen: set[int] = set()
        self._waiting: list[pl.DataFrame] = []
        self._held = 0  # rows that wait
        self._lock = Lock()

    def feed(self, vm: int | None, batch: pa.RecordBatch) -> None:
        """Take a VM's next rows (None: of all VMs). Who gives some rows of a VM must give all of them."""
        with self._lock:
            if vm is not None:
                self._seen.add(vm)
            # A long batch is counted alone: the columns of several parts are not in one piece.
            if self._held + batch.num_rows > BATCH_ROWS or 2 * batch.num_rows >= BATCH_ROWS:
                self._count_waiting()
            self._waiting.append(self._window.of(self._rows(batch)))
            self._held += len(self._waiting[-1])
            if 2 * self._held >= BATCH_ROWS:
                self._count_waiting()

    def answers(self) -> dict[str, pl.DataFrame]:
        """Return the answers by the questions' names; rows of VMs that were not given are read for that."""
        for batch in self._trace.batches(self.columns, size=BATCH_ROWS, since=self._window.since, but=self._seen):
            self.feed(None, batch)
            del batch  # else it is held while the next one is decoded
        self._count_waiting()
        return self._tallies.answers() | {name: each.answer() for name, each in self._counting.items()}

    def _rows(self, batch: pa.RecordBatch) -> pl.DataFrame:
        """Return the columns of a batch that are wanted, computed ones included."""
        columns = [_column(batch, name) for name in self._kept]
        return pl.DataFrame(pl.from_arrow(pa.RecordBatch.from_arrays(columns, names=self._kept)))

    def _count_waiting(self) -> None:
        waiting, held = self._waiting, self._held
        self._waiting, self._held = [], 0
        if not held:
            return
        decoded = DecodedRows(*waiting)
        self._tallies.feed(decoded)
        for each in self._counting.values():
            each.feed(decoded)


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """Return a column of a batch, or a computed one; a polars expression for it would cost 100 us a batch."""
    if name == KIND:
        return pa.array(kind_codes(batch))
    column = batch.column(_MADE.get(name, name))
    return pc.fill_null(column, pa.scalar(-1, column.type)) if name in _MADE else column


@dataclass(frozen=True, eq=False)
class Tally:
    """A group_by whose aggregates can be merged: of the rows `where`, by VM and `by`, sums, minima and maxima.

    The answer has the columns `vm`, those of `by`, `rows` (the number of rows in the group), and one for each value, in
    no order. A sum is an Int64; that of a condition is the number of rows where it holds.
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

    def of(self, rows: pl.DataFrame, one_vm: bool) -> pl.LazyFrame:
        """Return the groups of some rows. If all are of one VM it is no key, which saves a tenth of the work."""
        if one_vm:
            vm = pl.lit(rows["vm"].first(), rows.schema["vm"]).alias("vm")
            groups = rows.lazy().filter(self.where).select(self._selected).group_by(*self.by).agg(self._counted)
            return groups.select(vm, pl.all())
        return rows.lazy().filter(self.where).select("vm", *self._selected).group_by("vm", *self.by).agg(self._counted)

    @cached_property
    def _selected(self) -> list[pl.Expr]:
        """The expressions, made once for all batches: making them takes half as long as evaluating them."""
        every = {**self.by, **self.sums, **self.least, **self.most}
        return [each.alias(name) for name, each in every.items()]

    @cached_property
    def _counted(self) -> list[pl.Expr]:
        return [pl.len().cast(pl.Int64).alias("rows"), *self._values()]

    def merged(self, parts: Iterable[pl.DataFrame]) -> pl.DataFrame:
        """Merge partial groups, which have `vm`, so that each group occurs once."""
        every = pl.concat(parts).lazy().group_by("vm", *self.by).agg(pl.col("rows").sum(), *self._values())
        # The streaming engine takes 50 MiB less for 1,000 VMs. In one piece, because polars divides a single row
        # differently from several at once, in the last bit.
        return every.collect(engine="streaming").rechunk()

    def _values(self) -> Iterator[pl.Expr]:
        yield from (pl.col(name).sum().cast(pl.Int64) for name in self.sums)
        yield from (pl.col(name).min() for name in self.least)
        yield from (pl.col(name).max() for name in self.most)


Question: TypeAlias = Tally | Followed


class Tallies:
    """Tallies during a pass over the rows; one call of polars, which costs a ms, makes all groups of a batch."""

    def __init__(self, tallies: Sequence[Tally], none: pl.DataFrame) -> None:
        """`none` is a batch without rows."""
        self._tallies = tallies
        self._parts = [_Parts(tally, groups) for tally, groups in zip(tallies, self._groups(none, False), strict=True)]

    def feed(self, rows: DecodedRows) -> None:
        """Take the next rows, as `Counting.feed` does."""
        for parts, groups in zip(self._parts, self._groups(rows.frame, rows.one_vm), strict=True):
            parts.add(groups)

    def answers(self) -> dict[str, pl.DataFrame]:
        """Return the answers over all rows, by the tallies' names."""
        return {tally.name: parts.merged() for tally, parts in zip(self._tallies, self._parts, strict=True)}

    def _groups(self, rows: pl.DataFrame, one_vm: bool) -> list[pl.DataFrame]:
        return pl.collect_all([tally.of(rows, one_vm) for tally in self._tallies], engine="streaming")


class _Parts:
    """The groups of a tally, merged now and then, so that partial groups never far outnumber them."""

    def __init__(self, tally: Tally, merged: pl.DataFrame) -> None:
        self._tally = tally
        self._merged = merged
        self._parts: list[pl.DataFrame] = []
        self._rows = 0

    def add(self, groups: pl.DataFrame) -> None:
        self._parts.append(groups)
        self._rows += len(groups)
        if self._rows > max(_MERGED_ROWS, len(self._merged)):
            self.merged()

    def merged(self) -> pl.DataFrame:
        """Return all groups, each once."""
        self._merged = self._tally.merged([self._merged, *self._parts])
        self._parts, self._rows = [], 0
        return self._merged
