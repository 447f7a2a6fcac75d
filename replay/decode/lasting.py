# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Histograms of how long something lasts that one row of a vCPU begins and another ends, such as an exit, by code.

A duration is counted in a bucket, of which there are 64 for each power of two; the longest and the sum are exact. This
is Cython in pure-Python mode, like `timeline`.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

COMPILED: bool = cython.compiled

_LEADING = cython.declare(cython.longlong, 6)
LEADING = 6  # how many bits of a duration, after the highest, choose its bucket
BUCKETS = 64 * 58  # buckets for all values of an int64
_LEAST = cython.declare(cython.longlong, 128)  # from here on buckets are wider than a ns
_BUCKETS = cython.declare(cython.Py_ssize_t, 64 * 58)
_MOST = cython.declare(cython.Py_ssize_t, 2048)  # the most codes that are distinguished
_OTHERS = cython.declare(cython.ulonglong, (1 << 64) - 2)
OTHERS = (1 << 64) - 2  # stands for all further codes
_FIELDS = ("begun", "ended", "ns", "longest")
_WIDTH = cython.declare(cython.Py_ssize_t, 4)


@cython.final
@cython.cclass
class Lasting:
    """The durations of one VM.

    Row i of `totals` (begun, ended, ns, longest) and of `buckets` is about `codes[i]` and `rets[i]`. `count` rows are
    in use; memory grows with the number of codes that occur.
    """

    codes = cython.declare(object, visibility="public")
    rets = cython.declare(object, visibility="public")
    totals = cython.declare(object, visibility="public")
    buckets = cython.declare(object, visibility="public")
    count = cython.declare(cython.Py_ssize_t, visibility="public")
    _since: Any
    _place: Any
    _begins: cython.int
    _end: cython.int
    _itself: cython.bint

    def __init__(self, begins: int, end: int, itself: bool = False) -> None:
        """Rows of kind `begins` begin something.

        Rows of kind `end` end it, and with `itself` also the next row of kind `begins`.
        """
        self._begins, self._end, self._itself = begins, end, itself
        self.count = 0
        self.codes, self.rets = np.zeros(0, np.uint64), np.zeros(0, np.int32)
        self.totals, self.buckets = np.zeros((0, _WIDTH), np.int64), np.zeros((0, BUCKETS), np.int64)
        # By vCPU: when the duration under way began, and its row of `totals`, from 1 on; 0: none is under way.
        self._since, self._place = np.zeros(0, np.int64), np.zeros(0, np.int32)

    def feed(self, time: Any, vcpu: Any, kind: Any, code: Any, ret: Any = None) -> None:
        """Take in rows; `vcpu` is -1 where there is none.

        With `ret`, rows with the same code are also distinguished by it.
        """
        done: cython.Py_ssize_t = 0
        self._make_room(int(vcpu.max()) + 1 if len(vcpu) else 0)
        rets = np.zeros(1, np.int32) if ret is None else ret
        while True:
            done = self._feed(
                done, time, vcpu, kind, code, rets, 0 if ret is None else 1,
                self.codes, self.rets, self.totals, self.buckets, self._since, self._place,
            )  # fmt: skip
            if done == len(kind):
                return
            self._grow()

    def _make_room(self, vcpus: int) -> None:
        """Make room for vCPU ids below `vcpus`. It grows on demand, since few of many VMs have many vCPUs."""
        more = vcpus - len(self._since)
        if more > 0:
            self._since = np.concatenate([self._since, np.zeros(more, np.int64)])
            self._place = np.concatenate([self._place, np.zeros(more, np.int32)])

    def _grow(self) -> None:
        room = max(2, len(self.codes))
        self.codes = np.concatenate([self.codes, np.zeros(room, np.uint64)])
        self.rets = np.concatenate([self.rets, np.zeros(room, np.int32)])
        self.totals = np.concatenate([self.totals, np.zeros((room, _WIDTH), np.int64)])
        buckets = np.zeros((len(self.codes), BUCKETS), np.int64)
        buckets[: len(self.buckets)] = self.buckets
        self.buckets = buckets

    def _feed(
        self,
        start: cython.Py_ssize_t,
        time: cython.const[cython.longlong][::1],
        vcpu: cython.const[cython.short][::1],
        kind: cython.const[cython.uchar][::1],
        code: cython.const[cython.ulonglong][::1],
        ret: cython.const[cython.int][::1],
        failing: cython.int,
        codes: cython.ulonglong[::1],
        rets: cython.int[::1],
        totals: cython.longlong[:, ::1],
        buckets: cython.longlong[:, ::1],
        since: cython.longlong[::1],
        place: cython.int[::1],
    ) -> cython.Py_ssize_t:
        """Process rows from `start` on.

        Return the row at which there is no room for another code, or the number of rows.
        """
        i: cython.Py_ssize_t
        at: cython.Py_ssize_t = 0
        row: cython.Py_ssize_t
        v: cython.Py_ssize_t
        ns: cython.longlong
        shift: cython.longlong
        failed: cython.int
        stop: cython.Py_ssize_t = len(kind)
        rows: cython.Py_ssize_t = len(kind)
        begins: cython.int = self._begins
        end: cython.int = self._end
        if not cython.compiled:
            time, vcpu, kind, code, ret = map(memoryview, (time, vcpu, kind, code, ret))  # type: ignore[arg-type]
        with cython.nogil:
            for i in range(start, rows):
                if (kind[i] != begins and kind[i] != end) or vcpu[i] < 0:
                    continue
                v = vcpu[i]
                if kind[i] == begins:
                    # Find the row of the totals; most often it is the same as for the previous row.
                    failed = ret[i] if failing else 0
                    if not (at < self.count and codes[at] == code[i] and rets[at] == failed):
                        at = 0
                        while at < self.count and not (codes[at] == code[i] and rets[at] == failed):
                            at += 1
                        if at == self.count == _MOST:
                            at -= 1
                            codes[at] = _OTHERS
                        elif at == self.count:
                            if self.count == codes.shape[0]:
                                stop = i
                                break
                            codes[at] = code[i]
                            rets[at] = failed
                            self.count += 1
                if place[v] and (kind[i] == end or self._itself):
                    row = place[v] - 1
                    ns = time[i] - since[v]
                    if ns < 0:
                        ns = 0
                    totals[row, 1] += 1
                    totals[row, 2] += ns
                    if ns > totals[row, 3]:
                        totals[row, 3] = ns
                    shift = 0
                    while (ns >> shift) >= _LEAST:
                        shift += 1
                    buckets[row, (shift << _LEADING) + (ns >> shift)] += 1
                place[v] = 0
                if kind[i] == begins:
                    totals[at, 0] += 1
                    since[v] = time[i]
                    place[v] = cython.cast(cython.int, at + 1)
        return stop
