# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What stands in a line: numbers, names of a table, prefixes. The bytes are `_text`, places in them are told.

Cython in pure-Python mode, as all of what reads lines; the declarations that others need stand in the .pxd file.
"""

from __future__ import annotations

import cython
import numpy as np

from traces.imports import form_program as p

_MASK64 = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFFFFFF)
_MASK32 = cython.declare(cython.ulonglong, 0xFFFFFFFF)
# What plain Python must see as C does: numbers that are no numpy's.
_VIEWS = (
    "_of_name", "_event_table", "_exit_table",
)  # fmt: skip

if not cython.compiled:

    def find_byte(text: memoryview, byte: int, begin: int, end: int) -> int:
        """As C's memchr does it (line_text.pxd)."""
        return next((at for at in range(begin, end) if text[at] == byte), end)

    def strlen(text: bytes) -> int:
        """As C has it."""
        return len(text)


@cython.cclass
class LineText:
    """`_text`: where the line being read stands; tables of names: see `form_program`."""

    _text: cython.const[cython.uchar][::1]  # where the line being read stands: that, or `_scratch`
    _blob: cython.const[cython.uchar][::1]
    _of_name: cython.const[cython.uchar][::1]  # bytes that names have
    _event_table: cython.const[cython.longlong][:, ::1]
    _exit_table: cython.const[cython.longlong][:, ::1]
    _digits_value: cython.ulonglong

    def __init__(self) -> None:
        made = p.arrays()
        self._event_table, self._exit_table = made["event_table"], made["exit_table"]
        self._blob = made["blob"]
        self._of_name = np.array([chr(byte).isalnum() or byte == 95 for byte in range(128)] + [False] * 128, np.uint8)
        if not cython.compiled:
            for name in _VIEWS:
                setattr(self, name, memoryview(getattr(self, name)))

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _number(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.longlong:
        """A decimal number with blanks around it; -1: it is none."""
        value: cython.longlong = 0
        while begin < end and self._text[begin] == 32:
            begin += 1
        while end > begin and self._text[end - 1] == 32:
            end -= 1
        if begin == end or end - begin > 18:
            return -1
        for i in range(begin, end):
            if not 48 <= self._text[i] <= 57:
                return -1
            value = value * 10 + (self._text[i] - 48)
        return value

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _prefixed(
        self,
        begin: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
        prefix: cython.pointer[cython.const[cython.char]],
    ) -> cython.bint:
        i: cython.Py_ssize_t
        length: cython.Py_ssize_t = strlen(prefix)
        if end - begin < length:
            return False
        for i in range(length):  # noqa: SIM110 (C has no generators)
            if self._text[begin + i] != cython.cast(cython.uchar, prefix[i]):
                return False
        return True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _hash(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.ulonglong:
        h: cython.ulonglong = 2166136261
        i: cython.Py_ssize_t
        for i in range(begin, end):
            h = ((h ^ self._text[i]) * 16777619) & _MASK32
        return h

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _find(
        self,
        table: cython.const[cython.longlong][:, ::1],
        slots: cython.Py_ssize_t,
        begin: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.longlong:
        """The value of a name in a table; -1: it is not there."""
        h: cython.ulonglong = 0
        at: cython.Py_ssize_t
        i: cython.Py_ssize_t
        same: cython.bint
        if end > begin:  # as `form_program.short_hash`
            h = end - begin
            h = h * 31 + self._text[begin + (end - begin) // 2]
            h = h * 31 + self._text[end - 1]
            h = h * 31 + self._text[begin + (end - begin) // 4]
        at = cython.cast(cython.Py_ssize_t, h & cython.cast(cython.ulonglong, slots - 1))
        while table[at, 3] != 0:
            if cython.cast(cython.ulonglong, table[at, 0]) == h and table[at, 2] == end - begin:
                same = True
                for i in range(end - begin):
                    if self._blob[table[at, 1] + i] != self._text[begin + i]:
                        same = False
                        break
                if same:
                    return table[at, 3] - 1
            at = (at + 1) & (slots - 1)
        return -1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _digits(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.int:
        """How many hexadecimal digits there are from `begin` on; their value is in `_digits_value`."""
        i: cython.Py_ssize_t = begin
        c: cython.int
        value: cython.ulonglong = 0
        while i < end:
            c = self._text[i]
            if 48 <= c <= 57:
                c -= 48
            elif 97 <= c <= 102:
                c -= 87
            elif 65 <= c <= 70:
                c -= 55
            else:
                break
            value = ((value << 4) & _MASK64) | c
            i += 1
        self._digits_value = value
        return cython.cast(cython.int, i - begin)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _hexadecimal(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.ulonglong:
        """A number of at most 32 bits with 0x; all ones: it is none."""
        value: cython.ulonglong = 0
        i: cython.Py_ssize_t
        c: cython.int
        if end - begin < 3 or end - begin > 10 or self._text[begin] != 48 or self._text[begin + 1] != 120:
            return _MASK64
        for i in range(begin + 2, end):
            c = self._text[i]
            if 48 <= c <= 57:
                c -= 48
            elif 97 <= c <= 102:
                c -= 87
            else:
                return _MASK64
            value = (value << 4) | c
        return value

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _wide(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.ulonglong:
        value: cython.ulonglong = 0
        i: cython.Py_ssize_t
        c: cython.int
        for i in range(begin, min(end, begin + 16)):
            c = self._text[i]
            value = (value << 4) | (c - 48 if c <= 57 else c - 87 if 97 <= c <= 102 else 0)
        return value
