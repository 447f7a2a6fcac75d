# SPDX-License-Identifier: Apache-2.0
"""Rows in the making: record columns by the names that a trace gives them, placed many at a time."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from traces.lives import Flags, Ints
from traces.record import Columns
from traces.schema import BY_NAME, KINDS, RECORD_FIELDS

_WORDS: Final = ("w0", "w1", "w2", "w3")
# By kind: the record's field that holds each of its columns.
_FIELDS: Final[dict[str, dict[str, str]]] = {
    kind.name: dict(zip(kind.words, _WORDS, strict=False))
    | ({kind.count: "n"} if kind.count else {})
    | {name: name for name in (*kind.fixed, *(("flags",) if kind.flags else ()), "vcpu", "tid", "tgid", "cpu", "time")}
    for kind in KINDS
}
NO_VCPU: Final = -1


def field_of(kind: str, column: str) -> str:
    """Return the record field in which rows of this kind keep that column; KeyError if they have no such column."""
    return _FIELDS[kind][column]


def blank(count: int) -> Columns:
    """Return `count` records as columns, all 0 and on no vCPU."""
    columns: Columns = {name: np.zeros(count, dtype) for name, dtype in RECORD_FIELDS}
    columns["vcpu"][:] = NO_VCPU
    return columns


def rows(kind: str, count: int, **values: Any) -> Columns:
    """Return `count` rows of one kind; values are numbers or arrays."""
    columns = blank(count)
    columns["kind"][:] = BY_NAME[kind].code
    for column, value in values.items():
        columns[field_of(kind, column)][:] = value
    return columns


def join(parts: list[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name, _ in RECORD_FIELDS}


def take(columns: Columns, at: NDArray[Any] | slice) -> Columns:
    return {name: values[at] for name, values in columns.items()}


class Cursor:
    """Where each of many steps writes its next row.

    Without `columns` it only counts, so that one description of a step both sizes and fills it.
    """

    def __init__(self, at: Ints, columns: Columns | None = None, costs: NDArray[np.float64] | None = None) -> None:
        self.at = at
        self._columns = columns
        self._costs = costs

    def row(self, kind: str, cost: float, where: Flags | None = None, **values: Any) -> Ints:
        """Write one row of every step (or of those in `where`), `cost` ns after the last; return its place in each."""
        place = self.at
        if self._columns is not None and self._costs is not None:
            at = place if where is None else place[where]
            self._columns["kind"][at] = BY_NAME[kind].code
            self._costs[at] = cost
            for column, value in values.items():
                if where is not None and isinstance(value, np.ndarray):
                    value = value[where]
                self._columns[field_of(kind, column)][at] = value
        self.at = place + 1 if where is None else place + where
        return place


class Listing:
    """Rows written one after the other, for rare events: `cost` ns pass before each."""

    def __init__(self) -> None:
        self._parts: list[Columns] = []
        self._costs: list[NDArray[np.float64]] = []

    def row(self, kind: str, cost: float, **values: Any) -> None:
        self.block(rows(kind, 1, **values), cost)

    def block(self, columns: Columns, cost: float) -> None:
        """Append rows that are made already, `cost` ns each."""
        self._parts.append(columns)
        self._costs.append(np.full(len(columns["kind"]), cost))

    def done(self) -> tuple[Columns, NDArray[np.float64]]:
        return join(self._parts), np.concatenate(self._costs)
