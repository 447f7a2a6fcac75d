# SPDX-License-Identifier: Apache-2.0
"""Questions that every report asks of rows, answered by a compiled loop that counts rows in groups.

Groups are by root, window, page, RIP, or kind and task. Each answer has `vm`, the question's keys, `rows`, `first_time`
and `last_time` (boot ns), and the question's own sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.passes.groups import FIELDS, IN_WINDOW, Groups
from analysis.reading.rows import KIND, DecodedRows
from traces.schema import BY_CODE, BY_NAME

_ROWS: Final = ("rows", "first_time", "last_time")
_KINDS: Final = pl.Enum([kind.name for kind in BY_CODE.values()])
KEY: Final = pl.col("key")  # the two keys of a group, in the table of Groups
OTHER: Final = pl.col("other")


class Grouped(ABC):
    """A question that is answered by counting rows in groups."""

    name: str  # identifies the question with its options: two of the same name are counted once
    reads: tuple[str, ...]  # the columns that `give` gets
    sums: tuple[str, ...] = ()  # names for the sums of the groups

    @abstractmethod
    def give(self, groups: Groups, vm: int, *columns: NDArray[Any]) -> None:
        """Pass the columns of a VM's next rows (-1: of no VM) to the compiled loop that counts for this question."""

    @abstractmethod
    def told(self, table: pl.LazyFrame) -> pl.LazyFrame:
        """Return the answer, made from the table of groups: FIELDS and `sums`, `vm` null for rows of no VM."""

    @property
    def columns(self) -> frozenset[str]:
        """The columns of rows that the question needs."""
        return frozenset(self.reads)

    def begin(self) -> Grouping:
        """Begin a pass over the rows."""
        return Grouping(self, Groups(len(self.sums)))


class Grouping:
    """A grouped question during a pass over the rows."""

    def __init__(self, asked: Grouped, groups: Groups) -> None:
        self._asked, self._groups = asked, groups

    def feed(self, vm: int, rows: DecodedRows) -> None:
        """Count the next rows."""
        self._asked.give(self._groups, vm, *(rows[name] for name in self._asked.reads))

    def answer(self) -> pl.DataFrame:
        """Return the answer over all rows, after which no more can be counted."""
        names = (*FIELDS, *self._asked.sums)
        table = self._groups.table[: self._groups.count]
        columns = pl.DataFrame([pl.Series(name, table[:, at], pl.Int64) for at, name in enumerate(names)])
        del self._groups, table  # they take as much memory as the answer
        vm = pl.when(pl.col("vm") != -1).then("vm").cast(pl.Int32)
        return self._asked.told(columns.lazy().with_columns(vm)).collect(engine="streaming")


@dataclass(frozen=True, eq=False)
class KindsBy(Grouped):
    """Counts rows of some kinds, by two columns of integers, the second of one byte."""

    name: str
    kinds: tuple[str, ...]
    reads: tuple[str, ...]  # KIND, "time" and the two columns
    keys: Mapping[str, pl.Expr]  # the answer's key columns, as expressions of KEY and OTHER

    def give(self, groups: Groups, vm: int, *columns: NDArray[Any]) -> None:
        kind, time, key, other = columns
        signed = key.view(np.int64) if key.itemsize == 8 else key
        groups.feed(vm, self._wanted, kind, time, signed, other.view(np.uint8))

    @cached_property
    def _wanted(self) -> NDArray[np.uint8]:
        wanted = np.zeros(256, np.uint8)
        wanted[[BY_NAME[name].code for name in self.kinds]] = 1
        return wanted

    def told(self, table: pl.LazyFrame) -> pl.LazyFrame:
        return table.select("vm", *_ROWS, **self.keys)


@dataclass(frozen=True)
class UsedRoots(Grouped):
    """Counts rows that name a root, by `root`: its `role` word (null: not known), `loads` and `faults`."""

    name: str = "roots"
    reads: tuple[str, ...] = (KIND, "time", "root", "role")
    sums: tuple[str, ...] = ("loads", "faults", "least_role")

    def give(self, groups: Groups, vm: int, *columns: NDArray[Any]) -> None:
        groups.feed_roots(vm, *columns)

    def told(self, table: pl.LazyFrame) -> pl.LazyFrame:
        role = pl.when(pl.col("least_role") != 0).then("least_role").cast(pl.UInt32)
        return table.select("vm", *_ROWS, "loads", "faults", root=KEY.cast(pl.Int32), role=role)


@dataclass(frozen=True)
class UnservedPages(Grouped):
    """Counts faults by `vcpu` and `gfn`, and those `served`: a page was mapped, or a permission fixed.

    The answer has only pages of which two faults or more were not served.
    """

    name: str = "faults by page"
    sums: tuple[str, ...] = ("faults", "served")
    reads: tuple[str, ...] = ("vcpu", KIND, "time", "gfn", "addr", "old", "new")

    def give(self, groups: Groups, vm: int, *columns: NDArray[Any]) -> None:
        groups.feed_pages(vm, *columns)

    def told(self, table: pl.LazyFrame) -> pl.LazyFrame:
        return table.filter(pl.col("faults") - pl.col("served") > 1).select(
            "vm", *_ROWS, *self.sums, vcpu=OTHER.cast(pl.Int16), gfn=KEY
        )


@dataclass(frozen=True)
class Windowed(Grouped):
    """Counts rows that show how a vCPU spent its time, by `vcpu` and `window`: see `groups.IN_WINDOW`.

    Windows are `width_ns` long and begin at boot ns `first`. `fixes` is the number of faults that lacked only a
    permission: those whose error code has a bit of `present` and none of `reserved`; none if `present` is 0. `entered`
    and `left` are null in windows without an entry or exit.
    """

    name: str
    first: int
    width_ns: int
    present: int
    reserved: int
    reads: tuple[str, ...] = ("vcpu", KIND, "time", "code", "flags")
    sums: tuple[str, ...] = IN_WINDOW

    def give(self, groups: Groups, vm: int, *columns: NDArray[Any]) -> None:
        groups.feed_windows(vm, self.first, self.width_ns, self.present, self.reserved, *columns)

    def told(self, table: pl.LazyFrame) -> pl.LazyFrame:
        return table.select(
            "vm", *IN_WINDOW, vcpu=OTHER.cast(pl.Int16), window=KEY
        ).with_columns(
            pl.when(pl.col("entries") > 0).then("entered"), pl.when(pl.col("exits") > 0).then("left")
        )  # fmt: skip


def kind_names(codes: pl.Expr) -> pl.Expr:
    """Return an expression for the names of kinds, given their codes."""
    return codes.replace_strict(list(BY_CODE), [kind.name for kind in BY_CODE.values()], return_dtype=_KINDS)
