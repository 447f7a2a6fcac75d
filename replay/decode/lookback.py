"""Rows of a trace as arrays, and the question that decoding asks most: what was the last such row of this vCPU?

All of it works on whole batches; what a batch leaves for the next is one value a vCPU.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from traces.columns import SCHEMA
from traces.reader import kind_codes
from traces.schema import BY_NAME

Ints = NDArray[np.int64]
COLUMNS: Final = (
    "seq", "time", "vcpu", "tid", "kind", "root", "role", "level", "as_id", "gfn", "old", "new", "addr", "code",
    "value", "rip", "ret", "slot", "flags",
)  # fmt: skip
_SHIFT: Final = 40  # bits of a position within a batch, in keys


class Rows:
    """One batch of one VM. Columns are made when asked for; `vcpu` is the VM's own dense number, -1 where there is
    none; `gfn` is nothing to go by in rows of a kind that does not fill it. A column that was not read holds 0.
    """

    def __init__(self, batch: pa.RecordBatch, numbers: NDArray[np.int32]) -> None:
        self._batch = batch
        self._columns: dict[str, NDArray[Any]] = {}
        self._of: dict[int, Ints] = {}
        self.kind = kind_codes(batch)
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self.kind)

    def __getattr__(self, name: str) -> NDArray[Any]:
        if name not in COLUMNS:
            raise AttributeError(name)
        if name not in self._columns and name not in self._batch.schema.names:
            self._columns[name] = np.zeros(len(self), SCHEMA.field(name).type.to_pandas_dtype())
        elif name not in self._columns:
            column = self._batch.column(name)
            if name == "vcpu":
                self._columns[name] = self._vcpus(column)
            else:
                self._columns[name] = _values(column) if column.null_count else column.to_numpy()
        return self._columns[name]

    def _vcpus(self, column: pa.Array) -> NDArray[np.int32]:
        if not column.null_count:
            dense: NDArray[np.int32] = self._numbers[column.to_numpy()]
            return dense
        bits = np.frombuffer(column.buffers()[0], np.uint8)
        valid = np.unpackbits(bits, count=column.offset + len(column), bitorder="little")[column.offset :]
        return np.where(valid != 0, self._numbers[_values(column)], -1)

    def cut(self, count: int) -> Rows:
        """The first `count` rows."""
        return Rows(self._batch.slice(0, count), self._numbers)

    def of(self, *kinds: str) -> Ints:
        """Row numbers of these kinds, in order."""
        parts = [self._of_one(BY_NAME[name].code) for name in kinds]
        parts = [part for part in parts if len(part)] or [np.empty(0, np.int64)]
        return parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))

    def of_vcpu(self, *kinds: str) -> Ints:
        """Those of them that are a vCPU's."""
        rows = self.of(*kinds)
        return rows[self.vcpu[rows] >= 0] if len(rows) else rows

    def _of_one(self, code: int) -> Ints:
        if code not in self._of:
            self._of[code] = np.flatnonzero(self.kind == code)
        return self._of[code]


def _values(column: pa.Array) -> NDArray[Any]:
    """A column's values as they lie in memory: where it is null, anything that the type can hold."""
    values = np.frombuffer(column.buffers()[1], column.type.to_pandas_dtype())
    return values[column.offset : column.offset + len(column)]


def word_of(words: NDArray[np.uint32], root: NDArray[Any]) -> NDArray[np.uint32]:
    """Role words of roots by id, the last of them for every id beyond."""
    found: NDArray[np.uint32] = words[np.clip(root, 0, len(words) - 1)]
    return found


class Last:
    """The value that the last of some rows left, by vCPU; `unset` before the first."""

    def __init__(self, vcpus: int, unset: int) -> None:
        self.left = np.full(vcpus, unset, np.int64)

    def before(self, vcpu: NDArray[np.int32], at: Ints, values: Ints, asker: NDArray[np.int32], asked: Ints) -> Ints:
        """For each asking row (its vCPU, its row number): the value of the last setting row before it.

        Setting rows (`vcpu`, `at`, `values`) are in order. Call `keep` with them afterwards.
        """
        if not len(asked):
            return np.empty(0, np.int64)
        answer = self.left[asker]
        if len(at):
            key = vcpu.astype(np.int64) << _SHIFT | at
            if len(self.left) > 1:
                order = np.argsort(vcpu.astype(np.uint16), kind="stable")
                key, values = key[order], values[order]
            found = np.searchsorted(key, asker.astype(np.int64) << _SHIFT | asked) - 1
            known = (found >= 0) & (key[found] >> _SHIFT == asker)
            answer = np.where(known, values[found], answer)
        return answer

    def keep(self, vcpu: NDArray[np.int32], values: Ints | int) -> None:
        """Remember these for the next batch: of a vCPU's rows, the last one's."""
        self.left[vcpu] = values


def following(vcpu: NDArray[np.int32], at: Ints, asker: NDArray[np.int32], asked: Ints) -> Ints:
    """For each asking row the index (into `at`) of the same vCPU's next row after it; -1 where there is none."""
    if not len(at) or not len(asked):
        return np.full(len(asked), -1, np.int64)
    order = np.argsort(vcpu.astype(np.uint16), kind="stable")
    key = vcpu.astype(np.int64)[order] << _SHIFT | at[order]
    found = np.searchsorted(key, asker.astype(np.int64) << _SHIFT | asked, "right")
    inside = found < len(key)
    found = np.minimum(found, len(key) - 1)
    return np.where(inside & (key[found] >> _SHIFT == asker), order[found], -1)


class Flips:
    """How often something was flipped, by vCPU: whether an odd number of times is asked of rows."""

    def __init__(self, vcpus: int) -> None:
        self._count = Last(vcpus, 0)
        self._vcpu, self._at, self._running = np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64)

    def note(self, vcpu: NDArray[np.int32], at: Ints) -> None:
        """This batch's flips, in order of rows."""
        order = np.argsort(vcpu, kind="stable")
        grouped = vcpu[order]
        rank = np.empty(len(at), np.int64)
        rank[order] = np.arange(1, len(at) + 1) - np.searchsorted(grouped, grouped)
        self._vcpu, self._at, self._running = vcpu, at, self._count.left[vcpu] + rank

    def odd(self, vcpu: NDArray[np.int32], at: Ints) -> NDArray[np.bool_]:
        """Whether these vCPUs' flips up to these rows, theirs included, are odd in number."""
        if not len(self._at) and not self._count.left.any():
            return np.zeros(len(at), np.bool_)
        odd: NDArray[np.bool_] = self._count.before(self._vcpu, self._at, self._running, vcpu, at + 1) & 1 != 0
        return odd

    def keep(self) -> None:
        """Go on to the next batch."""
        self._count.keep(self._vcpu, self._running)
        self._vcpu, self._at, self._running = self._vcpu[:0], self._at[:0], self._running[:0]
