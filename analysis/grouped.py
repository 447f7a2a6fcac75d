# SPDX-License-Identifier: Apache-2.0
"""Questions that every report asks of rows, answered by a compiled loop that counts rows in groups.

Groups are by root, window, page, RIP, or kind and task. Each answer has `vm`, the question's keys, `rows`, `first_time`
and `last_time` (boot ns), and the question's own sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.rows import GFN, KIND, VCPU, VM, DecodedRows
from replay.decode.groups import FIELDS, Groups
from traces.schema import BY_CODE, BY_NAME

_ROWS: Final = ("rows", "first_time", "last_time")
_KINDS: Final = pl.Enum([kind.name for kind in BY_CODE.values()])
KEY: Final = pl.col("key")  # the two keys of a group, in the table of Groups
OTHER: Final = pl.col("other")


class Grouped(ABC):
    """A question that is answered by counting rows in groups."""

    name: str  # identifies the question with its options: two of the same name are counted once
    reads: tuple[str, ...]  # the columns that `give` gets, besides VM

    @abstractmethod
    def give(self, groups: Groups, vm: NDArray[Any], *columns: NDArray[Any]) -> None:
        """Pass a batch's columns to the compiled loop that counts for this question."""

    @abstractmethod
    def told(self, table: pl.DataFrame) -> pl.DataFrame:
        """Return the answer, made from the table of groups: columns FIELDS, `vm` null for rows of no VM."""

    @property
    def columns(self) -> frozenset[str]:
        """The columns of rows that the question needs."""
        return frozenset({VM, *self.reads})

    def begin(self) -> Grouping:
        """Begin a pass over the rows."""
        return Grouping(self, Groups())


class Grouping:
    """A grouped question during a pass over the rows."""

    def __init__(self, asked: Grouped, groups: Groups) -> None:
        self._asked, self._groups = asked, groups

    def feed(self, rows: DecodedRows) -> None:
        """Count the next rows."""
        vm, *columns = (rows.frame[name].to_numpy() for name in (VM, *self._asked.reads))
        self._asked.give(self._groups, vm, *columns)

    def answer(self) -> pl.DataFrame:
        """Return the answer over all rows."""
        table = pl.DataFrame(self._groups.table[: self._groups.count], schema=list(FIELDS), orient="row")
        return self._asked.told(table.with_columns(pl.when(pl.col("vm") != -1).then("vm").cast(pl.Int32)))


@dataclass(frozen=True, eq=False)
class KindsBy(Grouped):
    """Counts rows of some kinds, by two columns of integers, the second of one byte."""

    name: str
    kinds: tuple[str, ...]
    reads: tuple[str, ...]  # KIND, "time" and the two columns
    keys: Mapping[str, pl.Expr]  # the answer's key columns, as expressions of KEY and OTHER

    def give(self, groups: Groups, vm: NDArray[Any], *columns: NDArray[Any]) -> None:
        kind, time, key, other = columns
        wanted = np.zeros(256, np.uint8)
        wanted[[BY_NAME[name].code for name in self.kinds]] = 1
        signed = key.view(np.int64) if key.itemsize == 8 else key
        groups.feed(wanted, vm, kind, time, signed, other.view(np.uint8))

    def told(self, table: pl.DataFrame) -> pl.DataFrame:
        return table.select("vm", *_ROWS, **self.keys)


@dataclass(frozen=True)
class UsedRoots(Grouped):
    """Counts rows that name a root, by `root`: its `role` word (null: not known), `loads` and `faults`."""

    name: str = "roots"
    reads: tuple[str, ...] = (KIND, "time", "root", "role")

    def give(self, groups: Groups, vm: NDArray[Any], *columns: NDArray[Any]) -> None:
        groups.feed_roots(vm, *columns)

    def told(self, table: pl.DataFrame) -> pl.DataFrame:
        role = pl.when(pl.col("sum_2") != 0).then("sum_2").cast(pl.UInt32)
        return table.select("vm", *_ROWS, root=KEY.cast(pl.Int32), role=role, loads="sum_0", faults="sum_1")


@dataclass(frozen=True)
class FaultedPages(Grouped):
    """Counts faults by `vcpu` and `gfn`, and those `served`: a page was mapped, or a permission fixed."""

    name: str = "faults by page"
    reads: tuple[str, ...] = (VCPU, KIND, "time", GFN, "addr", "old", "new")

    def give(self, groups: Groups, vm: NDArray[Any], *columns: NDArray[Any]) -> None:
        groups.feed_pages(vm, *columns)

    def told(self, table: pl.DataFrame) -> pl.DataFrame:
        return table.select("vm", *_ROWS, vcpu=OTHER.cast(pl.Int16), gfn=KEY, faults="sum_0", served="sum_1")


@dataclass(frozen=True)
class Windowed(Grouped):
    """Counts rows that show how a vCPU spent its time, by `vcpu`, `kind` and `window`.

    Windows are `width_ns` long and begin at boot ns `first`. `at` is the sum of the rows' ns since the begin of their
    window, `entering` the number of rows that enter SMM, `fixes` the number of faults that lacked only a permission:
    those whose error code has a bit of `present` and none of `reserved`; none if `present` is 0.
    """

    name: str
    first: int
    width_ns: int
    present: int
    reserved: int
    reads: tuple[str, ...] = (VCPU, KIND, "time", "code", "flags")

    def give(self, groups: Groups, vm: NDArray[Any], *columns: NDArray[Any]) -> None:
        groups.feed_windows(self.first, self.width_ns, self.present, self.reserved, vm, *columns)

    def told(self, table: pl.DataFrame) -> pl.DataFrame:
        return table.select(
            "vm", *_ROWS, vcpu=(OTHER // 256).cast(pl.Int16), window=KEY, kind=kind_names(OTHER % 256),
            at="sum_0", entering="sum_1", fixes="sum_2",
        )  # fmt: skip


def kind_names(codes: pl.Expr) -> pl.Expr:
    """Return an expression for the names of kinds, given their codes."""
    return codes.replace_strict(list(BY_CODE), [kind.name for kind in BY_CODE.values()], return_dtype=_KINDS)
