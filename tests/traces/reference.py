# SPDX-License-Identifier: Apache-2.0
"""The format's meaning, written once more: one record at a time, straight from the table of kinds."""

from __future__ import annotations

from typing import Any

from traces.schema import BY_CODE, COLUMN_TYPES, NULLABLE, UNKNOWN

_SIGNED = {"int8": 8, "int16": 16, "int32": 32, "int64": 64}


def row(record: Any, seq: int) -> dict[str, Any]:
    """What a trace says of one record, without `vm` and `root`, which need the other records."""
    values: dict[str, Any] = {name: None if name in NULLABLE else 0 for name in COLUMN_TYPES}
    values |= {"seq": seq, "time": record["time"], "cpu": record["cpu"], "tid": record["tid"]}
    values["vcpu"] = None if record["vcpu"] < 0 else record["vcpu"]
    kind = BY_CODE.get(int(record["kind"]))
    if kind is None:
        values["kind"], values["code"], values["ret"] = UNKNOWN, record["kind"], record["n"]
        values |= {column: record[f"w{index}"] for index, column in enumerate(("addr", "value", "old", "new"))}
        values |= {column: record[column] for column in ("role", "level", "as_id", "flags")}
    else:
        values["kind"] = kind.name
        values |= {column: record[f"w{index}"] for index, column in enumerate(kind.words)}
        values |= {column: record[column] for column in kind.fixed}
        if kind.count:
            values[kind.count] = record["n"]
        if kind.flags:
            values["flags"] = record["flags"]
    del values["vm"], values["root"]
    return {name: _as_stored(value, COLUMN_TYPES[name]) for name, value in values.items()}


def _as_stored(value: Any, column_type: str) -> Any:
    if value is None or isinstance(value, str):
        return value
    bits = _SIGNED.get(column_type)
    number = int(value)
    return number - (1 << bits) if bits and number >> (bits - 1) == 1 else number
