# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Whose line it is: the task, process, CPU and time before an event, as ftrace, trace-cmd and perf print them."""

from __future__ import annotations

import cython

from traces.imports import form_program as p
from traces.imports.line_text import LineText

if not cython.compiled:
    from traces.imports.line_text import find_byte

_JUNK = cython.declare(cython.int, p.JUNK)
_KNOWN = cython.declare(cython.int, p.KNOWN)


@cython.cclass
class LineHead(LineText):
    """`_l_` is of the line just read: its time (ns), thread, process, CPU, and where its thread's name stands."""

    _l_time: cython.ulonglong
    _l_tid: cython.longlong
    _l_tgid: cython.longlong
    _l_cpu: cython.longlong
    _l_comm: cython.Py_ssize_t
    _l_comm_end: cython.Py_ssize_t
    _l_how: cython.int  # 0: in seconds, 1: bare, 2: ticks, 3: milliseconds since the beginning

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _find_time(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Where the event begins behind `1234.567890: `, with task, CPU and time taken; -1: there is no time."""
        i: cython.Py_ssize_t
        first: cython.Py_ssize_t
        fraction: cython.Py_ssize_t
        k: cython.Py_ssize_t
        whole: cython.ulonglong
        part: cython.ulonglong
        digits: cython.Py_ssize_t
        last: cython.Py_ssize_t = max(min(end, begin + 200), begin + 3)
        i = begin + 2
        while True:
            i = find_byte(self._text, 58, i + 1, last)
            if i == last:
                return -1
            if i + 1 < end and self._text[i + 1] != 32 and self._text[i + 1] != 9:
                continue
            if not 48 <= self._text[i - 1] <= 57:
                if i > begin + 3 and self._text[i - 2] == 115 and self._text[i - 3] == 117:  # `us`
                    first = self._microseconds(begin, i - 3)
                    if first >= 0:
                        self._task(begin, first)
                        return i + 1
                continue
            first = i - 1
            while first > begin and 48 <= self._text[first - 1] <= 57:
                first -= 1
            fraction = 0
            if first > begin + 1 and self._text[first - 1] == 46 and 48 <= self._text[first - 2] <= 57:
                fraction = i - first
                first -= 2
                while first > begin and 48 <= self._text[first - 1] <= 57:
                    first -= 1
            if first > begin and self._text[first - 1] != 32 and self._text[first - 1] != 9:
                continue
            if (fraction != 6 and fraction != 9 and fraction != 0) or i - first > 20:
                continue
            if fraction == 0 and not self._after_cpu(begin, first):
                continue
            whole = part = 0
            digits = i - first - (fraction + 1 if fraction else 0)
            if digits > 18 or (fraction and digits > 9):
                continue
            for k in range(first, first + digits):
                whole = whole * 10 + (self._text[k] - 48)
            for k in range(i - fraction, i):
                part = part * 10 + (self._text[k] - 48)
            if fraction == 6:
                part *= 1000
            if fraction:
                self._l_time = whole * 1000000000 + part
            else:
                self._l_time = whole
                self._l_how = 2
            self._task(begin, first)
            return i + 1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _microseconds(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Where the time begins that ends here, as ftrace's latency format has it; -1: there is none."""
        first: cython.Py_ssize_t = end
        while first > begin and 48 <= self._text[first - 1] <= 57:
            first -= 1
        if first in (begin, end) or end - first > 15 or self._text[first - 1] != 32:
            return -1
        self._l_time = cython.cast(cython.ulonglong, self._number(first, end)) * 1000
        self._l_how = 3
        return first

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _comment(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Where an event begins among function_graph's lines, ` 3)  task-7  |  /* kvm_entry: ... */`; -1: none does."""
        i: cython.Py_ssize_t = begin
        first: cython.Py_ssize_t
        while i < end and 48 <= self._text[i] <= 57:
            i += 1
        if i == begin or i >= end or self._text[i] != 41 or end - i < 8 or self._text[end - 1] != 47:
            return -1
        first = i + 1
        while i < end and self._text[i] != 124:
            i += 1
        while i < end - 2 and not (self._text[i] == 47 and self._text[i + 1] == 42):
            i += 1
        if i >= end - 4 or self._text[end - 2] != 42:
            return -1
        self._l_cpu = self._number(begin, first - 1)
        self._l_comm = first
        while first < i and self._text[self._l_comm] == 32:
            self._l_comm += 1
            first += 1
        while first < i and self._text[first] != 124:
            first += 1
        self._task(self._l_comm, first)
        return i + 2

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _after_cpu(self, begin: cython.Py_ssize_t, at: cython.Py_ssize_t) -> cython.bint:
        """Whether a CPU in brackets stands before, with nothing but flags between: a time without a point."""
        i: cython.Py_ssize_t = at
        while i > begin and self._text[i - 1] <= 32:
            i -= 1
        if i > begin and self._text[i - 1] != 93:
            while i > begin and self._text[i - 1] > 32:
                i -= 1
            while i > begin and self._text[i - 1] <= 32:
                i -= 1
        return i > begin and self._text[i - 1] == 93 and i - 2 >= begin and 48 <= self._text[i - 2] <= 57

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _task(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.void:
        """`CPU 3/KVM-5120 (51) [006] d....`, `fc_vcpu 2  417/418 [011]`: from the right, for names hold anything."""
        i: cython.Py_ssize_t = end
        first: cython.Py_ssize_t
        value: cython.longlong
        for _ in range(2):  # flags, then the CPU; or the CPU alone
            while i > begin and self._text[i - 1] <= 32:
                i -= 1
            first = i
            while first > begin and self._text[first - 1] > 32:
                first -= 1
            if i - first >= 3 and self._text[i - 1] == 93 and self._text[first] == 91:
                self._l_cpu = self._number(first + 1, i - 1)
                i = first
                break
            if not (3 <= i - first <= 10) or not self._are_flags(first, i):
                break
            i = first
            while self._text[first] >= 48 and self._text[first] <= 57:  # `trace-cmd report -l` has the CPU before them
                self._l_cpu = self._l_cpu * 10 + (self._text[first] - 48)
                first += 1
            if first > i:
                break
        while i > begin and self._text[i - 1] <= 32:
            i -= 1
        if i > begin and self._text[i - 1] == 41:  # (tgid), perhaps (-----)
            first = i - 1
            while first > begin and self._text[first - 1] != 40:
                first -= 1
            value = self._number(first, i - 1)
            if first > begin and (value >= 0 or self._text[i - 2] == 45):
                self._l_tgid = max(value, 0)
                i = first - 1
                while i > begin and self._text[i - 1] <= 32:
                    i -= 1
        first = i
        while first > begin and 48 <= self._text[first - 1] <= 57:
            first -= 1
        if first in (i, begin):
            return
        value = self._number(first, i)
        if value > 1 << 30:
            return
        self._l_tid = value
        i = first - 1
        if self._text[i] == 47:  # pid/tid
            first = i
            while first > begin and 48 <= self._text[first - 1] <= 57:
                first -= 1
            value = self._number(first, i)
            if first < i and first > begin and self._text[first - 1] <= 32 and value <= 1 << 30:
                self._l_tgid = value
                i = first - 1
        while i > begin and self._text[i - 1] <= 32:
            i -= 1
        self._l_comm_end = max(min(i, begin + 64), begin)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _are_flags(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.bint:
        """`d..1.`, `dNh2`, `-....`, `...2 102`: letters, digits and dots; a dot or a letter among them."""
        i: cython.Py_ssize_t
        other: cython.int = 0
        for i in range(begin, end):
            if (
                self._text[i] == 46
                or self._text[i] == 35
                or self._text[i] == 61
                or 65 <= self._text[i] <= 90
                or 97 <= self._text[i] <= 122
            ):
                other += 1
            elif not 48 <= self._text[i] <= 57 and self._text[i] != 45:
                return False
        return other > 0 and self._text[end - 1] != 45

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _relative(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """perf trace's `731.042 ( 0.004 ms): qemu/2700 kvm:kvm_entry(`: where the event begins; -1: it is none."""
        i: cython.Py_ssize_t = begin
        k: cython.Py_ssize_t
        whole: cython.ulonglong = 0
        part: cython.ulonglong = 0
        while i < end and 48 <= self._text[i] <= 57 and i - begin < 15:
            whole = whole * 10 + (self._text[i] - 48)
            i += 1
        if i + 4 >= end or self._text[i] != 46 or self._text[i + 4] != 32:
            return -1
        for k in range(i + 1, i + 4):
            if not 48 <= self._text[k] <= 57:
                return -1
            part = part * 10 + (self._text[k] - 48)
        self._l_time = whole * 1000000 + part * 1000
        i += 5
        while i < end and self._text[i] == 32:
            i += 1
        if i < end and self._text[i] == 40:
            while i < end and self._text[i] != 41:
                i += 1
            i += 1
            if i < end and self._text[i] == 58:
                i += 1
        while i < end and self._text[i] == 32:
            i += 1
        # The task ends where ` system:event` begins.
        for k in range(i, min(end - 3, i + 80)):
            if (
                self._text[k] == 32
                and 48 <= self._text[k - 1] <= 57
                and self._text[k + 1] == 107
                and self._text[k + 2] == 118
                and self._text[k + 3] == 109
            ):
                self._l_comm = i
                self._l_comm_end = i
                self._task(i, k)
                if self._l_tgid == 0 or self._l_tid > 0:
                    return k + 1
        return -1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _bare(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Where a line begins with the name of an event that is known; -1: with none."""
        i: cython.Py_ssize_t = begin
        system: cython.Py_ssize_t = begin
        while i < end and (self._text[i] == 95 or 48 <= self._text[i] <= 57 or 97 <= self._text[i] <= 122):
            i += 1
        if i < end - 1 and self._text[i] == 58 and self._text[i + 1] != 32 and i - begin <= 6:
            i += 1
            system = i
            while i < end and (self._text[i] == 95 or 48 <= self._text[i] <= 57 or 97 <= self._text[i] <= 122):
                i += 1
        if i == system or i >= end or (self._text[i] != 58 and self._text[i] != 40):
            return -1
        return begin if self._find(self._event_table, 256, system, i) >= 0 else -1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _starts(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.bint:
        """Whether a line is `CPU:2 [LOST 771 EVENTS]`, or `CPU:2 [EVENTS DROPPED]`."""
        return (
            end - begin > 12
            and self._text[begin] == 67
            and self._text[begin + 1] == 80
            and self._text[begin + 2] == 85
            and (self._text[begin + 3] == 58 and self._text[end - 1] == 93)
        )

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _heading(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.int:
        """Headings, stacks and what separates: nothing to wonder at. All else is junk."""
        i: cython.Py_ssize_t = begin
        if self._text[begin] == 35 or (self._text[begin] == 45 and end - begin == 2 and self._text[begin + 1] == 45):
            return _KNOWN
        if end - begin > 2 and self._text[begin] == 61 and self._text[begin + 1] == 62:
            return _KNOWN
        if self._text[begin] == 60 and self._text[end - 1] == 62 and end - begin < 40:  # <stack trace>, <idle>
            return _KNOWN
        if self._prefixed(begin, end, b"cpus=") or self._prefixed(begin, end, b"version = "):
            return _KNOWN
        if self._prefixed(begin, end, b"CPU ") and self._text[end - 1] == 121:  # is empty
            return _KNOWN
        # A frame of perf's call chains: an address, a blank, a symbol.
        while i < end and (48 <= self._text[i] <= 57 or 97 <= self._text[i] <= 102):
            i += 1
        if i - begin >= 6 and i < end - 1 and self._text[i] == 32 and (self._text[end - 1] == 41 or i - begin >= 12):
            return _KNOWN
        return _JUNK
