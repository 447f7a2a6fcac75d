# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Each kind of operation on the slow path, which reads the slots themselves
and none of the fields that the fast path keeps.
"""

from __future__ import annotations

import cython

from replay.simulate.compiled.root_slots import RootSlots
from replay.simulate.model_state import Happened
from replay.simulate.operations import Cause

NONE = cython.declare(cython.longlong, -1)  # stands for no generation, and for no vCPU
EXIT = cython.declare(cython.longlong, int(Cause.EXIT))
MEMSLOT = cython.declare(cython.longlong, int(Cause.MEMSLOT))
VM_END = cython.declare(cython.longlong, int(Cause.VM_END))
EMPTIED = cython.declare(cython.longlong, int(Happened.EMPTIED))
LEFT_AT_END = cython.declare(cython.longlong, 2)  # a value of `error`, which Engine._violation reports


@cython.cclass
class VmOperations(RootSlots):
    """One VM under one policy, one operation at a time."""

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _touch(
        self,
        v: cython.longlong,
        g: cython.longlong,
        level: cython.longlong,
        first: cython.longlong,
        last: cython.longlong,
        resets: cython.longlong,
    ) -> cython.void:
        self._enter(v)
        if self._leaf(self.vcpu[v].word, g) >= level:
            self.vcpu[v].hits += 1
            return
        self._fault(v, g, level, first, last)
        if resets:
            self._reset(v, g, level)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _fix(
        self, v: cython.longlong, g: cython.longlong, level: cython.longlong, resets: cython.longlong
    ) -> cython.void:
        at: cython.longlong
        self._enter(v)
        at = self._leaf(self.vcpu[v].word, g)
        if at > level and self.split_in_place:
            self._descend(self.vcpu[v].word, g, level)
            self.slots[v].fixes += 1
        elif at == level:
            self.slots[v].fixes += 1
        else:
            self._fault(v, g, level, g & 7, g & 7)
        if resets:
            self._reset(v, g, level)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _reset(self, v: cython.longlong, g: cython.longlong, level: cython.longlong) -> cython.void:
        built: cython.longlong = self.slots[v].creations
        self._unload(v, EXIT)
        self._enter(v)
        if self.slots[v].creations > built or self._leaf(self.vcpu[v].word, g) < level:
            self.vcpu[v].stuck = self.at
            self.vcpu[v].gen = NONE

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _enter(self, v: cython.longlong) -> cython.void:
        if self.vcpu[v].gen == NONE:
            if self.slots[v].request:
                self.slots[v].request = 0
                self._empty(v, MEMSLOT, not self.reloads)
            if self.slots[v].slot[0] == 0:
                self._load(v)
        self._refresh(v)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _unload(self, v: cython.longlong, cause: cython.longlong) -> cython.void:
        self.slots[v].request = 0
        self._empty(v, cause, False)
        self._refresh(v)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _switch(self, v: cython.longlong, w: cython.longlong) -> cython.void:
        self.slots[v].word = w
        self._search(v, w)
        self._refresh(v)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _invalidate(self) -> cython.void:
        r: cython.longlong = self.root[0].after
        after: cython.longlong
        v: cython.longlong
        flush: cython.longlong = 0
        self._forget()
        while r:
            after = self.root[r].after
            if self.root[r].valid:
                flush = 1
                if self.empties:
                    self._zap_tree(self.root[r].word)
                    self._note(EMPTIED, r, MEMSLOT, NONE, 0, 0)
                else:
                    self._invalidate_root(r, MEMSLOT)
            r = after
        for v in range(self.vcpus):
            self.slots[v].request = 1
            self.vcpu[v].gen = NONE
        self.flushes += flush

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _zap(self, as_id: cython.longlong, start: cython.longlong, end: cython.longlong) -> cython.void:
        w: cython.longlong
        removed: cython.longlong = 0
        for w in range(self.words):
            if self.word[w].as_id == as_id and (self.word[w].root or self.word[w].remembered):
                self.gone_leaves = self.gone_tables = 0
                self._zap_range(w, self.word[w].top, self.word[w].level, 0, start, end)
                self._account(w)
                if not self.word[w].remembered:
                    removed += self.gone_leaves
        self.flushes += removed > 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _zap_all(self) -> cython.void:
        r: cython.longlong = self.root[0].after
        w: cython.longlong
        v: cython.longlong
        removed: cython.longlong = 0
        self._forget()
        while r:
            w = self.root[r].word
            if self.root[r].valid and (self.word[w].leaves or self.word[w].tables):
                removed += self.word[w].leaves
                self._zap_tree(w)
                self._note(EMPTIED, r, VM_END, NONE, 0, 0)
            r = self.root[r].after
        for v in range(self.vcpus):
            self._refresh(v)
        self.flushes += removed > 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _split(self, as_id: cython.longlong, start: cython.longlong, end: cython.longlong) -> cython.bint:
        w: cython.longlong
        before: cython.longlong
        short: cython.bint = False
        for w in range(self.words):
            if self.word[w].as_id == as_id and (self.word[w].root or self.word[w].remembered):
                before = self.word[w].tables
                short = self._split_range(w, self.word[w].top, self.word[w].level, 0, start, end)
                if not self.word[w].remembered:
                    self.tables += self.word[w].tables - before
                if short:
                    break
        return short

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _collapse(
        self, as_id: cython.longlong, level: cython.longlong, g: cython.longlong, for_good: cython.longlong
    ) -> cython.void:
        w: cython.longlong
        node: cython.longlong
        below: cython.longlong
        at: cython.longlong
        k: cython.longlong
        one: cython.ulonglong = 1
        removed: cython.longlong = 0
        for w in range(self.words):
            if self.word[w].as_id == as_id and (self.word[w].root or self.word[w].remembered):
                at = self.word[w].level
                node = self.word[w].top
                while at > level:
                    node = self._below(w, node, at, g >> (at - 1) * 9 & 511)
                    at -= 1
                    if node == 0:
                        break
                below = self._below(w, node, at, g >> (at - 1) * 9 & 511) if node and level > 1 else 0
                if below:
                    self.gone_leaves = self.gone_tables = 0
                    self._drop(w, below, level - 1)
                    self._account(w)
                    if self.recovers and not for_good:
                        at = g >> (level - 1) * 9 & 511
                        k = self.page_of[node] * 16 + (at >> 6) * 2
                        self.bits[k] |= one << (at & 63)
                        self.bits[k + 1] |= one << (at & 63)
                        self.word[w].leaves += 1
                    if not self.word[w].remembered:
                        removed += 1
        self.flushes += removed > 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _end(self) -> cython.void:
        v: cython.longlong
        r: cython.longlong
        after: cython.longlong
        self._forget()
        for v in range(self.vcpus):
            self.slots[v].request = 0
            self._empty(v, VM_END, False)
            self._refresh(v)
        r = self.root[0].after
        while r:
            after = self.root[r].after
            if self.root[r].valid:
                self._invalidate_root(r, VM_END)
            r = after
        if self.error == 0 and (self.alive or self._tables_alive()):
            self.error = LEFT_AT_END
            self.error_tables = self._tables_alive()
