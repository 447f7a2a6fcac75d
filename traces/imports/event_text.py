# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""An event's name and text: by the forms of `form_program`, or as fields by name, to a row's values."""

from __future__ import annotations

import cython
import numpy as np

from traces.imports import form_program as p
from traces.imports.named_fields import NamedFields

if not cython.compiled:
    from traces.imports.line_text import strlen

_LITERAL = cython.declare(cython.int, p.LITERAL)
_HEX = cython.declare(cython.int, p.HEX)
_DEC = cython.declare(cython.int, p.DEC)
_NEGATIVE = cython.declare(cython.int, p.NEGATIVE)
_POINTER = cython.declare(cython.int, p.POINTER)
_WORD = cython.declare(cython.int, p.WORD)
_ONE_OF = cython.declare(cython.int, p.ONE_OF)
_EXIT = cython.declare(cython.int, p.EXIT)
_PFERR = cython.declare(cython.int, p.PFERR_BITS)
_PERM = cython.declare(cython.int, p.PERM)
_FAILED = cython.declare(cython.int, p.FAILED)
_COUNT = cython.declare(cython.int, p.COUNT)
_ROLE = cython.declare(cython.int, p.ROLE)
_VENDOR = cython.declare(cython.int, p.VENDOR)
_NOWHERE = cython.declare(cython.longlong, p.NOWHERE)
_TEXT_ROLE = cython.declare(cython.ulonglong, p.TEXT_ROLE)
_FAST = cython.declare(cython.longlong, p.FAST_PAGE_FAULT)
_MASK64 = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFFFFFF)
_MASK32 = cython.declare(cython.ulonglong, 0xFFFFFFFF)
_SIGN32 = cython.declare(cython.ulonglong, 0x80000000)
_JUNK = cython.declare(cython.int, p.JUNK)
_EVENT = cython.declare(cython.int, p.EVENT)
_KNOWN = cython.declare(cython.int, p.KNOWN)
_OTHER = cython.declare(cython.int, p.OTHERS)
_BEGUN = cython.declare(cython.int, p.BEGUN)
# What plain Python must see as C does: numbers that are no numpy's.
_VIEWS = (
    "_ops", "_names", "_form", "_events", "_last_form",
)  # fmt: skip


