# SPDX-License-Identifier: Apache-2.0
"""What a tracepoint's raw record holds, by the format that its file carries: where which column's bits are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from traces.imports.form_program import LEVEL, ROLE, bits, fields_differ, place, signed
from traces.kernels.printed import FIELDS, FORMS
from traces.schema import BY_NAME

SYSTEMS: Final = ("kvm", "kvmmmu")
MOST_IDS: Final = 1 << 16  # a record has 16 bits for its event
COMMON: Final = 8  # bytes before an event's own fields: type, flags, preemption, pid
_MOST_BYTES: Final = 1 << 13  # of a record of ours
_FIELD: Final = re.compile(
    r"^\s*field:(?P<what>[^;]*?)(?P<name>\w+)(?P<array>\[[^;]*\])?;\s*offset:(?P<offset>\d{1,6});"
    r"\s*size:(?P<size>\d{1,6});(?:\s*signed:(?P<signed>[01]);)?",
    re.M,
)
_NAME: Final = re.compile(r"^name:\s*(\w{1,100})\s*$", re.M)
_ID: Final = re.compile(r"^ID:\s*(\d{1,5})\s*$", re.M)
_KINDS: Final = {form.event: form.kind for form in FORMS}


@dataclass(frozen=True)
class RawFields:
    """Arrays for the decoder.

    `events`: by an event's number in the file, its place in `kinds`, -1 where a trace has no kind for it; `kinds`:
    (kind, first field, end, bytes that there must be); `fields`: (offset, size, signed, place, shift, mask as a signed
    word). `names` of all events by their numbers, and by system; `others`: the formats of those that no kind is for.
    """

    events: NDArray[np.int64]
    kinds: NDArray[np.int64]
    fields: NDArray[np.int64]
    names: Mapping[int, str]
    systems: Mapping[str, Sequence[str]]
    others: Mapping[int, str]


def raw_fields(formats: Iterable[tuple[str, str]]) -> RawFields:
    """What to read, by (system, text of the format) of each event of a file; those that make no sense are left out."""
    events = np.full(MOST_IDS, -1, np.int64)
    kinds: list[tuple[int, int, int, int]] = []
    fields: list[tuple[int, ...]] = []
    names: dict[int, str] = {}
    others: dict[int, str] = {}
    systems: dict[str, list[str]] = {}
    for system, text in formats:
        name, number = _NAME.search(text), _ID.search(text)
        if name is None or number is None or int(number[1]) >= MOST_IDS:
            continue
        names[int(number[1])] = name[1]
        systems.setdefault(system, []).append(name[1])
        kind = _KINDS.get(name[1])
        if kind is None or system not in SYSTEMS:
            others[int(number[1])] = text
            continue
        first, least = len(fields), COMMON
        for field in _FIELD.finditer(text.partition("print fmt:")[0]):
            read = _read(name[1], kind, field)
            fields += read
            least = max([least, *(offset + size for offset, size, *_ in read)])
        events[int(number[1])] = len(kinds)
        kinds.append((BY_NAME[kind].code, first, len(fields), least))
    tables = (np.array(kinds, np.int64).reshape(-1, 4), np.array(fields, np.int64).reshape(-1, 6))
    return RawFields(events, *tables, names, systems, others)


def _read(event: str, kind: str, field: re.Match[str]) -> list[tuple[int, ...]]:
    """What to read of a field: nothing, where no column has it; a role's level besides the role."""
    name, offset, size = field["name"], int(field["offset"]), int(field["size"])
    target = FIELDS.get(kind, {}).get(name)
    if target is None or field["array"] or fields_differ(event, name):
        return []
    if size not in (1, 2, 4, 8) or offset < COMMON or offset + size > _MOST_BYTES:
        return []
    column, shift, mask = bits(target)
    to, low, most = place(kind, column)
    where = (offset, size, int(field["signed"] or 0))
    read: list[tuple[int, ...]] = [(*where, to, shift + low, signed(mask & most))]
    return [*read, (*where, LEVEL, 0, 15)] if to == ROLE else read
