# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Fields by name to a row's values: `exit_reason=48 guest_rip=0xfff0`, as libtraceevent and perf trace print them."""

from __future__ import annotations

import cython
import numpy as np

from traces.imports import form_program as p
from traces.imports.line_head import LineHead

_ROLE = cython.declare(cython.int, p.ROLE)
_LEVEL = cython.declare(cython.int, p.LEVEL)
_VCPU = cython.declare(cython.int, p.VCPU)
_VENDOR = cython.declare(cython.int, p.VENDOR)
_PLACES = cython.declare(cython.int, p.PLACES)
_DECIMAL = cython.declare(cython.longlong, p.DECIMAL)
_BARE = cython.declare(cython.longlong, p.BARE)
_PREFIXED = cython.declare(cython.longlong, p.PREFIXED)
_NO_VCPU = cython.declare(cython.ulonglong, 0xFFFF)
_MASK64 = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFFFFFF)
_MASK32 = cython.declare(cython.ulonglong, 0xFFFFFFFF)
# What plain Python must see as C does: numbers that are no numpy's.
_VIEWS = (
    "_field_table", "_field_targets", "_out",
)  # fmt: skip


@cython.cclass
class NamedFields(LineHead):
    """`_out` are the values of the text just read, by place (`form_program`); `_l_end` is where what was read ends."""

    _field_table: cython.const[cython.longlong][:, ::1]
    _field_targets: cython.const[cython.longlong][:, ::1]
    _out: cython.ulonglong[::1]
    _l_end: cython.Py_ssize_t
    _in_decimal: cython.bint  # fields are all in decimal

    def __init__(self) -> None:
        super().__init__()
        made = p.arrays()
        self._field_table, self._field_targets = made["field_table"], made["field_targets"]
        self._out = np.zeros(_PLACES, np.uint64)
        self._in_decimal = False
        if not cython.compiled:
            for name in _VIEWS:
                setattr(self, name, memoryview(getattr(self, name)))

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _clear(self) -> cython.void:
        i: cython.int
        for i in range(_PLACES):
            self._out[i] = 0
        self._out[_VCPU] = _NO_VCPU

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _put(
        self, to: cython.longlong, shift: cython.longlong, mask: cython.longlong, value: cython.ulonglong
    ) -> cython.void:
        value = value & (cython.cast(cython.ulonglong, mask) & _MASK64)
        value = (value << shift) & _MASK64 if shift >= 0 else value >> -shift
        if to == _VCPU:
            self._out[_VCPU] = value if value < 0x7FFF else _NO_VCPU
        else:
            self._out[to] |= value

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _fields(
        self,
        event: cython.longlong,
        begin: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.bint:
        """`exit_reason=48 guest_rip=0xfff0`, or perf trace's `vcpu_id: 0, rip: 5)`: whether one is known."""
        i: cython.Py_ssize_t = begin
        first: cython.Py_ssize_t
        last: cython.Py_ssize_t
        found: cython.longlong
        failed: cython.bint
        colon: cython.bint
        base: cython.longlong
        known: cython.int = 0
        value: cython.ulonglong
        k: cython.Py_ssize_t
        digits: cython.int
        self._clear()
        while i < end and self._text[i] <= 32:
            i += 1
        failed = self._prefixed(i, end, b"[FAILED TO PARSE]")  # libtraceevent, of a format that it does not know
        if failed:
            i += 17
        while i < end:
            while i < end and (
                self._text[i] <= 32 or self._text[i] == 44 or self._text[i] == 40 or self._text[i] == 41
            ):
                i += 1
            first = i
            while i < end and self._of_name[self._text[i]]:
                i += 1
            last = i
            if i == first or i >= end or (self._text[i] != 61 and self._text[i] != 58):
                break
            colon = self._text[i] == 58  # perf trace's
            i += 1
            while i < end and self._text[i] == 32:
                i += 1
            found = -1 if last - first > 56 else self._field(event, first, last)
            base = _DECIMAL if found < 0 or colon or failed else self._field_targets[found, 3]
            k = i
            if i < end and self._text[i] == 45:
                i += 1
            value = 0
            digits = 0
            if i + 1 < end and self._text[i] == 48 and (self._text[i + 1] == 120 or self._text[i + 1] == 88):
                i += 2
                digits = self._digits(i, min(end, i + 16))
                value = self._digits_value
                i += digits
            elif base == _BARE and not self._in_decimal:
                digits = self._digits(i, min(end, i + 16))
                value = self._digits_value
                i += digits
            else:
                while i < end and 48 <= self._text[i] <= 57 and digits < 20:
                    value = (value * 10 + (self._text[i] - 48)) & _MASK64
                    digits += 1
                    i += 1
                if base == _PREFIXED and value != 0 and digits:
                    self._in_decimal = True  # an older libtraceevent, which prints every field so
            if k < end and self._text[k] == 45:
                value = (0 - value) & _MASK64
            while (
                i < end and self._text[i] > 32 and self._text[i] != 44 and self._text[i] != 41
            ):  # what is no number is passed over
                digits = 0
                i += 1
            if digits == 0 or found < 0:
                continue
            known += 1
            if self._field_targets[found, 0] == _VENDOR:
                self._out[_VENDOR] = value if value < 3 else 0
            else:
                self._put(
                    self._field_targets[found, 0], self._field_targets[found, 1], self._field_targets[found, 2], value
                )
                if self._field_targets[found, 0] == _ROLE:
                    self._out[_LEVEL] = value & 15
        self._l_end = i
        return known > 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _field(
        self,
        event: cython.longlong,
        begin: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.longlong:
        """The number of an event's field: names are kept as `12.guest_rip`."""
        i: cython.Py_ssize_t
        n: cython.Py_ssize_t = 0
        h: cython.ulonglong = 2166136261
        at: cython.Py_ssize_t
        same: cython.bint
        if event >= 10:
            h = ((h ^ cython.cast(cython.ulonglong, 48 + event // 10)) * 16777619) & _MASK32
            n += 1
        h = ((h ^ cython.cast(cython.ulonglong, 48 + event % 10)) * 16777619) & _MASK32
        h = ((h ^ 46) * 16777619) & _MASK32
        n += 2
        for i in range(begin, end):
            h = ((h ^ self._text[i]) * 16777619) & _MASK32
        at = cython.cast(cython.Py_ssize_t, h & 1023)
        while self._field_table[at, 3] != 0:
            if cython.cast(cython.ulonglong, self._field_table[at, 0]) == h and (
                self._field_table[at, 2] == n + end - begin
            ):
                same = True
                for i in range(end - begin):
                    if self._blob[self._field_table[at, 1] + n + i] != self._text[begin + i]:
                        same = False
                        break
                if same:
                    return self._field_table[at, 3] - 1
            at = (at + 1) & 1023
        return -1
