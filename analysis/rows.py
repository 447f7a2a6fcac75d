# SPDX-License-Identifier: Apache-2.0
"""Questions about a recording's rows, as many as there are answered in one pass over them.

Each batch of rows is decoded once, by the trace's own reader, and every question takes of it what it is about. Memory
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

# Of one batch: the questions cost polars 2 ms or so however few its rows are, and twice the rows take 45 MiB more.
BATCH_ROWS: Final = 1 << 18
KIND: Final = "kind_code"  # columns that are made of others, once for all questions: a kind's code,
VCPU: Final = "vcpu_id"  # a vCPU's id, a gfn and a VM's id, -1 where there is none
GFN: Final = "gfn_if_any"
VM: Final = "vm_id"
_MADE: Final = {KIND: "kind", VCPU: "vcpu", GFN: "gfn", VM: "vm"}
_MERGED_ROWS: Final = 1 << 17  # parts are merged when they have more rows than this, and than what is merged


class DecodedRows:
    """Some rows with what several questions ask of them, made once for all."""

    def __init__(self, *parts: pl.DataFrame) -> None:
        """`parts` follow one another; most often each is of one VM."""
        self._parts = parts

    @cached_property
    def frame(self) -> pl.DataFrame:
        """All of them, each column in one piece."""
        return self._parts[0] if len(self._parts) == 1 else pl.concat(self._parts, rechunk=True)

    @cached_property
    def one_vm(self) -> bool:
        """Whether `vm` is the same in all rows."""
        return _one_vm(self.frame)

    @cached_property
    def by_vm(self) -> list[tuple[int, pl.DataFrame]]:
        """The rows by VM, a VM's in order, in as many parts as they come in; not those of no VM."""
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
    """A question on its way through the rows."""

    def feed(self, rows: DecodedRows) -> None:
        """Take the next rows, in file order."""

    def answer(self) -> pl.DataFrame:
        """The results over all rows."""


class Followed(Protocol):
    """A question that goes through the rows itself."""

    @property
    def name(self) -> str:
        """It, and with which options: two of one name are the same question."""

    @property
    def columns(self) -> frozenset[str]:
        """What it reads of rows; KIND and VCPU are made."""

    def begin(self) -> Counting:
        """Before the first row."""


@dataclass(frozen=True)
class Window:
    """The rows that count: from `since` on (boot ns; None: from the first), and of these vCPUs (none: of all)."""

    since: int | None = None
    vcpus: frozenset[int] = frozenset()

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"time"} if self.since is not None else ()) | ({"vcpu", "kind"} if self.vcpus else frozenset())

    def of(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Those of some rows."""
        if self.since is not None:
            rows = rows.filter(pl.col("time") >= self.since)
        if self.vcpus:  # the end of an ioctl has no vCPU: whose it is, its begin says
            rows = rows.filter(pl.col("vcpu").is_in(list(self.vcpus)) | (pl.col("kind") == "ioctl_end"))
        return rows


ALL: Final = Window()


class Asking:
    """Questions on their way through a trace's rows: through those that somebody else has read, then the others.

    Rows are taken from several threads. Small batches (of many VMs) are taken together.
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
        """Take a VM's next rows (None: of all VMs): whoever gives some of a VM's gives all of them."""
        with self._lock:
            if vm is not None:
                self._seen.add(vm)
            # A long batch by itself: of several parts no column is in one piece.
            if self._held + batch.num_rows > BATCH_ROWS or 2 * batch.num_rows >= BATCH_ROWS:
                self._count_waiting()
            self._waiting.append(self._window.of(self._rows(batch)))
            self._held += len(self._waiting[-1])
            if 2 * self._held >= BATCH_ROWS:
                self._count_waiting()

    def answers(self) -> dict[str, pl.DataFrame]:
        """The results over all rows, by the questions' names; those of VMs that nobody gave are read for it."""
        for batch in self._trace.batches(self.columns, size=BATCH_ROWS, since=self._window.since, but=self._seen):
            self.feed(None, batch)
            del batch  # else it is there as long as the next one is decoded
        self._count_waiting()
        return self._tallies.answers() | {name: each.answer() for name, each in self._counting.items()}

    def _rows(self, batch: pa.RecordBatch) -> pl.DataFrame:
        """What of a batch is wanted, and what is made of it."""
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
    """One of a batch, or one that is made of it; made here, for a polars expression costs 100 us in each batch."""
    if name == KIND:
        return pa.array(kind_codes(batch))
    column = batch.column(_MADE.get(name, name))
    return pc.fill_null(column, pa.scalar(-1, column.type)) if name in _MADE else column


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

    def of(self, rows: pl.DataFrame, one_vm: bool) -> pl.LazyFrame:
        """The groups of some rows; of one VM, for a key less is a tenth less work, `vm` is put before them."""
        if one_vm:
            vm = pl.lit(rows["vm"].first(), rows.schema["vm"]).alias("vm")
            groups = rows.lazy().filter(self.where).select(self._selected).group_by(*self.by).agg(self._counted)
            return groups.select(vm, pl.all())
        return rows.lazy().filter(self.where).select("vm", *self._selected).group_by("vm", *self.by).agg(self._counted)

    @cached_property
    def _selected(self) -> list[pl.Expr]:
        """Once for all batches: making expressions takes half as long as answering them."""
        every = {**self.by, **self.sums, **self.least, **self.most}
        return [each.alias(name) for name, each in every.items()]

    @cached_property
    def _counted(self) -> list[pl.Expr]:
        return [pl.len().cast(pl.Int64).alias("rows"), *self._values()]

    def merged(self, parts: Iterable[pl.DataFrame]) -> pl.DataFrame:
        """Parts with `vm`, each group once."""
        every = pl.concat(parts).lazy().group_by("vm", *self.by).agg(pl.col("rows").sum(), *self._values())
        # Of 1,000 VMs with 50 MiB less than by the other engine. In one piece: polars divides a row by itself
        # otherwise than several at once, in the last bit.
        return every.collect(engine="streaming").rechunk()

    def _values(self) -> Iterator[pl.Expr]:
        yield from (pl.col(name).sum().cast(pl.Int64) for name in self.sums)
        yield from (pl.col(name).min() for name in self.least)
        yield from (pl.col(name).max() for name in self.most)


Question: TypeAlias = Tally | Followed


class Tallies:
    """Tallies on their way through the rows; polars makes all of a batch's groups in one go, for each go costs a ms."""

    def __init__(self, tallies: Sequence[Tally], none: pl.DataFrame) -> None:
        """`none`: a batch without rows."""
        self._tallies = tallies
        self._parts = [_Parts(tally, groups) for tally, groups in zip(tallies, self._groups(none, False), strict=True)]

    def feed(self, rows: DecodedRows) -> None:
        """Take the next rows, as `Counting.feed`."""
        for parts, groups in zip(self._parts, self._groups(rows.frame, rows.one_vm), strict=True):
            parts.add(groups)

    def answers(self) -> dict[str, pl.DataFrame]:
        """The results over all rows, by the tallies' names."""
        return {tally.name: parts.merged() for tally, parts in zip(self._tallies, self._parts, strict=True)}

    def _groups(self, rows: pl.DataFrame, one_vm: bool) -> list[pl.DataFrame]:
        return pl.collect_all([tally.of(rows, one_vm) for tally in self._tallies], engine="streaming")


class _Parts:
    """A tally's groups, merged now and then, so that there are never many more rows of them than there are groups."""

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
        """All of them, each group once."""
        self._merged = self._tally.merged([self._merged, *self._parts])
        self._parts, self._rows = [], 0
        return self._merged
