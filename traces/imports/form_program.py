# SPDX-License-Identifier: Apache-2.0
"""The table of forms as arrays: what the scanner runs, event by event (`event_text.py`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from traces.imports.exit_words import words
from traces.kernels.printed import FIELDS, FORMS, PFERR, PLUGIN, UNREAD, Form
from traces.schema import BY_NAME

# What an operation does. Its arguments: `to` the place of a value, `shift` (negative: to the right), `mask`.
LITERAL, HEX, DEC, NEGATIVE, POINTER, WORD, ONE_OF, EXIT, PFERR_BITS, PERM, FAILED = range(11)
# What a line is. KNOWN: a heading, a stack, an empty line; OTHERS: an event of no kind that a trace has; BEGUN: an
# event with its time, but without the end of its text.
JUNK, EVENT, KNOWN, OTHERS, LOSS, BEGUN = range(6)
# Places of a row's values.
W0, W1, W2, W3, COUNT, ROLE, LEVEL, FLAGS, SPACE, VCPU, VENDOR, NOWHERE = range(12)
PLACES: Final = 12
# How a field is printed alone: in hexadecimal without 0x, or with it.
DECIMAL, BARE, PREFIXED = range(3)

# Role words that a text describes are kept in a layout of our own until the kernel's is known; bit 31 tells them.
TEXT_ROLE: Final = 1 << 31
ROLE_FIELDS: Final = {
    "quadrant": (0, 3), "direct": (2, 1), "access": (3, 7), "invalid": (6, 1), "nx": (7, 1), "ad_disabled": (8, 1),
    "gpte": (9, 15), "smm": (13, 1),
}  # fmt: skip

_PIECE: Final = re.compile(r"\{([^{}]*)\}")
_NUMBERS: Final = {"x": HEX, "08x": HEX, "016x": HEX, "014x": HEX, "d": DEC, "-d": NEGATIVE}
_PLAIN: Final = {
    "p": POINTER, "w": WORD, "exit": EXIT, "pferr": PFERR_BITS, "perm": PERM, "failed": FAILED,
}  # fmt: skip
_ALL: Final = (1 << 64) - 1
FAST_PAGE_FAULT: Final = BY_NAME["fast_page_fault"].code
RUNS_GUEST: Final = tuple(BY_NAME[name].code for name in ("kvm_entry", "kvm_exit", "kvm_userspace_exit"))


@dataclass(frozen=True)
class FormPart:
    """A part of a form: literal text; or a `column` of the trace (empty: none), which bits of it, how it is printed."""

    literal: str = ""
    column: str = ""
    shift: int = 0
    mask: int = _ALL
    how: str = ""

    @property
    def names(self) -> list[tuple[str, int]]:
        """The texts that it may be, longest first, with their values."""
        pairs = [alternative.rsplit("=", 1) for alternative in self.how.split("|")]
        return sorted(((name, int(value)) for name, value in pairs), key=lambda pair: -len(pair[0]))


@cache
def pieces(text: str) -> tuple[FormPart, ...]:
    """A form's parts, in order."""
    found: list[FormPart] = []
    at = 0
    for match in _PIECE.finditer(text):
        if match.start() > at:
            found.append(FormPart(text[at : match.start()]))
        target, _, how = match[1].partition(":")
        column, shift, mask = bits(target)
        found.append(FormPart("", column, shift, mask, how))
        at = match.end()
    if at < len(text):
        found.append(FormPart(text[at:]))
    return tuple(found)


def bits(target: str) -> tuple[str, int, int]:
    """`code<<8` or `flags&1`: column, shift (negative: to the right), mask."""
    match = re.fullmatch(r"([\w.]*)(?:(<<|>>)(\d+))?(?:&(\d+))?", target)
    assert match is not None, target
    shift = int(match[3] or 0) * (-1 if match[2] == ">>" else 1)
    return match[1], shift, int(match[4] or _ALL)


def place(kind: str, column: str) -> tuple[int, int, int]:
    """Where a kind's column stands among a row's values, and for a field of the role its lowest bit and mask."""
    if not column:
        return NOWHERE, 0, _ALL
    if column.startswith("role."):
        shift, mask = ROLE_FIELDS[column.removeprefix("role.")]
        return ROLE, shift, mask
    own = {"vcpu": VCPU, "role": ROLE, "level": LEVEL, "flags": FLAGS, "as_id": SPACE, "isa": VENDOR}
    known = BY_NAME[kind]
    if column in known.words:
        return known.words.index(column), 0, _ALL
    if column == known.count:
        return COUNT, 0, _ALL
    return own[column], 0, _ALL


@dataclass
class _Table:
    """A hash table of names for the scanner: open addressing, checked against the names themselves."""

    slots: int
    hashed: Callable[[bytes], int]
    names: dict[str, int] = field(default_factory=dict)

    def arrays(self, blob: bytearray) -> NDArray[np.int64]:
        """Rows of (hash, offset and length in `blob`, value + 1; 0: free)."""
        table = np.zeros((self.slots, 4), np.int64)
        for name, value in self.names.items():
            at = self.hashed(name.encode()) & (self.slots - 1)
            while table[at, 3]:
                at = (at + 1) & (self.slots - 1)
            table[at] = (self.hashed(name.encode()), len(blob), len(name), value + 1)
            blob += name.encode()
        return table


