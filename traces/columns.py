"""From the record's words to named columns, by the table of kinds.

A column that a kind does not fill is null in that kind's rows: nulls cost a fraction of a bit in Parquet, keep the
packed columns dense, and `gfn == 0` stays a real page.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from traces.lives import Ints
from traces.record import Columns
from traces.schema import COLUMN_TYPES, KINDS

_WORDS: Final = ("w0", "w1", "w2", "w3")
_OWN: Final = ("root", "role", "level", "as_id", "flags")

# Where the columns of a row of unknown kind come from, so that nothing of it is lost.
OPAQUE: Final = {"addr": "w0", "value": "w1", "old": "w2", "new": "w3", "ret": "n"} | {name: name for name in _OWN}

KIND_TYPE: Final = pa.dictionary(pa.uint8(), pa.string())
KIND_NAMES: Final = [f"kind_{code}" for code in range(256)]
for _kind in KINDS:
    KIND_NAMES[_kind.code] = _kind.name

SCHEMA: Final = pa.schema(
    [
        pa.field(name, KIND_TYPE if kind == "kind" else pa.type_for_alias(kind), name not in ("seq", "time", "kind"))
        for name, kind in COLUMN_TYPES.items()
    ]
)


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
    for code in set(range(256)) - {kind.code for kind in KINDS}:
        for column, field in OPAQUE.items():
            bind(code, column, field)
    return {name: (tuple(fields), codes) for name, (fields, codes) in tables.items() if len(fields) > 1}


_SOURCES: Final = _sources()


def to_named(columns: Columns, seq: Ints, vm: Ints, root: Ints) -> pa.RecordBatch:
    """The rows (record fields, row numbers and resolved ids; 0 for an unknown id) as a batch of SCHEMA."""
    kind = columns["kind"]
    present = np.flatnonzero(np.bincount(kind, minlength=256))
    fields = dict(columns, root=root)
    own = {"seq": seq, "time": columns["time"], "cpu": columns["cpu"], "tid": columns["tid"]}
    arrays = []
    for name, column_type in zip(SCHEMA.names, SCHEMA.types, strict=True):
        if name == "kind":
            array = _kind_column(kind, present)
        elif name == "vm":
            array = _column(vm, column_type, vm != 0)
        elif name == "vcpu":
            array = _column(columns["vcpu"], column_type, columns["vcpu"] >= 0)
        elif name in own:
            array = _column(own[name], column_type, None)
        else:
            array = _filled_column(name, column_type, kind, present, fields)
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _kind_column(kind: NDArray[np.generic], present: NDArray[np.intp]) -> pa.Array:
    index = np.zeros(256, np.uint8)
    index[present] = np.arange(len(present))
    names = pa.array([KIND_NAMES[code] for code in present], pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(index[kind]), names)


def _filled_column(
    name: str, column_type: pa.DataType, kind: NDArray[np.generic], present: NDArray[np.intp], fields: Columns
) -> pa.Array:
    sources, by_kind = _SOURCES[name]
    used = np.unique(by_kind[present]).tolist()
    if used == [0]:
        return pa.nulls(len(kind), column_type)
    needed = [source for source in used if source]
    choice = by_kind[kind]
    values = fields[sources[needed[0]]]
    for source in needed[1:]:
        values = np.where(choice == source, fields[sources[source]], values)
    valid = None if used[0] else choice != 0
    if name in ("root", "role"):  # 0 is no root and no role word
        valid = values != 0 if valid is None else valid & (values != 0)
    return _column(values, column_type, valid)


def _column(values: NDArray[np.generic], column_type: pa.DataType, valid: NDArray[np.bool_] | None) -> pa.Array:
    """An array of the type; integers that do not fit wrap, which only records of no sane kernel can do."""
    data = np.ascontiguousarray(values.astype(column_type.to_pandas_dtype(), copy=False))
    bitmap, nulls = None, 0
    if valid is not None:
        nulls = len(data) - int(np.count_nonzero(valid))
        bitmap = pa.py_buffer(np.packbits(valid, bitorder="little")) if nulls else None
    return pa.Array.from_buffers(column_type, len(data), [bitmap, pa.py_buffer(data)], nulls)
