# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Removals that a recording could not show (5.10): a page is installed again by a root that had it, so it was removed.

What a root mapped in a region of 2 MiB counts only since the region last changed between a table and a huge leaf (the
kernel's own doing, when dirty logging begins and ends), or since its table was built anew: its leaves are in another
one than before, or the fault got one. There the range removed was all of it: these kernels drop a table with a range
that covers it.
"""

from __future__ import annotations

import cython
import numpy as np

COMPILED: bool = cython.compiled

GONE_PAGE = 1  # the page was removed before it was installed again
GONE_TABLE = 2  # the whole table was
_EMPTY = cython.declare(cython.longlong, -1)
# Of literals above 31 bits compiled code would make Python's numbers, a hundred times slower.
_GOLDEN = cython.declare(cython.ulonglong, 0x9E3779B97F4A7C15)
_WHOLE = cython.declare(cython.ulonglong, (1 << 64) - 1)
_POSITIVE = cython.declare(cython.longlong, (1 << 63) - 1)
_ROOT_SHIFT = cython.declare(cython.int, 36)
_RECENT = cython.declare(cython.longlong, 64)  # roots that are remembered where their ends are not recorded


@cython.final
@cython.cclass
class _Table:
    """A hash table from keys (not below 0) to three numbers, in open addressing: 32 bytes a place, half are free."""

    keys: cython.longlong[::1]
    one: cython.longlong[::1]
    two: cython.longlong[::1]
    three: cython.longlong[::1]
    held: cython.Py_ssize_t
    _mask: cython.Py_ssize_t

    def __init__(self, places: int) -> None:
        self.keys = np.full(places, -1, np.int64)
        self.one = np.zeros(places, np.int64)
        self.two = np.zeros(places, np.int64)
        self.three = np.zeros(places, np.int64)
        self.held = 0
        self._mask = places - 1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def place(self, key: cython.longlong) -> cython.Py_ssize_t:
        """Where a key is, or is to be put."""
        mixed: cython.ulonglong = cython.cast(cython.ulonglong, key)
        at: cython.Py_ssize_t
        mixed = (mixed ^ mixed >> 29) * _GOLDEN & _WHOLE
        at = cython.cast(cython.Py_ssize_t, mixed >> 20) & self._mask
        while self.keys[at] != key and self.keys[at] != _EMPTY:
            at = at + 1 & self._mask
        return at


@cython.final
@cython.cclass
class Unseen:
    """What each living root has mapped, and when it was last mapped; and the same of regions of 2 MiB."""

    _pages: _Table  # (root, gfn, level) -> the last row that mapped it
    _regions: _Table  # (root, first gfn) -> its level, the row at which that or its table last changed, its table
    _ended: set  # type: ignore[type-arg]
    _newest: cython.longlong
    _swept: cython.longlong  # the newest root when what is not needed was last thrown away

    def __init__(self) -> None:
        self._pages, self._regions = _Table(1 << 10), _Table(1 << 10)
        self._ended = set()
        self._newest = self._swept = 0

    def find(
        self,
        root: cython.longlong,
        gfn: cython.longlong,
        level: cython.longlong,
        table: cython.longlong,
        seq: cython.longlong,
        began: cython.longlong,
        asks: cython.bint,
        rebuilt: cython.bint,
        emptied: cython.longlong,
    ) -> int:
        """Note an install at row `seq`; GONE_PAGE and GONE_TABLE by what must have been removed before it.

        `table` is the one that the leaf is in, 0 where that is not known; `began` is the row where its fault began;
        `asks`: by a fault on an absent page; `rebuilt`: the fault built the table that the leaf is in; `emptied` is the
        row of the last invalidation, which empties every root.
        """
        at: cython.Py_ssize_t
        former: cython.longlong
        before: cython.longlong
        changed: cython.longlong
        other: cython.longlong
        gone: cython.int = 0
        root = max(root, 0)
        self._newest = max(self._newest, root)
        if 2 * self._regions.held >= len(self._regions.keys):
            self._regions = self._kept(self._regions, 0)
        if 2 * self._pages.held >= len(self._pages.keys):
            self._pages = self._kept(self._pages, 0)

        at = self._regions.place((root << _ROOT_SHIFT | gfn & -512) & _POSITIVE)
        if self._regions.keys[at] == _EMPTY:
            self._regions.keys[at] = (root << _ROOT_SHIFT | gfn & -512) & _POSITIVE
            self._regions.two[at] = -1
            self._regions.held += 1
        else:
            former = self._regions.one[at]
            other = self._regions.three[at]
            if table > 0 and other > 0:  # what another fault built is known by then where that one's leaf is in it
                rebuilt = table != other or (rebuilt and self._regions.two[at] < began)
            if rebuilt or former != level:
                self._regions.two[at] = seq
                if rebuilt and former == level == 1 and asks:
                    gone |= GONE_TABLE
        self._regions.one[at] = level
        self._regions.three[at] = table
        changed = self._regions.two[at]

        at = self._pages.place((root << _ROOT_SHIFT | gfn | level - 1) & _POSITIVE)
        if self._pages.keys[at] == _EMPTY:
            self._pages.keys[at] = (root << _ROOT_SHIFT | gfn | level - 1) & _POSITIVE
            self._pages.held += 1
        else:
            before = self._pages.one[at]
            # A fault that began before the page was mapped was only late.
            if asks and before > emptied and before >= changed and before < began:
                gone |= GONE_PAGE
        self._pages.one[at] = seq
        return gone

    def end(self, root: int) -> None:
        """A root has ended; root ids are never used again."""
        self._ended.add(root)

    def forget(self) -> None:
        """Throw away what roots had that have ended, or are far from the newest."""
        if self._ended or self._newest >= self._swept + _RECENT:
            self._pages, self._regions = self._kept(self._pages, 1), self._kept(self._regions, 1)
            self._swept = self._newest
            self._ended.clear()

    @cython.cfunc
    def _kept(self, old: _Table, sweeps: cython.bint) -> _Table:
        """A table with room for twice what is held; without the roots that are gone, if it `sweeps`."""
        places: cython.Py_ssize_t = 1 << 10
        i: cython.Py_ssize_t
        at: cython.Py_ssize_t
        root: cython.longlong
        new: _Table
        while places < 4 * old.held:
            places *= 2
        new = _Table(places)
        for i in range(old.keys.shape[0]):
            if old.keys[i] == _EMPTY:
                continue
            root = old.keys[i] >> _ROOT_SHIFT
            if sweeps and (root < self._newest - _RECENT or root in self._ended):
                continue
            at = new.place(old.keys[i])
            new.keys[at] = old.keys[i]
            new.one[at] = old.one[i]
            new.two[at] = old.two[i]
            new.three[at] = old.three[i]
            new.held += 1
        return new
