# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Roots and the slots in which vCPUs hold them: loaded, put, invalidated and freed as the policy says."""

from __future__ import annotations

import cython

from replay.simulate.compiled.trees import Trees
from replay.simulate.model_state import Happened
from replay.simulate.operations import Cause

NONE = cython.declare(cython.longlong, -1)  # stands for no generation, and for no vCPU
OTHER = cython.declare(cython.longlong, int(Cause.OTHER))
CREATED = cython.declare(cython.longlong, int(Happened.CREATED))
FOUND = cython.declare(cython.longlong, int(Happened.FOUND))
FREED = cython.declare(cython.longlong, int(Happened.FREED))
INVALIDATED = cython.declare(cython.longlong, int(Happened.INVALIDATED))
FINAL_PUT = cython.declare(cython.longlong, 1)  # a value of `error`, which Engine._violation reports


@cython.cclass
class RootSlots(Trees):
    """All roots that are alive, in order of creation, and the vCPUs that hold them."""

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _search(self, v: cython.longlong, w: cython.longlong) -> cython.void:
        i: cython.longlong
        r: cython.longlong = self.slots[v].slot[0]
        good: cython.longlong = self.word[w].root  # the only one that is valid and has this word
        if r and r == good:
            return
        if r == 0:
            for i in range(1, 4):
                r = self.slots[v].slot[i]
                if r and r == good:
                    self.slots[v].slot[0] = r
                    while i < 3:  # close the gap that the root leaves
                        self.slots[v].slot[i] = self.slots[v].slot[i + 1]
                        i += 1
                    self.slots[v].slot[3] = 0
                    return
            return
        for i in range(1, 4):
            r = self.slots[v].slot[i]
            self.slots[v].slot[i] = self.slots[v].slot[0]
            self.slots[v].slot[0] = r
            if r and r == good:
                return
        r = self.slots[v].slot[0]
        self.slots[v].slot[0] = 0
        if r:
            self._put(r, OTHER, v)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _load(self, v: cython.longlong) -> cython.void:
        w: cython.longlong = self.slots[v].word
        r: cython.longlong = self.word[w].root
        last: cython.longlong
        self.slots[v].loads += 1
        self.flushes += 1
        if r:
            self.root[r].refs += 1
            self.slots[v].slot[0] = r
            self.slots[v].reuses += 1
            self._note(FOUND, r, self.slots[v].cause, v, self.word[w].leaves, self.word[w].tables)
            return
        r = self.free_root
        self.free_root = self.root[r].after
        last = self.root[0].before
        self.root[r].id = self.ids
        self.root[r].word = w
        self.root[r].refs = 2 if self.own_reference else 1
        self.root[r].valid = 1
        self.root[r].cause = OTHER
        self.root[r].before = last
        self.root[r].after = 0
        self.root[last].after = r
        self.root[0].before = r
        self.ids += 1
        self.alive += 1
        self.word[w].root = r
        self.slots[v].slot[0] = r
        self.slots[v].creations += 1
        if self.word[w].remembered:
            self.word[w].remembered = 0
            self.vcpu[v].faults += self.word[w].leaves
            self.vcpu[v].refaults += self.word[w].leaves
            self.tables += self.word[w].tables
            self.assumed_leaves += self.word[w].leaves
            self.assumed_tables += self.word[w].tables
        self._note(CREATED, r, self.slots[v].cause, v, self.word[w].leaves, self.word[w].tables)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _empty(self, v: cython.longlong, cause: cython.longlong, only_invalid: cython.bint) -> cython.void:
        i: cython.longlong
        r: cython.longlong
        for i in range(1, 5):
            r = self.slots[v].slot[i & 3]
            if r and not (only_invalid and self.root[r].valid):
                self.slots[v].slot[i & 3] = 0
                self.slots[v].cause = cause
                self._put(r, cause, v)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _put(self, r: cython.longlong, cause: cython.longlong, v: cython.longlong) -> cython.void:
        self.root[r].refs -= 1
        if self.root[r].refs:
            return
        if not self.root[r].valid:
            self._free(r, self.root[r].cause, v)
        elif not self.own_reference:
            self._free(r, cause, v)
        elif self.error == 0:
            self.error = FINAL_PUT
            self.error_root = self.root[r].id

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _invalidate_root(self, r: cython.longlong, cause: cython.longlong) -> cython.void:
        w: cython.longlong = self.root[r].word
        self._zap_tree(w)
        self.root[r].valid = 0
        self.root[r].cause = cause
        self.word[w].root = 0
        self._note(INVALIDATED, r, cause, NONE, 0, 0)
        if self.own_reference:
            self.root[r].refs -= 1
        if self.root[r].refs == 0:
            self._free(r, cause, NONE)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _free(self, r: cython.longlong, cause: cython.longlong, v: cython.longlong) -> cython.void:
        w: cython.longlong = self.root[r].word
        leaves: cython.longlong = 0
        tables: cython.longlong = 0
        if self.root[r].valid:  # an invalid root is empty, and the word's tree belongs to another root
            leaves = self.word[w].leaves
            tables = self.word[w].tables
            self.word[w].root = 0
            if self.assume_refault and (leaves or tables):
                self.word[w].remembered = 1
                self.zapped += leaves
                self.tables_freed += tables
            else:
                self._zap_tree(w)
        if self.flush_per_table:
            self.flushes += tables
        if tables and self.puts < self.put_room:
            self.put[self.puts].leaves = leaves
            self.put[self.puts].tables = tables
            self.puts += 1
        self.root[self.root[r].before].after = self.root[r].after
        self.root[self.root[r].after].before = self.root[r].before
        self.root[r].after = self.free_root
        self.free_root = r
        self.alive -= 1
        self.frees += 1
        self._note(FREED, r, cause, v, leaves, tables)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _forget(self) -> cython.void:
        """Drop all remembered trees: no new root can take them over any more."""
        w: cython.longlong
        for w in range(self.words):
            if self.word[w].remembered:
                self.word[w].remembered = 0
                self._raze(w)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _tables_alive(self) -> cython.longlong:
        w: cython.longlong
        tables: cython.longlong = 0
        for w in range(self.words):
            if self.word[w].root:
                tables += self.word[w].tables
        return tables

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _note(
        self,
        event: cython.longlong,
        r: cython.longlong,
        cause: cython.longlong,
        v: cython.longlong,
        leaves: cython.longlong,
        tables: cython.longlong,
    ) -> cython.void:
        i: cython.longlong = self.rows
        if self.logging:
            self.log[i].at = self.at
            self.log[i].event = event
            self.log[i].vcpu = v
            self.log[i].root = self.root[r].id
            self.log[i].word = self.root[r].word
            self.log[i].cause = cause
            self.log[i].leaves = leaves
            self.log[i].tables = tables
            self.log[i].roots_alive = self.alive
            self.log[i].tables_alive = self._tables_alive()
            self.rows = i + 1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _refresh(self, v: cython.longlong) -> cython.void:
        """Update the fields of a vCPU that the fast path reads from its slots. Without a root they stay as a guess."""
        r: cython.longlong = self.slots[v].slot[0]
        w: cython.longlong = self.root[r].word
        self.vcpu[v].gen = NONE
        if r:
            self.vcpu[v].word = w
            self.vcpu[v].top = self.word[w].top
            self.vcpu[v].deep = self.word[w].level == 5
            if not self.slots[v].request and self.vcpu[v].stuck < 0:
                self.vcpu[v].gen = self.word[w].gen