@cython.cclass
class EventText(NamedFields):
    """`_l_kind` and `_l_form` are the event's just read; -1: its text was fields. `cut`: events that were cut short."""

    _ops: cython.const[cython.longlong][:, ::1]
    _names: cython.const[cython.longlong][:, ::1]
    _form: cython.const[cython.longlong][:, ::1]
    _events: cython.const[cython.longlong][:, ::1]
    _last_form: cython.longlong[::1]
    _l_kind: cython.longlong
    _l_form: cython.longlong
    _l_name: cython.Py_ssize_t
    _l_name_end: cython.Py_ssize_t
    _pferr: cython.ulonglong
    _cut: cython.bint  # the text just read ends in dots before it has all that its row needs
    cut: int

    def __init__(self) -> None:
        super().__init__()
        made = p.arrays()
        self._ops, self._names, self._form, self._events = made["ops"], made["names"], made["forms"], made["events"]
        self._last_form = np.full(len(made["events"]), -1, np.int64)
        self._cut = False
        self.cut = 0
        if not cython.compiled:
            for name in _VIEWS:
                setattr(self, name, memoryview(getattr(self, name)))

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _event(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.int:
        """`kvm:kvm_exit: reason ...`, perhaps with perf's period before it."""
        i: cython.Py_ssize_t = begin
        first: cython.Py_ssize_t
        event: cython.longlong
        form: cython.longlong
        tried: cython.longlong
        while i < end and self._text[i] <= 32:
            i += 1
        first = i
        while i < end and 48 <= self._text[i] <= 57:
            i += 1
        if i > first and i < end and self._text[i] == 32:
            while i < end and self._text[i] == 32:
                i += 1
        else:
            i = first
        first = i
        while i < end and self._of_name[self._text[i]]:
            i += 1
        if i + 1 < end and self._text[i] == 58 and self._of_name[self._text[i + 1]] and i - first < 40:
            event = self._find(self._event_table, 256, first, i)
            if event < 0:  # the system was named: else a text begins right behind the colon
                i += 1
                first = i
                while i < end and self._of_name[self._text[i]]:
                    i += 1
        self._l_name = first
        self._l_name_end = i
        if i == first:
            if i < end and self._text[i] == 60 and self._text[end - 1] == 62:  # <stack trace>
                return _KNOWN
            return _BEGUN if i >= end else _JUNK
        if i >= end:
            return _BEGUN
        event = self._find(self._event_table, 256, first, i)
        # The function tracer's lines have no colon, nor has perf's own word on losses.
        if event < 0 or (self._text[i] != 58 and self._text[i] != 40 and self._form[self._events[event, 0], 0] != 0):
            self._l_end = end
            return _OTHER
        i += 1
        self._cut = False
        tried = self._last_form[event]
        if tried >= 0 and self._matches(tried, i, end) and self._l_end >= end:
            return self._matched(event, tried)
        for form in range(self._events[event, 0], self._events[event, 1]):
            if self._matches(form, i, end):
                self._last_form[event] = form
                return self._matched(event, form)
        if self._fields(event, i, end):
            self._l_form = -1
            self._l_kind = self._form[self._events[event, 0], 0]
            return _EVENT
        if self._cut:
            self.cut += 1
            self._l_end = end
            return _OTHER
        return _BEGUN

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _matched(self, event: cython.longlong, form: cython.longlong) -> cython.int:
        self._l_form = form
        self._l_kind = self._form[form, 0]
        if self._out[_ROLE] != 0:
            self._out[_ROLE] |= _TEXT_ROLE
        if self._l_kind == _FAST:
            self._out[_COUNT] |= 1 << 30
        return _EVENT

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _matches(
        self,
        form: cython.longlong,
        begin: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.bint:
        """Whether the text is this form; its values are in `_out`, its end in `_l_end`."""
        i: cython.Py_ssize_t = begin
        k: cython.Py_ssize_t
        op: cython.Py_ssize_t
        what: cython.longlong
        first: cython.Py_ssize_t
        count: cython.Py_ssize_t
        value: cython.ulonglong
        digits: cython.int
        found: cython.longlong
        same: cython.bint
        self._clear()
        while i < end and self._text[i] <= 32:
            i += 1
        for op in range(self._form[form, 1], self._form[form, 2]):
            what = self._ops[op, 0]
            first = self._ops[op, 4]
            count = self._ops[op, 5]
            if what == _LITERAL:
                for k in range(first, first + count):
                    if self._blob[k] == 32:
                        if i < end and i > begin and self._of_name[self._text[i]] and self._of_name[self._text[i - 1]]:
                            return False  # `info` is no beginning of `info1`
                        while i < end and self._text[i] <= 32:
                            i += 1
                    elif i < end and self._text[i] == self._blob[k]:
                        i += 1
                    else:
                        return self._is_cut(form, op, begin, i, end)
                continue
            while i < end and self._text[i] <= 32:
                i += 1
            value = 0
            if what == _HEX:
                if i + 1 < end and self._text[i] == 48 and (self._text[i + 1] == 120 or self._text[i + 1] == 88):
                    i += 2
                digits = self._digits(i, min(end, i + 17))
                value = self._digits_value
                i += digits
                if digits == 0:
                    return self._is_cut(form, op, begin, i, end)
                if digits > 16 or (i < end and self._of_name[self._text[i]]):
                    return False
            elif what in (_DEC, _NEGATIVE):
                digits = 0
                k = i
                if i < end and self._text[i] == 45:
                    i += 1
                while i < end and 48 <= self._text[i] <= 57 and digits < 20:
                    value = (value * 10 + (self._text[i] - 48)) & _MASK64
                    digits += 1
                    i += 1
                if digits == 0:
                    return self._is_cut(form, op, begin, i, end)
                if i < end and self._of_name[self._text[i]]:
                    return False
                if (self._text[k] == 45) != (what == _NEGATIVE):
                    value = (0 - value) & _MASK64
            elif what in (_POINTER, _WORD, _PERM):
                k = i
                while i < end and self._text[i] > 32 and not (what == _PERM and self._text[i] == 41):
                    i += 1
                if i == k:
                    return False
                continue
            elif what == _ONE_OF:
                same = False
                for k in range(first, first + count):
                    if self._is_name(self._names[k, 0], self._names[k, 1], i, end):
                        i += self._names[k, 1]
                        value = cython.cast(cython.ulonglong, self._names[k, 2])
                        same = True
                        break
                if not same:
                    return False
            elif what == _EXIT:
                k = i
                while i < end and self._text[i] > 32:
                    i += 1
                if (
                    i + 5 <= end
                    and self._text[i + 1] == 101
                    and self._text[i + 2] == 120
                    and self._text[i + 3] == 99
                    and self._text[i + 4] == 112
                ):
                    i += 5  # `PF excp`
                found = self._find(self._exit_table, 1024, k, i)
                if found >= 0:
                    value = cython.cast(cython.ulonglong, found & _MASK32)
                    self._out[_VENDOR] = 1 + cython.cast(cython.ulonglong, found >> 32)
                    if self._prefixed(min(i + 1, end), end, b"FAILED_VMENTRY"):
                        i += 15
                        value |= _SIGN32
                else:
                    # `UNKNOWN (77)`, or the number alone
                    if self._prefixed(k, end, b"UNKNOWN ("):
                        k += 9
                        i = k
                        while i < end and 48 <= self._text[i] <= 57:
                            value = (value * 10 + (self._text[i] - 48)) & _MASK32
                            i += 1
                        if i == k or i >= end or self._text[i] != 41:
                            return False
                        i += 1
                    else:
                        value = self._hexadecimal(k, i)
                        if value == _MASK64:
                            return False
            elif what == _PFERR:
                i = self._fault_bits(i, end)
                value = self._pferr
            elif what == _FAILED:
                if self._ends(i, end, b"failed") or self._ends(i, end, b"FAIL"):
                    value = 1
                i = end
            self._put(self._ops[op, 1], self._ops[op, 2], self._ops[op, 3], value)
        self._l_end = i
        return not (i < end and self._goes_on(i, end))

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _is_cut(
        self,
        form: cython.longlong,
        op: cython.Py_ssize_t,
        begin: cython.Py_ssize_t,
        at: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.bint:
        """Whether only dots follow, with which somebody cut the text, and it lacks nothing that a row has.

        Where it lacks something it is `_cut`: a number in front of the dots may be half a number.
        """
        i: cython.Py_ssize_t = at
        first: cython.Py_ssize_t = at
        value: cython.Py_ssize_t
        while first > begin and self._text[first - 1] == 32:
            first -= 1
        self._l_end = at
        while i < end and (
            self._text[i] == 46 or self._text[i] == 0xE2 or self._text[i] == 0x80 or self._text[i] == 0xA6
        ):
            i += 1
        if i < end or end - at < 2 or op == self._form[form, 1]:
            return False
        if first < at:
            for value in range(op, self._form[form, 2]):
                if self._ops[value, 0] != _LITERAL and self._ops[value, 1] != _NOWHERE:
                    break
            else:
                return True
        self._cut = True
        return False

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _goes_on(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.bint:
        """Whether what is left is more of the event: ` name 0x...`, of a longer form or of one not in the table."""
        i: cython.Py_ssize_t = begin
        k: cython.Py_ssize_t
        while i < end and (self._text[i] <= 32 or self._text[i] == 44):
            i += 1
        k = i
        while i < end and self._of_name[self._text[i]] and not 48 <= self._text[k] <= 57:
            i += 1
        if i - k < 3:
            return False
        while i < end and (self._text[i] == 32 or self._text[i] == 61 or self._text[i] == 58):
            i += 1
        return i < end and 48 <= self._text[i] <= 57

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _is_name(
        self,
        offset: cython.Py_ssize_t,
        length: cython.Py_ssize_t,
        begin: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
    ) -> cython.bint:
        i: cython.Py_ssize_t
        if length > end - begin:
            return False
        for i in range(length):  # noqa: SIM110 (C has no generators)
            if self._blob[offset + i] != self._text[begin + i]:
                return False
        return True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _ends(
        self,
        begin: cython.Py_ssize_t,
        end: cython.Py_ssize_t,
        tail: cython.pointer[cython.const[cython.char]],
    ) -> cython.bint:
        length: cython.Py_ssize_t = strlen(tail)
        return end - begin >= length and self._prefixed(end - length, end, tail)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _fault_bits(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """`P|W|RSVD|0x100000000` into `_pferr`; where it ends. A code without bits is not printed at all."""
        i: cython.Py_ssize_t = begin
        first: cython.Py_ssize_t
        bits: cython.ulonglong = 0
        more: cython.ulonglong
        length: cython.Py_ssize_t
        while True:
            first = i
            while i < end and (65 <= self._text[i] <= 90 or 48 <= self._text[i] <= 57 or 97 <= self._text[i] <= 122):
                i += 1
            length = i - first
            more = 0
            if length == 1 and self._text[first] == 80:
                more = 1
            elif length == 1 and self._text[first] == 87:
                more = 2
            elif length == 1 and self._text[first] == 85:
                more = 4
            elif length == 1 and self._text[first] == 70:
                more = 16
            elif length == 4 and self._text[first] == 82:
                more = 8
            elif length == 2 and self._text[first] == 80:
                more = 32
            elif length == 2 and self._text[first] == 83:
                more = 64
            elif length == 3 and self._text[first] == 83:
                more = 1 << 15
            elif length > 2 and self._text[first] == 48 and self._text[first + 1] == 120:
                more = self._wide(first + 2, i)
            if more == 0:
                i = first
                break
            bits |= more
            if i >= end or self._text[i] != 124:
                break
            i += 1
        self._pferr = bits
        return i
