# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What each thread of a VM is doing, so that what it changes is attributed to a cause.

A thread does one thing at a time: it begins something, and does that until it begins another thing or ends it. What
may change nothing, such as a fault, is counted as an operation only once it does. A thread that is at nothing known
acts for the VM's end, for NX huge page recovery if it is a thread of that, and else for another cause.

This is Cython in pure-Python mode, like `timeline`.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from analysis.passes.removal_causes import Why
from analysis.passes.removal_totals import RemovalTotals, plain

_IS_NX = cython.declare(cython.int, int(Why.NX_RECOVERY))
_IS_VM_END = cython.declare(cython.int, int(Why.VM_END))
_IS_OTHER = cython.declare(cython.int, int(Why.OTHER))

_UNCOUNTED = cython.declare(cython.longlong, 1 << 8)  # more than any row of the totals
_NO_THREAD = cython.declare(cython.longlong, -(1 << 40))
_GOLDEN = cython.declare(cython.ulonglong, 0x9E3779B97F4A7C15)
_WHOLE = cython.declare(cython.ulonglong, (1 << 64) - 1)
_FEW = 16  # threads for which there is room at first


@cython.final
@cython.cclass
class ActingThreads:
    """The threads, by their places in a hash table."""

    ended: cython.bint  # the VM's end has begun
    at: cython.longlong[::1]  # what the thread is doing: a row of the totals, or _UNCOUNTED + a cause; -1: nothing
    did: cython.uchar[::1]  # whether that is counted as an operation
    zaps: cython.longlong[::1]  # the root that the thread is zapping; 0: none
    _totals: RemovalTotals
    _tid: cython.longlong[::1]
    _threads: cython.Py_ssize_t
    _since: cython.longlong[::1]  # when it began
    _done: cython.longlong[::1]  # until when it has lasted so far
    _nx: cython.longlong[::1]

    def __init__(self, totals: RemovalTotals, recovery: Any) -> None:
        """`recovery` are the tids of NX huge page recovery."""
        self._totals, self.ended = totals, False
        self._nx = plain(np.array(sorted(recovery), np.int64))
        self._make(_FEW)

    def _make(self, room: int) -> None:
        self._tid, self._threads = plain(np.full(room, _NO_THREAD, np.int64)), 0
        self.at = plain(np.full(room, -1, np.int64))
        self._since, self._done = plain(np.zeros(room, np.int64)), plain(np.zeros(room, np.int64))
        self.did = plain(np.zeros(room, np.uint8))
        self.zaps = plain(np.zeros(room, np.int64))

    def make_room(self) -> None:
        """Make room for more threads, if there is none for another one."""
        if 2 * self._threads >= len(self._tid):
            before: list[Any] = [self._tid, self.at, self._since, self._done, self.did, self.zaps]
            self._make(2 * len(self._tid))
            for tid, *state in zip(*map(np.asarray, before), strict=True):
                if tid != _NO_THREAD:
                    t = self._place(tid)
                    self.at[t], self._since[t], self._done[t], self.did[t], self.zaps[t] = map(int, state)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _place(self, tid: cython.longlong) -> cython.Py_ssize_t:
        """Return a thread's place, or -1 if there is no room for a new thread."""
        mask: cython.Py_ssize_t = len(self._tid) - 1
        # Not the tid itself: those of many vCPUs follow one another, so that a second run of them would collide with
        # all of the first.
        mixed: cython.ulonglong = cython.cast(cython.ulonglong, tid) * _GOLDEN & _WHOLE
        t: cython.Py_ssize_t = cython.cast(cython.Py_ssize_t, mixed >> 32) & mask
        while self._tid[t] != tid:
            if self._tid[t] == _NO_THREAD:
                if 2 * self._threads > mask:
                    return -1
                self._threads += 1
                self._tid[t] = tid
                return t
            t = t + 1 & mask
        return t

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _recovers(self, tid: cython.longlong) -> cython.bint:
        """Return whether this is a thread of NX huge page recovery."""
        j: cython.Py_ssize_t
        recovers: cython.bint = False
        for j in range(len(self._nx)):
            recovers |= self._nx[j] == tid
        return recovers

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _unknown(self) -> cython.int:
        """Return the cause for which a thread acts that is at nothing known."""
        return _IS_VM_END if self.ended else _IS_OTHER

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _begin(self, t: cython.Py_ssize_t, why: cython.int, tid: cython.longlong, time: cython.longlong) -> cython.void:
        """The thread begins an operation."""
        self._since[t] = self._done[t] = time
        self.did[t] = True
        self.at[t] = self._totals._begin(why, tid, time)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _may_change(self, t: cython.Py_ssize_t, why: cython.int, time: cython.longlong) -> cython.void:
        """The thread begins something that is counted as an operation only if it changes something."""
        self._since[t] = self._done[t] = time
        self.did[t] = False
        self.at[t] = _UNCOUNTED + why

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _goes_on(self, t: cython.Py_ssize_t, at: cython.Py_ssize_t, time: cython.longlong) -> cython.void:
        """The thread is still at an operation that is counted in this row already."""
        self._since[t] = self._done[t] = time
        self.did[t] = True
        self.at[t] = at

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _row(self, t: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Return the row of the totals in which what the thread is doing is counted, or -1 if none is."""
        return self.at[t] if self.at[t] < _UNCOUNTED else -1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _acts(self, t: cython.Py_ssize_t, tid: cython.longlong, time: cython.longlong) -> cython.Py_ssize_t:
        """The thread changes something: return the row of the totals in which
        that is counted, and extend its time until now.
        """
        more: cython.longlong
        if self.at[t] < 0:
            self._begin(t, _IS_NX if self._recovers(tid) else self._unknown(), tid, time)
        elif self.at[t] >= _UNCOUNTED:
            self.at[t] = self._totals._begin(cython.cast(cython.int, self.at[t] - _UNCOUNTED), tid, self._since[t])
            self.did[t] = True
        more = max(time - self._done[t], 0)
        self._done[t] += more
        self._totals._extend(self.at[t], more, self._done[t] - self._since[t], time)
        return self.at[t]
