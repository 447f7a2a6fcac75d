# SPDX-License-Identifier: Apache-2.0
"""The text of an event that no kind is for, from its raw record: `name: field=value field=value`, by its own format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from traces.imports.other_events import LONGEST, OTHER, OtherTexts
from traces.record import Columns

_COMMON: Final = 8  # bytes before an event's own fields
_MOST_FIELDS: Final = 32
_FIELD: Final = re.compile(
    r"^\s*field:(?P<what>[^;]*?)(?P<name>\w+)(?P<array>\[[^;]*\])?;\s*offset:(?P<offset>\d{1,6});"
    r"\s*size:(?P<size>\d{1,6});(?:\s*signed:(?P<signed>[01]);)?",
    re.M,
)
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class _Field:
    name: str
    how: str  # number, pointer, text, dynamic (where a text is, and its length), bytes
    offset: int
    size: int
    signed: bool


class FieldTexts:
    """Puts texts in place of what a decoder leaves of such events: where the record is, its size, its number."""

    def __init__(self, names: Mapping[int, str], formats: Mapping[int, str], texts: OtherTexts) -> None:
        self._names, self._formats, self._texts = names, formats, texts
        self._fields: dict[int, list[_Field]] = {}

    def fill(self, rows: Columns, data: bytes) -> None:
        """Of rows of the kind `other`, `w0` and `w1` become the place of the text; `n` is cleared."""
        at = np.flatnonzero(rows["kind"] == OTHER)
        if not len(at):
            return
        raw = np.frombuffer(data, np.uint8)
        begin, size, number = (rows[name][at].astype(np.int64) for name in ("w0", "w1", "n"))
        made = np.empty(len(at), object)
        for event in np.unique(number).tolist():
            mine = np.flatnonzero(number == event)
            made[mine] = self._of(event, raw, begin[mine], size[mine])
        rows["w0"][at], rows["w1"][at] = self._texts.add(made.tolist())
        rows["n"][at] = 0

    def _of(self, event: int, raw: Bytes, begin: NDArray[np.int64], size: NDArray[np.int64]) -> list[bytes]:
        if event not in self._fields:
            self._fields[event] = _fields(self._formats.get(event, ""))
        parts: list[Any] = [f"{self._names.get(event, f'event_{event}')}:"]
        least = int(size.min())
        for field in self._fields[event]:
            if field.offset + field.size <= least:
                parts += [f" {field.name}=", _text(field, raw, begin, size)]
        if len(parts) == 1:
            return [parts[0].encode()] * len(begin)
        joined: list[bytes] = pc.binary_join_element_wise(*parts, "").cast(pa.binary()).to_pylist()
        return joined


def _fields(text: str) -> list[_Field]:
    found = []
    for match in _FIELD.finditer(text.partition("print fmt:")[0]):
        what, size = match["what"] + (match["array"] or ""), int(match["size"])
        if int(match["offset"]) < _COMMON or not 0 < size <= LONGEST:
            continue
        if "__data_loc" in what or "__rel_loc" in what:
            how = "dynamic" if "char" in what and "__data_loc" in what and size == 4 else "bytes"
        elif match["array"]:
            how = "text" if "char" in what else "bytes"
        elif size in (1, 2, 4, 8):
            how = "pointer" if "*" in what else "number"
        else:
            how = "bytes"
        found.append(_Field(match["name"], how, int(match["offset"]), size, match["signed"] == "1"))
    return found[:_MOST_FIELDS]


def _text(field: _Field, raw: Bytes, begin: NDArray[np.int64], size: NDArray[np.int64]) -> pa.Array:
    held = np.ascontiguousarray(raw[(begin + field.offset)[:, None] + np.arange(field.size)])
    if field.how == "number":
        return pa.array(held.view(f"<{'i' if field.signed else 'u'}{field.size}")[:, 0]).cast(pa.string())
    if field.how == "pointer":
        return pa.array([f"{value:#x}" for value in held.view(f"<u{field.size}")[:, 0].tolist()])
    if field.how == "text":
        return pa.array([_printable(line) for line in held.view(f"S{field.size}")[:, 0].tolist()])
    if field.how == "dynamic":
        where = held.view("<u4")[:, 0].astype(np.int64)
        first, length = begin + (where & 0xFFFF), np.minimum(where >> 16, LONGEST)
        inside = (where & 0xFFFF) + length <= size
        spans = zip(first.tolist(), np.where(inside, length, 0).tolist(), strict=True)
        return pa.array([_printable(bytes(raw[at : at + count])) for at, count in spans])
    return pa.array([line.hex() for line in held.view(f"V{field.size}")[:, 0].tolist()])


def _printable(text: bytes) -> str:
    """Up to its end, in one line."""
    shown = text.partition(b"\0")[0].decode(errors="replace")
    return "".join(char if char.isprintable() else "?" for char in shown)
