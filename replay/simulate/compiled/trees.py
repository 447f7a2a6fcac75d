# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The tree of each role word: a radix tree of page tables, whose memory is never released.

A table exists if its generation is that of the word. So a tree is zapped by giving the word a new generation; and a
table whose generation is right has live ancestors up to the root. A table is 512 pairs of bits, (present, ever), in
eight pairs of 64-bit words. "ever" survives the table, and identifies a re-fault. Tables above level 1 are also nodes,
with 512 children each: a child is a table of level 1, or a node with a table of its own, or 0 for none.
"""

from __future__ import annotations

import cython

from replay.simulate.compiled.vm_pools import VmPools

ALL = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFFFFFF)
PAIRS = cython.declare(cython.ulonglong, 0x5555555555555555)
NIBBLES = cython.declare(cython.ulonglong, 0x3333333333333333)
BYTES = cython.declare(cython.ulonglong, 0x0F0F0F0F0F0F0F0F)


@cython.cfunc
@cython.nogil
@cython.inline
@cython.exceptval(check=False)
def ones(x: cython.ulonglong) -> cython.longlong:
    """Return the number of bits that are set."""
    x = x - (x >> 1 & PAIRS)
    x = (x & NIBBLES) + (x >> 2 & NIBBLES)
    x = x + (x >> 4) & BYTES
    x = x + (x >> 8)
    x = x + (x >> 16)
    x = x + (x >> 32)
    return cython.cast(cython.longlong, x & 127)


@cython.cclass
class Trees(VmPools):
    """The trees of all role words."""

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _below(
        self, w: cython.longlong, node: cython.longlong, level: cython.longlong, at: cython.longlong
    ) -> cython.longlong:
        """Return the child at an entry of a node of `level`, or 0 if it does not exist."""
        c: cython.longlong = self.child[node * 512 + at]
        return c if self.gen[c if level == 2 else self.page_of[c]] == self.word[w].gen else 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _leaf(self, w: cython.longlong, g: cython.longlong) -> cython.longlong:
        """Return the level of the leaf that covers a frame, or 0 if none does."""
        level: cython.longlong = self.word[w].level
        c: cython.longlong = self.word[w].top
        page: cython.longlong
        at: cython.longlong
        while c:
            at = g >> (level - 1) * 9 & 511
            page = c if level == 1 else self.page_of[c]
            if self.bits[page * 16 + (at >> 6) * 2] >> (at & 63) & 1:
                return level
            if level == 1:
                return 0
            c = self._below(w, c, level, at)
            level -= 1
        return 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _fault(
        self,
        v: cython.longlong,
        g: cython.longlong,
        level: cython.longlong,
        first: cython.longlong,
        last: cython.longlong,
    ) -> cython.void:
        w: cython.longlong = self.vcpu[v].word
        c: cython.longlong = self._descend(w, g, level)
        at: cython.longlong = g >> (level - 1) * 9 & 511
        page: cython.longlong = c if level == 1 else self.page_of[c]
        k: cython.longlong = page * 16 + (at >> 6) * 2
        below: cython.longlong
        mask: cython.ulonglong = 1
        self.vcpu[v].faults += 1
        if level > 1:
            below = self._below(w, c, level, at)
            if below:
                self.gone_leaves = self.gone_tables = 0
                self._drop(w, below, level - 1)
                self._account(w)
        self.vcpu[v].refaults += self.bits[k + 1] >> (at & 63) & 1
        mask = mask << (at & 63)
        self.word[w].leaves += ones(mask & ~self.bits[k])
        self.bits[k] |= mask
        self.bits[k + 1] |= mask
        if level == 1 and self.prefetch and first <= last:
            mask = (2 << last) - (1 << first)
            mask = mask << (at & 56) & ~self.bits[k]
            self.word[w].leaves += ones(mask)
            self.prefetched += ones(mask)
            self.bits[k] |= mask
            self.bits[k + 1] |= mask

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _descend(self, w: cython.longlong, g: cython.longlong, goal: cython.longlong) -> cython.longlong:
        """Return the table of level `goal` for a frame (a node, above level 1), building tables that are missing."""
        level: cython.longlong = self.word[w].level
        node: cython.longlong = self.word[w].top
        below: cython.longlong
        at: cython.longlong
        k: cython.longlong
        while level > goal:
            at = g >> (level - 1) * 9 & 511
            below = self._below(w, node, level, at)
            if below == 0:
                k = self.page_of[node] * 16 + (at >> 6) * 2
                if not self.bits[k] >> (at & 63) & 1:
                    below = self._table(w, node, level, at)
                elif self.split_in_place:
                    below = self._split_leaf(w, node, level, at)
                else:
                    self._clear(self.page_of[node], at, at)
                    self.word[w].leaves -= 1
                    self.zapped += 1
                    below = self._table(w, node, level, at)
                self.tables += 1
            node = below
            level -= 1
        return node

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _table(
        self, w: cython.longlong, node: cython.longlong, level: cython.longlong, at: cython.longlong
    ) -> cython.longlong:
        """Make an empty table at an entry of a node of `level`, reusing the memory of one that was there before."""
        c: cython.longlong = self.child[node * 512 + at]
        page: cython.longlong
        i: cython.longlong
        if c == 0:
            page = c = self.pages
            self.pages += 1
            if level > 2:
                c = self.nodes
                self.nodes += 1
                self.page_of[c] = cython.cast(cython.uint, page)
            self.child[node * 512 + at] = cython.cast(cython.uint, c)
        else:
            page = c if level == 2 else self.page_of[c]
            for i in range(8):
                self.bits[page * 16 + i * 2] = 0
        self.gen[page] = self.word[w].gen
        self.word[w].tables += 1
        return c

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _split_leaf(
        self, w: cython.longlong, node: cython.longlong, level: cython.longlong, at: cython.longlong
    ) -> cython.longlong:
        """Replace a leaf of `level` by a table full of leaves."""
        c: cython.longlong = self._table(w, node, level, at)
        page: cython.longlong = c if level == 2 else self.page_of[c]
        i: cython.longlong
        for i in range(16):
            self.bits[page * 16 + i] = ALL
        self._clear(self.page_of[node], at, at)
        self.word[w].leaves += 511
        return c

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _clear(self, page: cython.longlong, first: cython.longlong, last: cython.longlong) -> cython.longlong:
        """Remove the leaves at entries `first` to `last`, and return how many there were."""
        i: cython.longlong
        leaves: cython.longlong = 0
        mask: cython.ulonglong
        if first > last:
            return 0
        for i in range(first >> 6, (last >> 6) + 1):
            mask = ALL
            if i == first >> 6:
                mask = mask >> (first & 63) << (first & 63)
            if i == last >> 6:
                mask = mask & ALL >> (63 - (last & 63))
            leaves += ones(self.bits[page * 16 + i * 2] & mask)
            self.bits[page * 16 + i * 2] &= ~mask
        return leaves

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _drop(self, w: cython.longlong, c: cython.longlong, level: cython.longlong) -> cython.void:
        """Remove a table of `level` with everything below it, and add it to `gone_leaves` and `gone_tables`."""
        page: cython.longlong = c if level == 1 else self.page_of[c]
        at: cython.longlong
        below: cython.longlong
        self.gone_tables += 1
        for at in range(8):
            self.gone_leaves += ones(self.bits[page * 16 + at * 2])
        if level > 1:
            for at in range(512):
                below = self._below(w, c, level, at)
                if below:
                    self._drop(w, below, level - 1)
        self.gen[page] = 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _account(self, w: cython.longlong) -> cython.void:
        """Subtract what was removed from a tree's counts, and count it as zapped.

        What was removed from a remembered tree was counted as zapped when its root was freed.
        """
        self.word[w].leaves -= self.gone_leaves
        self.word[w].tables -= self.gone_tables
        if not self.word[w].remembered:
            self.zapped += self.gone_leaves
            self.tables_freed += self.gone_tables

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _zap_tree(self, w: cython.longlong) -> cython.void:
        self.zapped += self.word[w].leaves
        self.tables_freed += self.word[w].tables
        self._raze(w)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _raze(self, w: cython.longlong) -> cython.void:
        """Empty a tree by giving its word a new generation.

        Every leaf is in a table, so without tables there is nothing to do.
        """
        if self.word[w].tables:
            self.last_gen += 1
            self.word[w].gen = self.last_gen
            self.word[w].leaves = 0
            self.word[w].tables = 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _zap_range(
        self,
        w: cython.longlong,
        node: cython.longlong,
        level: cython.longlong,
        base: cython.longlong,
        start: cython.longlong,
        end: cython.longlong,
    ) -> cython.void:
        """Remove the leaves in [start, end) below a node of `level` that begins at frame `base`."""
        shift: cython.longlong = (level - 1) * 9
        size: cython.longlong = 1
        first: cython.longlong = (start - base) >> shift
        last: cython.longlong = (end - 1 - base) >> shift
        at: cython.longlong
        below: cython.longlong
        low: cython.longlong
        size = size << shift
        first = max(first, 0)
        last = min(last, 511)
        self.gone_leaves += self._clear(self.page_of[node], first, last)
        for at in range(first, last + 1):
            below = self._below(w, node, level, at)
            if below:
                low = base + at * size
                if self.zap_tables and start <= low and low + size <= end:
                    self._drop(w, below, level - 1)
                elif level > 2:
                    self._zap_range(w, below, level - 1, low, start, end)
                else:
                    self.gone_leaves += self._clear(below, max(start - low, 0), min(end - 1 - low, 511))

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _split_range(
        self,
        w: cython.longlong,
        node: cython.longlong,
        level: cython.longlong,
        base: cython.longlong,
        start: cython.longlong,
        end: cython.longlong,
    ) -> cython.bint:
        """Split huge leaves inside [start, end) below a node into leaves of level 1.

        Return True if room ran out before the end.
        """
        shift: cython.longlong = (level - 1) * 9
        size: cython.longlong = 1
        first: cython.longlong = (start - base) >> shift
        last: cython.longlong = (end - 1 - base) >> shift
        page: cython.longlong = self.page_of[node]
        at: cython.longlong
        below: cython.longlong
        low: cython.longlong
        size = size << shift
        first = max(first, 0)
        last = min(last, 511)
        for at in range(first, last + 1):
            low = base + at * size
            if self.bits[page * 16 + (at >> 6) * 2] >> (at & 63) & 1 and start <= low and low + size <= end:
                if not self._room():
                    return True
                self._split_leaf(w, node, level, at)
            below = self._below(w, node, level, at) if level > 2 else 0
            if below and self._split_range(w, below, level - 1, low, start, end):
                return True
        return False
