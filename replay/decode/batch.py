# SPDX-License-Identifier: Apache-2.0
"""One batch of a VM's rows as arrays, one for each column, in the types that compiled loops read."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from replay.decode.dense import kinds_of, vcpus_of
from traces.columns import SCHEMA
from traces.reader import codes_of
from traces.schema import BY_NAME

Ints = NDArray[np.int64]
COLUMNS: Final = (
    "seq", "time", "vcpu", "tid", "kind", "root", "role", "level", "as_id", "gfn", "old", "new", "table", "addr",
    "code", "value", "rip", "refs", "ret", "slot", "flags",
)  # fmt: skip
_TYPES: Final = {name: np.dtype(SCHEMA.field(name).type.to_pandas_dtype()) for name in COLUMNS if name != "kind"}

_ZEROS: dict[np.dtype[Any], NDArray[Any]] = {}  # by type


class Batch:
    """A batch of rows. Each column is an attribute that is made on first use; a column that was not read is all 0.

    `kind` has kind codes; `vcpu` has dense vCPU numbers, with -1 for none; `table` is 0 where it is unknown. `gfn` is
    undefined in rows of a kind that does not fill it.
    """

    def __init__(
        self, batch: pa.RecordBatch, numbers: NDArray[np.int32], kind: NDArray[np.uint8] | None = None
    ) -> None:
        """`numbers` has the dense number of each vCPU id, and in the last place the number for no vCPU (-1).

        `kind` has the kind codes if they are already known.
        """
        self._batch = batch
        self._names = frozenset(batch.schema.names)
        self._numbers = numbers
        self.kind = _kinds(batch) if kind is None else kind

    def __len__(self) -> int:
        return len(self.kind)

    def __getattr__(self, name: str) -> NDArray[Any]:
        if name not in COLUMNS:
            raise AttributeError(name)
        made = self._made(name)
        setattr(self, name, made)
        return made

    def _made(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            return _zeros(name, len(self))
        column = self._batch.column(name)
        if name == "table" and column.null_count:
            column = column.fill_null(0)
        if name != "vcpu":
            return _values(column)
        bits = np.frombuffer(column.buffers()[0] if column.null_count else b"", np.uint8)
        dense: NDArray[np.int32] = vcpus_of(_values(column), bits, column.offset, self._numbers)
        return dense

    def cut(self, count: int) -> Batch:
        """Return the first `count` rows."""
        return self if count == len(self) else Batch(self._batch.slice(0, count), self._numbers, self.kind[:count])

    def of_vm(self) -> tuple[Batch, bool]:
        """Return the rows up to and including the VM's end, and whether that end is among them.

        Rows behind the end do not belong to the VM any more.
        """
        ends = self.of("vm_destroy")
        return (self.cut(int(ends[0]) + 1), True) if len(ends) else (self, False)

    def of(self, *kinds: str) -> Ints:
        """Return the positions of rows of these kinds, in order."""
        codes = [BY_NAME[name].code for name in kinds]
        return np.flatnonzero(self.kind == codes[0] if len(codes) == 1 else np.isin(self.kind, codes))


def _kinds(batch: pa.RecordBatch) -> NDArray[np.uint8]:
    kind = batch.column("kind")
    found: NDArray[np.uint8] = kinds_of(_values(kind.indices), codes_of(kind.dictionary.to_pylist()))
    return found


def _zeros(name: str, rows: int) -> NDArray[Any]:
    """Return the zeros of a column that was not read; all batches share them."""
    kept = _ZEROS.get(_TYPES[name])
    if kept is None or len(kept) < rows:
        kept = np.zeros(1 << rows.bit_length(), _TYPES[name])
        kept.flags.writeable = False
        _ZEROS[_TYPES[name]] = kept
    return kept[:rows]


def _values(column: pa.Array) -> NDArray[Any]:
    """Return a column's values as they lie in memory; the value of a null is arbitrary."""
    values = np.frombuffer(column.buffers()[1], column.type.to_pandas_dtype())
    return values[column.offset : column.offset + len(column)]
