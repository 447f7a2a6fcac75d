# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Count what removed and protected a VM's pages: one row for each pair of a cause and a thread.

The causes are `removal_causes.Why`. The first rows are of the three causes that occur for faults only; the one after
them stands for all pairs beyond the most rows that there can be. This is Cython in pure-Python mode, like `timeline`.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from analysis.passes.removal_causes import Why

# What is counted for each cause and thread. `mapped`: faults that mapped a page whose last mapping was lost for this
# cause; `fixes`: permission faults on a page that was protected for it; `low` and `high`: the range of gfns.
FIELDS = (
    "why", "tid", "operations", "leaves", "tables", "protected", "aged", "ns", "longest", "mapped", "fixes", "low",
    "high", "first", "last",
)  # fmt: skip
_OPERATIONS = cython.declare(cython.Py_ssize_t, FIELDS.index("operations"))
_NS = cython.declare(cython.Py_ssize_t, FIELDS.index("ns"))
_LONGEST = cython.declare(cython.Py_ssize_t, FIELDS.index("longest"))
_LOW = cython.declare(cython.Py_ssize_t, FIELDS.index("low"))
_HIGH = cython.declare(cython.Py_ssize_t, FIELDS.index("high"))
_SINCE = cython.declare(cython.Py_ssize_t, FIELDS.index("first"))
_UNTIL = cython.declare(cython.Py_ssize_t, FIELDS.index("last"))

_MOST = cython.declare(cython.int, 254)  # the most rows: three, and one for each pair of cause and thread,
_FURTHER = cython.declare(cython.int, 3)  # of which this one stands for all further pairs
_NO_GFN = cython.declare(cython.longlong, 1 << 52)
# In compiled code a literal of more than 31 bits would be a Python integer, which is a hundred times slower.
_GOLDEN = cython.declare(cython.ulonglong, 0x9E3779B97F4A7C15)
_WHOLE = cython.declare(cython.ulonglong, (1 << 64) - 1)
_FEW = 16  # rows for which there is room at first
_PLACES = 1 << 9  # of the hash table of the rows
_AT_ONCE = cython.declare(cython.Py_ssize_t, 4)  # no row of a trace adds more rows


@cython.final
@cython.cclass
class RemovalTotals:
    """The totals of one VM. `table` has rows of FIELDS, of which `count` are in use."""

    table: Any
    count: cython.int
    _cells: cython.longlong[:, ::1]
    _places: cython.uchar[::1]  # the hash table by cause and thread of the rows; 0: none

    def __init__(self) -> None:
        self._make(_FEW)
        self.table[: int(_FURTHER) + 1, 0] = (Why.FIRST, Why.UNSEEN, Why.UNWRITABLE, Why.OTHER)
        self._places, self.count = plain(np.zeros(_PLACES, np.uint8)), int(_FURTHER) + 1

    def _make(self, room: int) -> None:
        self.table = np.zeros((room, len(FIELDS)), np.int64)
        self.table[:, _LOW] = _NO_GFN
        self.table[:, _HIGH] = self.table[:, 1] = -1
        self._cells = plain(self.table)

    def make_room(self) -> None:
        """Make room for more rows, if there may be none for those that the next row of the trace adds."""
        if self.count > self._room():
            table = self.table
            self._make(min(2 * len(table), int(_MOST)))
            self.table[: len(table)] = table

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _room(self) -> cython.Py_ssize_t:
        """Return the most rows that may be in use before another row of the trace is processed."""
        return len(self._cells) if len(self._cells) == _MOST else len(self._cells) - _AT_ONCE

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _find(self, why: cython.int, tid: cython.longlong) -> cython.int:
        """Return the row for a cause and a thread."""
        mask: cython.Py_ssize_t = len(self._places) - 1
        mixed: cython.ulonglong = cython.cast(cython.ulonglong, tid << 5 | why) * _GOLDEN & _WHOLE
        place: cython.Py_ssize_t = cython.cast(cython.Py_ssize_t, mixed >> 32) & mask
        at: cython.int
        while self._places[place]:
            at = self._places[place]
            if self._cells[at, 0] == why and self._cells[at, 1] == tid:
                return at
            place = place + 1 & mask
        if self.count == _MOST:
            return _FURTHER
        at = self.count
        self.count += 1
        self._cells[at, 0] = why
        self._cells[at, 1] = tid
        self._places[place] = cython.cast(cython.uchar, at)
        return at

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _begin(self, why: cython.int, tid: cython.longlong, time: cython.longlong) -> cython.int:
        """A thread begins an operation: return the row in which it is counted."""
        at: cython.int = self._find(why, tid)
        if not self._cells[at, _OPERATIONS]:
            self._cells[at, _SINCE] = time
        self._cells[at, _OPERATIONS] += 1
        self._cells[at, _UNTIL] = max(self._cells[at, _UNTIL], time)
        return at

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _extend(
        self, at: cython.Py_ssize_t, more: cython.longlong, length: cython.longlong, time: cython.longlong
    ) -> cython.void:
        """An operation takes `more` ns than until now, and thus has taken `length`."""
        self._cells[at, _NS] += more
        self._cells[at, _LONGEST] = max(self._cells[at, _LONGEST], length)
        self._cells[at, _UNTIL] = max(self._cells[at, _UNTIL], time)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _count(self, at: cython.Py_ssize_t, field: cython.Py_ssize_t) -> cython.void:
        self._cells[at, field] += 1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _count_page(self, at: cython.Py_ssize_t, field: cython.Py_ssize_t, gfn: cython.longlong) -> cython.void:
        self._cells[at, field] += 1
        self._cells[at, _LOW] = min(self._cells[at, _LOW], gfn)
        self._cells[at, _HIGH] = max(self._cells[at, _HIGH], gfn)


def plain(array: Any) -> Any:
    """Return an array in the form that loops access: uncompiled, a memoryview,
    whose items are Python's numbers, not numpy's.
    """
    return array if cython.compiled else memoryview(array)
