# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Lines of text to records: what ftrace, trace-cmd and perf print, line by line, and what mailers made of it.

A line is quoting, a task, a CPU, a time (`line_head`), an event's name and its text (`event_text`). Lines are taken
one by one; one that is none known may be the rest of the line before, which a mailer wrapped: the two are then read as
one. Cython in pure-Python mode; Python objects are made only for what is rare (a thread never seen, a name never seen,
the first odd line).
"""

from __future__ import annotations

import cython
import numpy as np

from traces.imports import form_program as p
from traces.imports.line_rows import LineRows

if not cython.compiled:
    from traces.imports.line_text import find_byte

COMPILED: bool = cython.compiled

_JUNK = cython.declare(cython.int, p.JUNK)
_EVENT = cython.declare(cython.int, p.EVENT)
_KNOWN = cython.declare(cython.int, p.KNOWN)
_OTHER = cython.declare(cython.int, p.OTHERS)
_LOSS = cython.declare(cython.int, p.LOSS)
_BEGUN = cython.declare(cython.int, p.BEGUN)
_LONGEST = cython.declare(cython.int, 4096)  # a line's bytes; longer ones are no events
_SHOWN = cython.declare(cython.int, 200)  # bytes of the first line that was not understood
_MOST_PARTS = cython.declare(cython.int, 6)  # lines that one event may be wrapped over
# What plain Python must see as C does: numbers that are no numpy's.
_VIEWS = (
    "_scratch",
)  # fmt: skip


@cython.final
@cython.cclass
class Scanner(LineRows):
    """`take` reads lines until there is no room for more `rows`.

    `odd` lines were not understood, `first_odd` is the first of them; `joined` were wrapped.
    """

    odd: int
    first_odd: bytes
    lines: int
    joined: int
    _room: cython.Py_ssize_t
    _data: cython.const[cython.uchar][::1]  # what was given
    _scratch: cython.uchar[::1]
    _in_scratch: cython.bint  # `_text` is that: to set it costs as much as all else of a short line
    _held: cython.Py_ssize_t  # its length; 0: none
    _held_at: cython.Py_ssize_t  # where it stands in the text; -1: it is in _scratch
    _parts: cython.int
    _held_what: cython.int
    _goes_on_held: cython.bint  # the line was put behind the one that is held
    _held_used: cython.Py_ssize_t

    def __init__(self, room: int = 1 << 16) -> None:
        super().__init__(room)
        self._room = room
        self._scratch = np.zeros(_LONGEST, np.uint8)
        self._in_scratch = False
        self._held = 0
        self._held_at = -1
        self._parts = 0
        self._held_what = _JUNK
        self._goes_on_held = False
        self._held_used = 0
        if not cython.compiled:
            for name in _VIEWS:
                setattr(self, name, memoryview(getattr(self, name)))
        self.odd = self.lines = self.joined = 0
        self.first_odd = b""

    def take(self, data: bytes, start: int, final: bool) -> int:
        """Read lines of `data` from `start` on; where the first line begins that was not read.

        `final`: there is nothing after `data`, so that its last line needs no end. The caller empties `rows`.
        """
        size: cython.Py_ssize_t = len(data)
        at: cython.Py_ssize_t = start
        end: cython.Py_ssize_t
        begin: cython.Py_ssize_t
        last: cython.bint = final
        self._data = self._text = data
        self._in_scratch = False
        with cython.nogil:
            while at < size and self.rows < self._room - 1:
                end = find_byte(self._data, 10, at, size)
                if end == size and not last:
                    break
                begin = at
                at = end + 1
                while begin < end and (
                    self._data[begin] == 62 or self._data[begin] == 32 or self._data[begin] == 9
                ):  # quoting
                    begin += 1
                while end > begin and self._data[end - 1] <= 32:
                    end -= 1
                self.lines += 1
                self._take_line(begin, end)
            self._keep()
        return min(at, size)

    @property
    def full(self) -> bool:
        """Whether the caller must empty `rows` before more is read; the next line may change the last one."""
        return self.rows >= self._room - 1

    def too_long(self, head: bytes) -> None:
        """Count what is no line."""
        if self.odd == 0:
            self.first_odd = head[:_SHOWN]
        self.odd += 1
        self._held = 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(-1, check=False)
    def _take_line(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.int:
        what: cython.int
        if begin == end:
            return 0
        if end - begin >= _LONGEST:
            self._count_odd(begin, end)
            self._held = 0
            return 0
        what = self._read_data(begin, end)
        if (
            what in (_EVENT, _BEGUN)
            and self._l_tid == 0
            and self._held
            and ((self._l_how == 0 and self._held_what == _JUNK) or (self._l_how == 1 and self._held_what == _BEGUN))
        ):
            if self._with_task(begin, end):
                return 0
            what = self._read_data(begin, end)
        if what == _EVENT:
            self._emit()
            self._hold(begin, end, _EVENT)
        elif what in (_KNOWN, _LOSS):
            # What looks like a frame of a stack may be a number that continues an event.
            if what == _LOSS or self._held == 0 or self._held_what != _BEGUN or not self._join(begin, end):
                self._held = 0
                self._goes_on_held = False
        elif what == _OTHER:
            self._count_other()
            self._held = 0
        elif what == _BEGUN or not self._held or self._held_what == _JUNK or not self._join(begin, end):
            self._count_odd(begin, end)
            if what == _BEGUN or not self._goes_on_held:
                self._hold(begin, end, what)
            self._goes_on_held = False
        return 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _read(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.int:
        """What the line is; of an event all that `_emit` needs."""
        at: cython.Py_ssize_t
        self._l_tid = self._l_tgid = self._l_cpu = 0
        self._l_comm = self._l_comm_end = begin
        self._l_how = 0
        at = self._find_time(begin, end)
        if at >= 0:
            return self._event(at, end)
        if (
            self._text[begin] == 35 or self._text[begin] == 61 or self._text[begin] == 60
        ):  # '#', '=> f', '<stack trace>'
            return self._heading(begin, end)
        if 48 <= self._text[begin] <= 57:
            at = self._relative(begin, end)
            if at >= 0:
                self._l_how = 3
                return self._event(at, end)
            at = self._comment(begin, end)
            if at >= 0:
                self._l_how = 1
                return self._event(at, end - 2)
        if self._starts(begin, end):
            return self._loss(begin, end)
        at = self._bare(begin, end)
        if at >= 0:
            self._l_how = 1
            return self._event(at, end)
        return self._heading(begin, end)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _hold(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t, what: cython.int) -> cython.void:
        """Keep a line: the next may go on with it."""
        self._held_at = begin
        self._held = end - begin
        self._held_what = what
        self._held_used = self._l_end - begin if what == _EVENT else 0
        self._parts = 1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _keep(self) -> cython.void:
        """Copy the line that is held: where it stands is needed otherwise."""
        i: cython.Py_ssize_t
        if self._held and self._held_at >= 0:
            for i in range(self._held):
                self._scratch[i] = self._data[self._held_at + i]
            self._held_at = -1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _append(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Put the line behind the one that is held; how long both are, 0: too long, or in too many parts."""
        i: cython.Py_ssize_t
        length: cython.Py_ssize_t = self._held + 1 + end - begin
        if self._parts >= _MOST_PARTS or length >= _LONGEST:
            return 0
        self._keep()
        self._scratch[self._held] = 32
        for i in range(end - begin):
            self._scratch[self._held + 1 + i] = self._data[begin + i]
        return length

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(-1, check=False)
    def _with_task(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.bint:
        """Whether the line before is this one's task, which a mailer cut off before or behind the time."""
        length: cython.Py_ssize_t = self._append(begin, end)
        what: cython.int
        if not length:
            return False
        what = self._read_scratch(length)
        if self._l_tid == 0 or (what != _EVENT and what != _BEGUN):
            return False
        if what == _EVENT:
            self._absorb(length)
        else:
            self._count_odd(begin, end)
            self._held = length
            self._held_what = _BEGUN
            self._parts += 1
        return True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _read_data(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.int:
        if self._in_scratch:
            self._text = self._data
            self._in_scratch = False
        return self._read(begin, end)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _read_scratch(self, length: cython.Py_ssize_t) -> cython.int:
        self._text = self._scratch
        self._in_scratch = True
        return self._read(0, length)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(-1, check=False)
    def _absorb(self, length: cython.Py_ssize_t) -> cython.int:
        """What is held is the beginning of an event after all."""
        self.odd -= self._parts
        if self.odd == 0:
            with cython.gil:
                self.first_odd = b""
        return self._became(length)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(-1, check=False)
    def _became(self, length: cython.Py_ssize_t) -> cython.int:
        self._emit()
        self.joined += 1
        self._held = length
        self._held_what = _EVENT
        self._held_used = self._l_end
        self._parts += 1
        return 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(-1, check=False)
    def _join(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.bint:
        """Whether the line is the rest of the one before, an event that had begun or one that seemed to be whole."""
        length: cython.Py_ssize_t = self._append(begin, end)
        what: cython.int
        if not length:
            return False
        what = self._read_scratch(length)
        if what == _EVENT and self._held_what == _BEGUN:
            self._absorb(length)
            return True
        if what == _EVENT and self._l_end > self._held_used + 1 and self.rows > 0:
            self.rows -= 1
            self._form_count[self._last_emitted] -= 1
            self._became(length)
            return True
        if self._held_what == _BEGUN:
            if what == _OTHER:
                self.odd -= self._parts
                if self.odd == 0:
                    with cython.gil:
                        self.first_odd = b""
                self._count_other()
                self._held = 0
                return True
            self._held = length
            self._parts += 1
            self._goes_on_held = True
        return False

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(-1, check=False)
    def _count_odd(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.int:
        if self.odd == 0:
            with cython.gil:
                self.first_odd = bytes(self._data[begin : min(end, begin + _SHOWN)])
        self.odd += 1
        return 0
