# SPDX-License-Identifier: Apache-2.0
"""Questions about a recording's rows, any number of which are answered in one pass over them.

Each batch of rows is decoded once, by the trace's own reader, and every question takes from it what it needs: most as
arrays of one VM's rows, tallies as a frame. Memory grows with the groups of an answer (pages, roots, windows), not with
rows.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from replay.decode.dense import kinds_of
from traces.reader import BATCH_ROWS, Trace, codes_of
from traces.schema import BY_NAME

# Rows that tallies count at once: each time costs polars 2 ms or so, however few they are.
TALLIED_ROWS: Final = 1 << 18
KIND: Final = "kind_code"  # a column that is computed for all questions: the code of the kind
_MERGED_ROWS: Final = 1 << 17  # partial groups are merged when they are more than this, and than the merged ones


class DecodedRows:
    """Rows of one VM, or of none, as arrays, one for each column, which are made on first use, once for all questions.

    Where there is no value it is -1.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._columns: dict[str, NDArray[Any]] = {}

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._columns:
            self._columns[name] = self._made(name)
        return self._columns[name]

    def _made(self, name: str) -> NDArray[Any]:
        if name == KIND:
            kind = self._batch.column("kind")
            places = kind.indices.to_numpy().astype(np.int32, copy=False)
            codes: NDArray[np.uint8] = kinds_of(places, _codes(tuple(kind.dictionary.to_pylist())))
            return codes
        return _filled(self._batch.column(name))


@lru_cache(4)
def _codes(kinds: tuple[str, ...]) -> NDArray[np.uint8]:
    return codes_of(kinds)


def by_vm(batch: pa.RecordBatch) -> Iterator[tuple[int, DecodedRows]]:
    """Yield the rows of each VM in a batch; those of no VM are under -1."""
    vm = _filled(batch.column("vm"))
    if (vm == vm[:1]).all():
        if len(vm):
            yield int(vm[0]), DecodedRows(batch)
        return
    for each in dict.fromkeys(vm.tolist()):
        yield each, DecodedRows(batch.filter(pa.array(vm == each)))


def _filled(column: pa.Array) -> NDArray[Any]:
    """Return a column's values, -1 where there is none; `pyarrow.compute.fill_null` takes three times as long."""
    valid, values = column.buffers()
    found = np.frombuffer(values, column.type.to_pandas_dtype())[column.offset : column.offset + len(column)]
    if not column.null_count:
        return found
    bits = np.unpackbits(np.frombuffer(valid, np.uint8), bitorder="little")[column.offset : column.offset + len(column)]
    filled = bits.astype(found.dtype)
    filled -= 1  # all bits of a null, none of a value
    filled |= found
    return filled


class Counting(Protocol):
    """A question during a pass over the rows."""

    def feed(self, vm: int, rows: DecodedRows) -> None:
        """Take a VM's next rows, in file order; those of no VM have -1."""

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

    def of(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the rows that count, of some rows."""
        if self.since is not None:
            batch = batch.filter(pc.greater_equal(batch.column("time"), self.since))
        if self.vcpus:  # the end of an ioctl names no vCPU, only its begin does
            rows = DecodedRows(batch)
            kept = np.isin(rows["vcpu"], list(self.vcpus)) | (rows[KIND] == BY_NAME["ioctl_end"].code)
            batch = batch.filter(pa.array(kept))
        return batch


ALL: Final = Window()


class Asking:
    """Questions during a pass over a trace's rows: first those that a replay has read, then the others.

    Rows may be given by several threads.
    """

    def __init__(self, trace: Trace, questions: Sequence[Question], window: Window = ALL) -> None:
        self._trace, self._window = trace, window
        wanted = frozenset({"vm"}).union(window.columns, *(question.columns for question in questions))
        read = {"kind" if name == KIND else name for name in wanted}
        self.columns: Final = [name for name in trace.schema.names if name in read]
        none = pa.RecordBatch.from_pylist([], schema=trace.schema)
        self._tallies = Tallies([question for question in questions if isinstance(question, Tally)], none)
        self._counting = {question.name: question.begin() for question in questions if not isinstance(question, Tally)}
        self._seen: set[int] = set()
        self._lock = Lock()

    def feed(self, vm: int | None, batch: pa.RecordBatch) -> None:
        """Take a VM's next rows (None: of all VMs). Who gives some rows of a VM must give all of them."""
        with self._lock:
            if vm is not None:
                self._seen.add(vm)
            batch = self._window.of(batch)
            if not batch.num_rows:
                return
            self._tallies.feed(batch)
            for of, rows in by_vm(batch):
                for each in self._counting.values():
                    each.feed(of, rows)

    def answers(self) -> dict[str, pl.DataFrame]:
        """Return the answers by the questions' names; rows of VMs that were not given are read for that."""
        for batch in self._trace.batches(self.columns, size=BATCH_ROWS, since=self._window.since, but=self._seen):
            self.feed(None, batch)
            del batch  # else it is held while the next one is decoded
        answers = self._tallies.answers()
        while self._counting:
            name = next(iter(self._counting))
            answers[name] = self._counting.pop(name).answer()
            give_memory_back()  # of what was counted for this question
        return answers


def give_memory_back() -> None:
    """Return freed memory to the kernel: glibc keeps it, and polars and Arrow allocate elsewhere, on top of it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


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
    """Tallies during a pass over the rows; one call of polars, which costs a ms, makes all groups of many batches."""

    def __init__(self, tallies: Sequence[Tally], none: pa.RecordBatch) -> None:
        """`none` is a batch without rows."""
        self._tallies = tallies
        wanted = frozenset({"vm"}).union(*(tally.columns for tally in tallies))
        self._columns = [name for name in none.schema.names if name in wanted]
        self._waiting: list[pl.DataFrame] = []
        self._held = 0  # rows that wait
        first = self._groups(self._frame(none))
        self._parts = [_Parts(tally, groups) for tally, groups in zip(tallies, first, strict=True)]

    def feed(self, batch: pa.RecordBatch) -> None:
        """Take the next rows, in file order."""
        if not self._tallies:
            return
        self._waiting.append(self._frame(batch))
        self._held += batch.num_rows
        if self._held >= TALLIED_ROWS:
            self._count_waiting()

    def answers(self) -> dict[str, pl.DataFrame]:
        """Return the answers over all rows, by the tallies' names."""
        if self._held:
            self._count_waiting()
        return {tally.name: parts.merged() for tally, parts in zip(self._tallies, self._parts, strict=True)}

    def _frame(self, batch: pa.RecordBatch) -> pl.DataFrame:
        return pl.DataFrame(pl.from_arrow(batch.select(self._columns)))

    def _count_waiting(self) -> None:
        rows = pl.concat(self._waiting, rechunk=True)
        self._waiting, self._held = [], 0
        for parts, groups in zip(self._parts, self._groups(rows), strict=True):
            parts.add(groups)

    def _groups(self, rows: pl.DataFrame) -> list[pl.DataFrame]:
        vm = rows["vm"]
        one_vm = vm.null_count() in (0, len(vm)) and vm.min() == vm.max()
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