def short_hash(name: bytes) -> int:
    """Of a few bytes: names of one table differ in these, or are compared."""
    value = len(name)
    for at in (len(name) // 2, len(name) - 1, len(name) // 4):
        value = value * 31 + name[at]
    return value


def fnv(name: bytes) -> int:
    """FNV-1a of 32 bits."""
    value = 2166136261
    for byte in name:
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    return value


@dataclass(frozen=True)
class FormProgram:
    """Arrays for the scanner.

    `ops`: (operation, place, shift, mask as a signed word, first, count); first and count are of `blob` for literals,
    of `names` for a choice. `names`: (offset, length, value). `forms`: (kind, first op, end). `events`: (first form,
    end).
    """

    ops: NDArray[np.int64]
    names: NDArray[np.int64]
    forms: NDArray[np.int64]
    events: NDArray[np.int64]
    event_table: NDArray[np.int64]
    exit_table: NDArray[np.int64]
    field_table: NDArray[np.int64]
    field_targets: NDArray[np.int64]  # (place, shift, mask, how it is printed as a field)
    blob: bytes
    order: tuple[Form, ...]  # the forms, as numbered


def signed(mask: int) -> int:
    """A mask as a signed word."""
    return mask - (1 << 64) if mask >> 63 else mask


@cache
def program() -> FormProgram:
    """The program of `printed.FORMS`. Those of some rows only are tried first, then the longest: none hides another."""
    blob = bytearray()
    ops: list[tuple[int, ...]] = []
    names: list[tuple[int, int, int]] = []
    forms: list[tuple[int, int, int]] = []
    order: list[Form] = []
    events: list[tuple[int, int]] = []
    table = _Table(256, short_hash)
    by_event: dict[str, list[Form]] = {}
    for form in FORMS:
        by_event.setdefault(form.event, []).append(form)
    fields = _Table(1024, fnv)
    targets: list[tuple[int, int, int, int]] = []
    for event, mine in by_event.items():
        table.names[event] = len(events)
        first = len(forms)
        for form in sorted(mine, key=lambda form: (form.when is None, -len(pieces(form.text)))):
            begin = len(ops)
            for piece in pieces(form.text):
                ops.append(_op(form.kind, piece, blob, names))
            forms.append((BY_NAME[form.kind].code, begin, len(ops)))
            order.append(form)
        for name, target in FIELDS.get(mine[0].kind, {}).items():
            if not fields_differ(event, name):
                column, shift, mask = bits(target)
                fields.names[f"{len(events)}.{name}"] = len(targets)
                targets.append((place(mine[0].kind, column)[0], shift, signed(mask), _base(mine, column)))
        events.append((first, len(forms)))
    exits = _Table(1024, short_hash)
    exits.names = words()
    event_table, exit_table, field_table = (each.arrays(blob) for each in (table, exits, fields))
    return FormProgram(
        np.array(ops, np.int64), np.array(names, np.int64), np.array(forms, np.int64), np.array(events, np.int64),
        event_table, exit_table, field_table, np.array(targets, np.int64), bytes(blob), tuple(order),
    )  # fmt: skip


def _base(forms: list[Form], column: str) -> int:
    """How libtraceevent prints a field alone: as the event's print format does, if it can read that; else decimal."""
    if forms[0].kind in UNREAD:
        return DECIMAL
    found = [
        before.literal.endswith("0x")
        for form in forms
        for before, part in pairwise((FormPart(), *pieces(form.text)))
        if part.column == column and _NUMBERS.get(part.how) == HEX and form.since != PLUGIN
    ]
    return DECIMAL if not found else PREFIXED if all(found) else BARE


def fields_differ(event: str, name: str) -> bool:
    """Whether an event's field means another thing than in its later form."""
    return (event, name) in (("kvm_nested_vmrun", "rip"), ("kvm_nested_vmenter", "rip"))


def _op(kind: str, piece: FormPart, blob: bytearray, names: list[tuple[int, int, int]]) -> tuple[int, ...]:
    if piece.literal:
        literal = re.sub(r"0x$", "", piece.literal)  # numbers may have it or not
        blob += literal.encode()
        return (LITERAL, NOWHERE, 0, 0, len(blob) - len(literal), len(literal))
    to, low, most = place(kind, piece.column)
    shift, mask = piece.shift + low, signed(piece.mask & most)
    if piece.how in _NUMBERS:
        return (_NUMBERS[piece.how], to, shift, mask, 0, 0)
    if piece.how in _PLAIN:
        return (_PLAIN[piece.how], to, shift, mask, 0, 0)
    first = len(names)
    for name, value in piece.names:
        text = re.sub(r"0x$", "", name).strip(" ")
        blob += text.encode()
        names.append((len(blob) - len(text), len(text), value))
    return (ONE_OF, to, shift, mask, first, len(piece.names))


def pferr_bits() -> tuple[tuple[bytes, int], ...]:
    """The names of a page fault's error code's bits, longest first."""
    return tuple((name.encode(), bit) for name, bit in PFERR)


def arrays() -> dict[str, Any]:
    """The program's arrays by name, for the scanner."""
    made = program()
    return {name: getattr(made, name) for name in made.__dataclass_fields__ if name != "order"}
