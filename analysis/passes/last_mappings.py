# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The last mapping of each page of a VM, and the causes by which it was protected or lost.

A page has one under each role word, whatever root that is the word of. A root is lost when its last reference is
dropped, or when all roots are invalidated; with the root, everything that it mapped is lost. When a fault maps the page
again, or restores a permission, that is counted for the cause. A cause is a row of the totals.

This is Cython in pure-Python mode, like `timeline`.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from analysis.passes.removal_causes import Why
from analysis.passes.removal_totals import FIELDS, RemovalTotals, plain

_MAPPED = cython.declare(cython.Py_ssize_t, FIELDS.index("mapped"))
_FIXES = cython.declare(cython.Py_ssize_t, FIELDS.index("fixes"))
_IS_FIRST = cython.declare(cython.int, int(Why.FIRST))
_IS_UNSEEN = cython.declare(cython.int, int(Why.UNSEEN))
_IS_UNWRITABLE = cython.declare(cython.int, int(Why.UNWRITABLE))

_IS_MAPPED = cython.declare(cython.longlong, 255)
_COUNTED = cython.declare(cython.uchar, 255)  # marks a fault that was counted already
_WORDS = cython.declare(cython.Py_ssize_t, 1 << 8)
# In compiled code a literal of more than 31 bits would be a Python integer, which is a hundred times slower.
_GFNS = cython.declare(cython.longlong, (1 << 40) - 1)
_GOLDEN = cython.declare(cython.ulonglong, 0x9E3779B97F4A7C15)
_WHOLE = cython.declare(cython.ulonglong, (1 << 64) - 1)
_FEW = 1 << 10  # pages for which there is room at first


def roots_of(count: int, uncreated: Any) -> tuple[Any, Any]:
    """Return, by root id for all VMs of a trace, arrays for the cause of each root's loss and for its role word."""
    lost, words = np.zeros(min(count, 1 << 24) + 2, np.uint8), np.zeros(min(count, 1 << 24) + 2, np.uint32)
    for root in uncreated:
        if root["id"] < len(words) - 1:
            words[root["id"]] = root["role"]
    return lost, words


