"""Roots as rows name them, asked of rows: one line for each VM and root."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from analysis.rows import KIND, DecodedRows
from replay.decode.root_uses import FIELDS, RootUses

_NO_VM: Final = -1
_SCHEMA: Final[dict[str, Any]] = {
    **dict.fromkeys(FIELDS, pl.Int64),
    "vm": pl.Int32,
    "root": pl.Int32,
    "role": pl.UInt32,
}


@dataclass(frozen=True)
class UsedRoots:
    """Rows that name a root, by root: its role word, from when to when there are any, loads and faults among them.

    The answer has `vm`, `root`, `rows`, `loads`, `faults`, `role` (null: none is known), `first_time` and `last_time`.
    """

    name: str = "roots"
    columns: frozenset[str] = frozenset({"root", KIND, "role", "time"})

    def begin(self) -> _Counting:
        return _Counting()


class _Counting:
    def __init__(self) -> None:
        self._roots = RootUses()

    def feed(self, rows: DecodedRows) -> None:
        vm = rows.frame["vm"]
        columns = (rows.frame[name].to_numpy() for name in ("root", KIND, "role", "time"))
        self._roots.feed((vm.fill_null(_NO_VM) if vm.null_count() else vm).to_numpy(), *columns)

    def answer(self) -> pl.DataFrame:
        found = pl.DataFrame(self._roots.uses[: self._roots.count], schema=list(FIELDS), orient="row")
        return found.with_columns(
            pl.when(pl.col("vm") != _NO_VM).then("vm"), pl.when(pl.col("role") != 0).then("role")
        ).select(pl.col(name).cast(kind) for name, kind in _SCHEMA.items())
