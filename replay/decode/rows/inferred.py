# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Infer removals that a recording does not show (5.10): a page that a root installs again was removed before.

Installs of a root in a region of 2 MiB are compared only if the region did not change in between. It changes when a
table replaces a huge leaf or the reverse, which the kernel does by itself when dirty logging begins or ends. It also
changes when its table is built anew: the leaf is then in another table than before, or the fault built one. In that
case the whole region was removed, because these kernels drop a table together with a range that covers it.
"""

from __future__ import annotations

import cython
import numpy as np

COMPILED: bool = cython.compiled

GONE_PAGE = 1  # the page was removed before it was installed again
GONE_TABLE = 2  # the whole table was removed
_EMPTY = cython.declare(cython.longlong, -1)
# In compiled code a literal of more than 31 bits would be a Python integer, which is a hundred times slower.
_GOLDEN = cython.declare(cython.ulonglong, 0x9E3779B97F4A7C15)
_WHOLE = cython.declare(cython.ulonglong, (1 << 64) - 1)
_POSITIVE = cython.declare(cython.longlong, (1 << 63) - 1)
_ROOT_SHIFT = cython.declare(cython.int, 36)
_RECENT = cython.declare(cython.longlong, 64)  # how many of the newest roots are kept if ends of roots are not recorded


@cython.final
@cython.cclass
class _Table:
    """A hash table from keys (not negative) to three numbers, with open
    addressing: 32 bytes a place, of which half are free.
    """

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
        """Return the place of a key, or where it has to be put."""
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
    """What each living root has mapped and when it mapped it last, by page and by region of 2 MiB."""

    _pages: _Table  # (root, gfn, level) -> the last row that mapped the page
    _regions: _Table  # (root, first gfn) -> level of the last leaf, row at which level or table changed last, table
    _ended: set  # type: ignore[type-arg]
    _newest: cython.longlong
    _swept: cython.longlong  # the newest root when old roots were last dropped

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
        """Note an install at row `seq`, and return GONE_PAGE and GONE_TABLE for what must have been removed before it.

        `table` is the table that the leaf is in, or 0 if it is not known; `began` is the row where the leaf's fault
        began; `asks` says that the fault was on an absent page; `rebuilt` says that the fault built the leaf's table;
        `emptied` is the row of the last invalidation, which empties every root.
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
            if table > 0 and other > 0:  # both tables are known, so compare them: another fault may have built this one
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
            # A fault that began before the page was mapped only lost a race; it shows no removal.
            if asks and before > emptied and before >= changed and before < began:
                gone |= GONE_PAGE
        self._pages.one[at] = seq
        return gone

    def end(self, root: int) -> None:
        """Note that a root has ended; its id is never used again."""
        self._ended.add(root)

    def forget(self) -> None:
        """Drop what is known of roots that have ended, or that are much older than the newest one."""
        if self._ended or self._newest >= self._swept + _RECENT:
            self._pages, self._regions = self._kept(self._pages, 1), self._kept(self._regions, 1)
            self._swept = self._newest
            self._ended.clear()

    @cython.cfunc
    def _kept(self, old: _Table, sweeps: cython.bint) -> _Table:
        """Return a copy of a table with room for twice its contents, without old roots if `sweeps`."""
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
