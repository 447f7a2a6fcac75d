# SPDX-License-Identifier: Apache-2.0
"""One batch of a VM's rows as arrays, one a column, in the types that compiled loops read."""

from __future__ import annotations

from functools import lru_cache
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


class Batch:
    """Columns are made when asked for; one that was not read holds 0.

    `kind` is kind codes; `vcpu` the VM's own dense number, -1 where there is none; `table` is 0 where none is known.
    `gfn` is undefined in rows of a kind that does not fill it.
    """

    def __init__(
        self, batch: pa.RecordBatch, numbers: NDArray[np.int32], kind: NDArray[np.uint8] | None = None
    ) -> None:
        """`numbers`: the dense number of each vCPU id, and in the last place that of no vCPU. `kind`, where known."""
        self._batch = batch
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
        if name not in self._batch.schema.names:
            return _zeros(len(self))[name]
        column = self._batch.column(name)
        if name == "table" and column.null_count:
            column = column.fill_null(0)
        if name != "vcpu":
            return _values(column)
        bits = np.frombuffer(column.buffers()[0] if column.null_count else b"", np.uint8)
        dense: NDArray[np.int32] = vcpus_of(_values(column), bits, column.offset, self._numbers)
        return dense

    def cut(self, count: int) -> Batch:
        """The first `count` rows."""
        return self if count == len(self) else Batch(self._batch.slice(0, count), self._numbers, self.kind[:count])

    def of_vm(self) -> tuple[Batch, bool]:
        """The rows up to and with the VM's end, and whether that is among them: what follows it is none of the VM's."""
        ends = self.of("vm_destroy")
        return (self.cut(int(ends[0]) + 1), True) if len(ends) else (self, False)

    def of(self, *kinds: str) -> Ints:
        """Row numbers of these kinds, in order."""
        codes = [BY_NAME[name].code for name in kinds]
        return np.flatnonzero(self.kind == codes[0] if len(codes) == 1 else np.isin(self.kind, codes))


def _kinds(batch: pa.RecordBatch) -> NDArray[np.uint8]:
    kind = batch.column("kind")
    found: NDArray[np.uint8] = kinds_of(_values(kind.indices), codes_of(kind.dictionary.to_pylist()))
    return found


@lru_cache(2)
def _zeros(rows: int) -> dict[str, NDArray[Any]]:
    """Columns that were not read."""
    return {name: np.zeros(rows, dtype) for name, dtype in _TYPES.items()}


def _values(column: pa.Array) -> NDArray[Any]:
    """A column's values as they lie in memory: where it is null, anything that the type can hold."""
    values = np.frombuffer(column.buffers()[1], column.type.to_pandas_dtype())
    return values[column.offset : column.offset + len(column)]
