# SPDX-License-Identifier: Apache-2.0
"""From the record's words to named columns, by the table of kinds.

What a kind does not fill is 0 in its rows, except in the columns of NULLABLE, where 0 is a real place: there it is
null. Nulls everywhere would be pleasant, but they cost half of the decoding speed (`benchmarks/format.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from traces.lives import Ints
from traces.record import Columns
from traces.schema import BY_CODE, COLUMN_TYPES, KINDS, NULLABLE, UNKNOWN

_WORDS: Final = ("w0", "w1", "w2", "w3")
_OWN: Final = ("root", "role", "level", "as_id", "flags")

# Where the columns of a row of unknown kind come from, so that nothing of it is lost.
OPAQUE: Final = {
    "code": "kind", "addr": "w0", "value": "w1", "old": "w2", "new": "w3", "ret": "n", **{name: name for name in _OWN}
}  # fmt: skip

KIND_NAMES: Final = (*(kind.name for kind in KINDS), UNKNOWN)
_KIND_VALUES: Final = pa.array(KIND_NAMES, pa.string())
_KIND_INDEX: Final = np.full(256, len(KINDS), np.uint8)
_KIND_INDEX[[kind.code for kind in KINDS]] = np.arange(len(KINDS))

# By this polars reads the column as an Enum, which it decodes six times as fast as a Categorical.
_ENUM: Final = {"_PL_ENUM_VALUES2": "".join(f"{len(name)};{name}" for name in KIND_NAMES)}


def _field(name: str, kind: str) -> pa.Field:
    if kind == "kind":
        return pa.field(name, pa.dictionary(pa.uint8(), pa.string()), nullable=False, metadata=_ENUM)
    return pa.field(name, pa.type_for_alias(kind), nullable=name in NULLABLE)


SCHEMA: Final = pa.schema([_field(name, kind) for name, kind in COLUMN_TYPES.items()])


def kind_name(code: int) -> str:
    """The name that rows of this kind code carry in a trace."""
    return BY_CODE[code].name if code in BY_CODE else UNKNOWN


def _sources() -> dict[str, tuple[tuple[str, ...], NDArray[np.uint8]]]:
    """For each column that kinds fill: its source fields, and by kind code which of them (1, 2, ...; 0: none)."""
    tables = {name: ([""], np.zeros(256, np.uint8)) for name in COLUMN_TYPES}

    def bind(code: int, column: str, field: str) -> None:
        fields, codes = tables[column]
        if field not in fields:
            fields.append(field)
        codes[code] = fields.index(field)

    for kind in KINDS:
        for column, field in zip(kind.words, _WORDS, strict=False):
            bind(kind.code, column, field)
        for column in kind.fixed:
            bind(kind.code, column, column)
        if kind.count:
            bind(kind.code, kind.count, "n")
        if kind.flags:
            bind(kind.code, "flags", "flags")
    for code in set(range(256)) - BY_CODE.keys():
        for column, field in OPAQUE.items():
            bind(code, column, field)
    return {name: (tuple(fields), codes) for name, (fields, codes) in tables.items() if len(fields) > 1}


_SOURCES: Final = _sources()


@dataclass(frozen=True)
class NamedBatch:
    """Rows as a batch of SCHEMA, what is known of them (times in ns), and their `constants`.

    These are the columns that hold one and the same value in all of the rows; None: all are null.
    """

    rows: pa.RecordBatch
    constants: dict[str, int | None]
    first_seq: int
    last_seq: int
    first_time: int
    last_time: int


def common(batches: Sequence[NamedBatch]) -> dict[str, int | None]:
    """The constants of all the batches together."""
    first, *others = (batch.constants for batch in batches)
    absent = object()
    return {name: value for name, value in first.items() if all(each.get(name, absent) == value for each in others)}


def to_named(columns: Columns, seq: Ints, vm: int, root: Ints) -> NamedBatch:
    """Rows of one VM as a batch of SCHEMA.

    `columns` are the record's fields, `seq` the row numbers, `vm` the VM's id (0: not known), `root` the root ids.
    """
    kind = columns["kind"]
    count = len(kind)
    time = columns["time"].view(np.int64)
    kinds = _Kinds(kind)
    fields = dict(columns, root=root)
    direct = {"seq": seq, "time": columns["time"], "cpu": columns["cpu"], "tid": columns["tid"]}
    arrays: list[pa.Array] = []
    values: NDArray[Any] | None
    constant: int | None
    constants: dict[str, int | None] = {}
    for name, column_type in zip(SCHEMA.names, SCHEMA.types, strict=True):
        valid = None
        if name == "kind":
            arrays.append(pa.DictionaryArray.from_arrays(pa.array(_KIND_INDEX[kind]), _KIND_VALUES))
            continue
        if name in direct:
            values = direct[name]
        elif name == "vm":
            values = np.full(count, vm)
            valid = values != 0
        elif name == "vcpu":
            values = columns["vcpu"]
            valid = values >= 0
        else:
            values, filled = _values(name, column_type.to_pandas_dtype(), kinds, fields)
            valid = filled if name in NULLABLE else None
        data, constant = _zeros(count * column_type.byte_width), 0
        if values is not None:
            own = np.ascontiguousarray(values.astype(column_type.to_pandas_dtype(), copy=False))
            constant = int(own[0]) if bool((own == own[0]).all()) else None
            data = data if constant == 0 else pa.py_buffer(own)
        nulls = 0 if valid is None else count - int(np.count_nonzero(valid))
        bitmap = pa.py_buffer(np.packbits(valid, bitorder="little")) if nulls and valid is not None else None
        arrays.append(pa.Array.from_buffers(column_type, count, [bitmap, data], nulls))
        if nulls == count:
            constants[name] = None
        elif not nulls and constant is not None:
            constants[name] = constant
    rows = pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)
    return NamedBatch(rows, constants, int(seq[0]), int(seq[-1]), int(time.min()), int(time.max()))


def _zeros(size: int) -> pa.Buffer:
    """At least so many bytes of 0, which all columns of nothing else share: a row group is half as large in memory."""
    return _zeros_of(max(size - 1, 0).bit_length())


@cache
def _zeros_of(bits: int) -> pa.Buffer:
    return pa.py_buffer(np.zeros(1 << bits, np.uint8))


class _Kinds:
    """The kinds of a batch's rows, and which rows are of some of them: many columns ask for the same."""

    def __init__(self, kind: NDArray[np.uint8]) -> None:
        self.rows = len(kind)
        self.present = np.flatnonzero(np.bincount(kind, minlength=256)).tolist()
        self._kind = kind
        self._masks: dict[tuple[int, ...], NDArray[np.bool_]] = {}

    def among(self, codes: tuple[int, ...]) -> NDArray[np.bool_]:
        """Which rows are of one of these kinds."""
        if codes not in self._masks:
            mask = np.zeros(self.rows, np.bool_)
            for code in codes:  # comparing whole columns costs less than looking up each row's
                mask |= self._kind == code
            self._masks[codes] = mask
        return self._masks[codes]


def _values(
    name: str, dtype: type[np.generic], kinds: _Kinds, fields: Columns
) -> tuple[NDArray[Any] | None, NDArray[np.bool_] | None]:
    """A column's values (None: no row has one), 0 where the row's kind does not fill it; which rows do (None: all)."""
    sources, by_kind = _SOURCES[name]
    filling: dict[int, list[int]] = {}
    for code in kinds.present:
        filling.setdefault(int(by_kind[code]), []).append(code)
    empty = filling.pop(0, None)
    if empty is None and len(filling) == 1:
        return fields[sources[next(iter(filling))]], None
    if not filling:
        return None, kinds.among(())
    values = np.zeros(kinds.rows, dtype)
    for source, codes in filling.items():
        np.copyto(values, fields[sources[source]], where=kinds.among(tuple(codes)), casting="unsafe")
    filled = tuple(sorted(code for codes in filling.values() for code in codes))
    return values, None if empty is None else kinds.among(filled)