@cython.final
@cython.cclass
class LastMappings:
    """The pages of one VM in a hash table, and the roots that mapped them.

    A page's value has three parts: the root that mapped it last, the row of the cause that protected it (0: none),
    and the row of the cause that removed it (_IS_MAPPED: it is mapped).
    """

    beyond: cython.longlong  # the id that stands for all roots for which there is no room
    held: cython.Py_ssize_t
    fixing: cython.uchar[::1]  # by vCPU: the row that counts its fault under way if it is a fix; 0: none
    _totals: RemovalTotals
    _lost: cython.uchar[::1]
    _words: cython.uint[::1]
    _newest: cython.longlong
    _invalid: cython.longlong  # roots up to this one were invalidated, for the cause in row `_invalid_by`
    _invalid_by: cython.int
    _keys: cython.longlong[::1]
    _values: cython.longlong[::1]
    _own: cython.uint[::1]  # the role words of this VM
    _own_count: cython.Py_ssize_t
    _smm: cython.uint

    def __init__(self, kernel: Any, roots: Any, totals: RemovalTotals) -> None:
        """`roots` is a result of `roots_of`."""
        self._totals = totals
        self._lost, self._words = plain(roots[0]), plain(roots[1])
        self.beyond = len(roots[0]) - 1
        self._newest, self._invalid, self._invalid_by = 0, 0, 0
        self._make(_FEW)
        self.held = 0
        self._own, self._own_count = plain(np.zeros(int(_WORDS), np.uint32)), 0
        self._smm = kernel.layout.smm
        self.fixing = plain(np.zeros(0, np.uint8))

    def _make(self, room: int) -> None:
        self._keys, self._values = plain(np.full(room, -1, np.int64)), plain(np.zeros(room, np.int64))

    def make_room(self, vcpus: int) -> None:
        """Make room for this many vCPUs, and for more pages if there may be none for those of the next row."""
        fixing: Any = self.fixing
        if vcpus > len(fixing):
            self.fixing = plain(np.zeros(vcpus, np.uint8))
            np.asarray(self.fixing)[: len(fixing)] = fixing
        if self.held >= self._room():
            self._rehash()

    def _rehash(self) -> None:
        """Move the pages to a table of twice the size."""
        keys: cython.longlong[::1] = self._keys
        values: cython.longlong[::1] = self._values
        i: cython.Py_ssize_t
        at: cython.Py_ssize_t
        self._make(2 * len(keys))
        for i in range(len(keys)):
            if keys[i] >= 0:
                at = self._place(keys[i])
                self._keys[at] = keys[i]
                self._values[at] = values[i]

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _room(self) -> cython.Py_ssize_t:
        """Return the number of held pages from which on no row is processed before there is more room."""
        return len(self._keys) // 4 * 3

    # Roots

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _name(self, root: cython.longlong, word: cython.uint) -> cython.void:
        """A root is used, and this is its role word."""
        self._words[root] = word
        self._newest = max(self._newest, root)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _lose(self, root: cython.longlong, by: cython.Py_ssize_t) -> cython.void:
        """A root is lost, and with it all that it mapped."""
        self._lost[root] = cython.cast(cython.uchar, by)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _invalidate(self, by: cython.Py_ssize_t) -> cython.void:
        """All roots so far are invalidated."""
        self._invalid = self._newest
        self._invalid_by = cython.cast(cython.int, by)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _cause(self, root: cython.longlong) -> cython.Py_ssize_t:
        """Return the row of the cause by which a root was lost, or 0 if it was not lost."""
        if self._lost[root]:
            return self._lost[root]
        return self._invalid_by if root <= self._invalid else 0

    # Pages

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _change(
        self,
        root: cython.longlong,
        as_id: cython.int,
        level: cython.longlong,
        gfn: cython.longlong,
        by: cython.longlong,
        goes: cython.bint,
    ) -> cython.void:
        """A root's leaf is removed or protected; if another root has mapped the page since, nothing changes.

        If the root is not known, every role word of the address space under which the page is mapped is taken.
        """
        w: cython.Py_ssize_t
        at: cython.Py_ssize_t
        key: cython.longlong
        if root:
            key = self._key(self._words[root], level, gfn)
            at = self._place(key)
            if self._keys[at] < 0 or self._values[at] >> 16 == root:
                self._put(key, root, 0 if goes else by, by if goes else _IS_MAPPED)
            return
        for w in range(self._own_count):
            if (self._own[w] & self._smm != 0) == (as_id == 1):
                key = self._key(self._own[w], level, gfn)
                at = self._place(key)
                if self._keys[at] >= 0 and self._values[at] & 255 == _IS_MAPPED:
                    self._values[at] = self._values[at] >> 16 << 16 | (by if goes else by << 8 | _IS_MAPPED)
                    continue
                at = self._place(self._key(self._own[w], level + 1, gfn))
                if self._keys[at] >= 0:  # a part of a huge page whose split no row shows
                    self._put(key, self._values[at] >> 16, 0 if goes else by, by if goes else _IS_MAPPED)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _split(self, as_id: cython.int, level: cython.longlong, gfn: cython.longlong) -> cython.void:
        """A leaf of an unknown root is installed: it is a part of a split
        huge page, or a huge page put together again.
        """
        w: cython.Py_ssize_t
        at: cython.Py_ssize_t
        for w in range(self._own_count):
            if (self._own[w] & self._smm != 0) == (as_id == 1):
                at = self._place(self._key(self._own[w], level + 1, gfn))
                if self._keys[at] < 0:
                    at = self._place(self._key(self._own[w], level, gfn))
                if self._keys[at] >= 0:
                    self._put(self._key(self._own[w], level, gfn), self._values[at] >> 16, 0, _IS_MAPPED)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _map(self, root: cython.longlong, level: cython.longlong, gfn: cython.longlong, v: cython.int) -> cython.void:
        """A leaf is installed: count it for the cause by which the page's last mapping was lost."""
        key: cython.longlong = self._key(self._words[root], level, gfn)
        at: cython.Py_ssize_t = self._place(key)
        why: cython.Py_ssize_t
        if self._keys[at] < 0:
            why = _IS_FIRST
        else:
            why = self._values[at] & 255
            if self._values[at] >> 16 != root and self._cause(self._values[at] >> 16):
                why = self._cause(self._values[at] >> 16)
            if why == _IS_MAPPED:
                why = _IS_UNSEEN
        if v >= 0:
            if self.fixing[v] != _COUNTED:
                self._totals._count(why, _MAPPED)
            self.fixing[v] = 0
        self._put(key, root, 0, _IS_MAPPED)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _mapped(self, root: cython.longlong, level: cython.longlong, gfn: cython.longlong) -> cython.bint:
        """Return whether a page is mapped, and by this root."""
        at: cython.Py_ssize_t = self._place(self._key(self._words[root], level, gfn))
        return self._keys[at] >= 0 and self._values[at] & 255 == _IS_MAPPED and self._values[at] >> 16 == root

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _mend(self, v: cython.int) -> cython.bint:
        """Count a vCPU's fault under way as a fix, if it is one, and return whether it is."""
        if v < 0 or self.fixing[v] in (0, _COUNTED):
            return False
        self._totals._count(self.fixing[v], _FIXES)
        self.fixing[v] = 0
        return True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _split_in_place(self, v: cython.int) -> cython.void:
        """A huge page is split without a time at which it is not mapped (from 6.3 on).

        7.3 installs no leaf after that; where one is installed, the fault is counted already.
        """
        if self._mend(v):
            self.fixing[v] = _COUNTED

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _lacks_permission(self, v: cython.int, root: cython.longlong, gfn: cython.longlong) -> cython.void:
        """A vCPU faults for a permission: find the cause that took it from the page.

        It is counted when the fault restores it.
        """
        level: cython.longlong
        at: cython.Py_ssize_t
        why: cython.longlong = 0
        for level in range(1, 4):
            at = self._place(self._key(self._words[root], level, gfn))
            if self._keys[at] >= 0 and self._values[at] & 255 == _IS_MAPPED:
                why = self._values[at] >> 8 & 255
                self._values[at] = self._values[at] & ~cython.cast(cython.longlong, 255 << 8)
                break
        self.fixing[v] = cython.cast(cython.uchar, why if why else _IS_UNWRITABLE)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _put(
        self, key: cython.longlong, root: cython.longlong, protect: cython.longlong, removed: cython.longlong
    ) -> cython.void:
        at: cython.Py_ssize_t = self._place(key)
        if self._keys[at] < 0:
            self._keys[at] = key
            self.held += 1
        self._values[at] = root << 16 | protect << 8 | removed

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _key(self, word: cython.uint, level: cython.longlong, gfn: cython.longlong) -> cython.longlong:
        """Return the key of a page under a role word."""
        at: cython.Py_ssize_t = 0
        while at < self._own_count and self._own[at] != word:
            at += 1
        if at == self._own_count and at < _WORDS - 1:
            self._own[at] = word
            self._own_count += 1
        if level < 1 or level > 5:
            level = 1
        gfn = max(gfn, 0) >> (level - 1) * 9 << (level - 1) * 9
        return at << 44 | level << 40 | gfn & _GFNS

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _place(self, key: cython.longlong) -> cython.Py_ssize_t:
        """Return the place of a key, or where it has to be put."""
        mask: cython.Py_ssize_t = len(self._keys) - 1
        mixed: cython.ulonglong = cython.cast(cython.ulonglong, key)
        at: cython.Py_ssize_t
        mixed = (mixed ^ mixed >> 29) * _GOLDEN & _WHOLE
        at = cython.cast(cython.Py_ssize_t, mixed >> 20) & mask
        while self._keys[at] != key and self._keys[at] != -1:
            at = at + 1 & mask
        return at
