# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Histograms of how long something lasts that one row of a vCPU begins and another ends, such as an exit, by code.

A duration is counted in a bucket, of which there are 64 for each power of two; the longest and the sum are exact. Of
the 3,712 buckets of a code some ten are in use, so that they are in a hash table. This is Cython in pure-Python mode,
like `timeline`.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

COMPILED: bool = cython.compiled

_LEADING = cython.declare(cython.longlong, 6)
LEADING = 6  # how many bits of a duration, after the highest, choose its bucket
_LEAST = cython.declare(cython.longlong, 128)  # from here on buckets are wider than a ns
_BUCKETS = cython.declare(cython.Py_ssize_t, 64 * 58)  # for all values of an int64
_GOLDEN = cython.declare(cython.ulonglong, 0x9E3779B97F4A7C15)  # spreads keys over the hash table
_WHOLE = cython.declare(cython.ulonglong, (1 << 64) - 1)
_MOST = cython.declare(cython.Py_ssize_t, 2048)  # the most codes that are distinguished
_OTHERS = cython.declare(cython.ulonglong, (1 << 64) - 2)
OTHERS = (1 << 64) - 2  # stands for all further codes
_FIELDS = ("begun", "ended", "ns", "longest")
_WIDTH = cython.declare(cython.Py_ssize_t, 4)
_FEW = 8  # codes for which there is room at first
_FEW_BUCKETS = 128  # the size of the hash table at first


@cython.cfunc
@cython.nogil
@cython.inline
@cython.exceptval(check=False)
def _place_of(keys: cython.int[::1], key: cython.int) -> cython.Py_ssize_t:
    """Return the place of a bucket in the hash table, or where it has to be put."""
    mask: cython.Py_ssize_t = keys.shape[0] - 1
    mixed: cython.ulonglong = cython.cast(cython.ulonglong, key) * _GOLDEN & _WHOLE
    p: cython.Py_ssize_t = cython.cast(cython.Py_ssize_t, mixed >> 32) & mask
    while keys[p] >= 0 and keys[p] != key:
        p = (p + 1) & mask
    return p


@cython.final
@cython.cclass
class Lasting:
    """The durations of one VM.

    Row i of `totals` (begun, ended, ns, longest) is about `codes[i]` and `rets[i]`. `count` rows are in use; memory
    grows with the number of codes that occur, and of the buckets in use.
    """

    codes = cython.declare(object, visibility="public")
    rets = cython.declare(object, visibility="public")
    totals = cython.declare(object, visibility="public")
    count = cython.declare(cython.Py_ssize_t, visibility="public")
    _keys: Any  # the hash table: row of `totals` * _BUCKETS + bucket, -1 where there is none
    _counts: Any  # how many durations are in that bucket
    _held: cython.Py_ssize_t  # buckets in the table, which is at most half full
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
        self.codes, self.rets = np.zeros(_FEW, np.uint64), np.zeros(_FEW, np.int32)
        self.totals = np.zeros((_FEW, _WIDTH), np.int64)
        self._keys, self._counts, self._held = np.full(_FEW_BUCKETS, -1, np.int32), np.zeros(_FEW_BUCKETS, np.int64), 0
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
                self.codes, self.rets, self.totals, self._keys, self._counts, self._since, self._place,
            )  # fmt: skip
            if done == len(kind):
                return
            self._grow()

    def histogram(self, first: int = 0) -> Any:
        """Return an array of what is known of each bucket in use, in the order of its first two rows.

        They are: the bucket's row of `totals`, counted from `first` on; its number; how many durations are in it.
        """
        keys = self._keys
        used = np.flatnonzero(keys >= 0)
        used = used[keys[used].argsort()]
        row, bucket = np.divmod(keys[used], int(_BUCKETS))
        return np.array((row + first, bucket, self._counts[used]))

    def _make_room(self, vcpus: int) -> None:
        """Make room for vCPU ids below `vcpus`. It grows on demand, since few of many VMs have many vCPUs."""
        more = vcpus - len(self._since)
        if more > 0:
            self._since = np.concatenate([self._since, np.zeros(more, np.int64)])
            self._place = np.concatenate([self._place, np.zeros(more, np.int32)])

    def _grow(self) -> None:
        """Make more room for codes, or for buckets, whichever has run out."""
        if 2 * self._held >= len(self._keys):
            keys, counts = self._keys, self._counts
            self._keys, self._counts = np.full(2 * len(keys), -1, np.int32), np.zeros(2 * len(keys), np.int64)
            self._enter(keys, counts, self._keys, self._counts)
        if self.count < len(self.codes):
            return
        room = len(self.codes)
        self.codes = np.concatenate([self.codes, np.zeros(room, np.uint64)])
        self.rets = np.concatenate([self.rets, np.zeros(room, np.int32)])
        self.totals = np.concatenate([self.totals, np.zeros((room, _WIDTH), np.int64)])

    def _enter(
        self, keys: cython.int[::1], counts: cython.longlong[::1], to: cython.int[::1], into: cython.longlong[::1]
    ) -> None:
        """Enter all buckets into a larger hash table."""
        i: cython.Py_ssize_t
        p: cython.Py_ssize_t
        for i in range(len(keys)):
            if keys[i] >= 0:
                p = _place_of(to, keys[i])
                to[p] = keys[i]
                into[p] = counts[i]

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
        keys: cython.int[::1],
        counts: cython.longlong[::1],
        since: cython.longlong[::1],
        place: cython.int[::1],
    ) -> cython.Py_ssize_t:
        """Process rows from `start` on.

        Return the row at which there is no room for another code or bucket, or the number of rows.
        """
        i: cython.Py_ssize_t
        at: cython.Py_ssize_t = 0
        row: cython.Py_ssize_t
        v: cython.Py_ssize_t
        p: cython.Py_ssize_t
        key: cython.int
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
                if 2 * self._held >= keys.shape[0]:
                    stop = i
                    break
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
                    key = cython.cast(cython.int, row * _BUCKETS + (shift << _LEADING) + (ns >> shift))
                    p = _place_of(keys, key)
                    if keys[p] < 0:
                        keys[p] = key
                        self._held += 1
                    counts[p] += 1
                place[v] = 0
                if kind[i] == begins:
                    totals[at, 0] += 1
                    since[v] = time[i]
                    place[v] = cython.cast(cython.int, at + 1)
        return stop
