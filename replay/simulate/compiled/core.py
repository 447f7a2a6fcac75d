# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The compiled engine: the same as `reference`, bit for bit, at the speed of C. It also runs as plain Python.

A block is processed 64 operations at a time. A first pass walks the trees for each TOUCH and stores a guess of the
table. The second pass uses the guess if the table's generation is that of the vCPU's current root, and then sets the
bits without a branch. Everything else (other operations, missing tables, huge pages, prefetch) takes the slow path
(`vm_operations`).

Nothing here allocates memory: `run` stops before an operation for which there may be no room, and `engine` makes room.
"""

from __future__ import annotations

import cython

from replay.simulate.compiled.vm_operations import VmOperations
from replay.simulate.operations import Op

COMPILED: bool = cython.compiled

FIX = cython.declare(cython.longlong, int(Op.FIX))
ENTER = cython.declare(cython.longlong, int(Op.ENTER))
UNLOAD = cython.declare(cython.longlong, int(Op.UNLOAD))
ROLE = cython.declare(cython.longlong, int(Op.ROLE))
SWITCH = cython.declare(cython.longlong, int(Op.SWITCH))
INVALIDATE = cython.declare(cython.longlong, int(Op.INVALIDATE))
ZAP = cython.declare(cython.longlong, int(Op.ZAP))
ZAP_ALL = cython.declare(cython.longlong, int(Op.ZAP_ALL))
SPLIT = cython.declare(cython.longlong, int(Op.SPLIT))
COLLAPSE = cython.declare(cython.longlong, int(Op.COLLAPSE))
END = cython.declare(cython.longlong, int(Op.END))


@cython.final
@cython.cclass
class Core(VmOperations):
    """One VM under one policy, fed block by block. `engine.Engine` sets it up and reads its results."""

    def check(
        self,
        op: cython.const[cython.uint][::1],
        gfn: cython.const[cython.ulonglong][::1],
        last_gfn: cython.const[cython.ulonglong][::1],
        vcpus: cython.const[cython.longlong][::1],
        levels: cython.const[cython.longlong][::1],
    ) -> cython.longlong:
        """Return the index of the first operation that is beyond the limits of
        its kind, or the number of operations if none is.
        """
        n: cython.longlong = op.shape[0]
        i: cython.longlong = 0
        j: cython.longlong
        end: cython.longlong
        o: cython.uint
        some: cython.uint
        good: cython.uint
        beyond: cython.int
        last_vcpu: cython.int = cython.cast(cython.int, vcpus[0]) - 1
        frames: cython.ulonglong
        kind: cython.uint
        touches: cython.bint  # every TOUCH among them is within the limits
        with cython.nogil:
            while i < n:
                end = i + 256 if n - i > 256 else n
                # Check a run of touches without branches, since most operations are touches.
                some = 0
                good = 16
                beyond = 0
                frames = 0
                for j in range(i, end):
                    o = op[j]
                    some |= o
                    good &= o | o >> 1 | (o & 15) + 15  # bit 4 is set for level 1, 2 or 3, and if it is not a TOUCH
                    beyond |= last_vcpu - cython.cast(cython.int, o >> 16)
                    frames |= gfn[j]
                touches = frames <= last_gfn[0] and beyond >= 0 and some & 64 == 0 and good != 0
                if touches and some & 15 == 0:
                    i = end
                    continue
                while i < end:
                    if touches and i + 4 <= end and (op[i] | op[i + 1] | op[i + 2] | op[i + 3]) & 15 == 0:
                        i += 4
                        continue
                    o = op[i]
                    kind = o & 15
                    if gfn[i] > last_gfn[kind] or o >> 16 >= vcpus[kind] or not levels[kind] >> (o >> 4 & 7) & 1:
                        end = n = i
                        break
                    i += 1
        return n

    def run(
        self,
        op: cython.const[cython.uint][::1],
        gfn: cython.const[cython.longlong][::1],
        ranges: cython.const[cython.longlong][::1],
        start: cython.longlong,
        first: cython.longlong,
    ) -> cython.longlong:
        """Run the operations from `start` on, and return the index of the first
        one not done, for lack of room or after an error.
        """
        n: cython.longlong = op.shape[0]
        if cython.compiled:
            self.ranges = cython.cast(cython.pointer[cython.longlong], cython.address(ranges[0]))
            with cython.nogil:
                start = self._run(cython.address(op[0]), cython.address(gfn[0]), n, start, first)
        else:
            self.ranges = memoryview(ranges)
            start = self._run(memoryview(op), memoryview(gfn), n, start, first)
        return start

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _run(
        self,
        op: cython.pointer[cython.const[cython.uint]],
        gfn: cython.pointer[cython.const[cython.longlong]],
        n: cython.longlong,
        i: cython.longlong,
        first: cython.longlong,
    ) -> cython.longlong:
        bits: cython.pointer[cython.ulonglong] = self.bits
        gen: cython.pointer[cython.longlong] = self.gen
        child: cython.pointer[cython.uint] = self.child
        page_of: cython.pointer[cython.uint] = self.page_of
        vcpu: cython.pointer[Vcpu] = self.vcpu
        word: cython.pointer[Word] = self.word
        guess: cython.uint[64]
        if not cython.compiled:
            guess = [0] * 64
        # Faults on huge pages, with a reset, or with prefetch are left to the slow path.
        special: cython.longlong = 0x2070 if self.prefetch else 0x2060
        end: cython.longlong
        j: cython.longlong
        o: cython.longlong
        g: cython.longlong
        v: cython.longlong
        level: cython.longlong
        node: cython.longlong
        low: cython.longlong
        page: cython.longlong
        k: cython.longlong
        bit: cython.longlong
        fault: cython.longlong
        present: cython.ulonglong
        ever: cython.ulonglong
        one: cython.ulonglong = 1

        while i < n:
            end = i + 64 if n - i > 64 else n
            for j in range(end - i):
                o = op[i + j]
                if o & 15 == 0:  # TOUCH
                    g = gfn[i + j]
                    v = o >> 16
                    node = vcpu[v].top
                    if vcpu[v].deep:
                        node = child[node * 512 + (g >> 36 & 511)]
                    node = child[node * 512 + (g >> 27 & 511)]
                    low = child[node * 512 + (g >> 18 & 511)]
                    page = child[low * 512 + (g >> 9 & 511)]
                    level = o >> 4 & 7
                    if level != 1:
                        page = page_of[low if level == 2 else node]
                    guess[j] = page
                elif o & 14 == 4:  # ROLE, SWITCH: the touches that follow most likely use this word's root
                    vcpu[o >> 16].top = word[gfn[i + j]].top
                    vcpu[o >> 16].deep = word[gfn[i + j]].level == 5
            for j in range(end - i):
                o = op[i]
                g = gfn[i]
                if o & 15 == 0:
                    v = o >> 16
                    page = guess[j]
                    if gen[page] == vcpu[v].gen:
                        level = o >> 4 & 7
                        k = g >> (level - 1) * 9 & 511
                        bit = k & 63
                        k = page * 16 + (k >> 6) * 2
                        present = bits[k]
                        fault = present >> bit & 1 ^ 1
                        if o & special & -fault == 0:
                            ever = bits[k + 1]
                            bits[k] = present | one << bit
                            bits[k + 1] = ever | one << bit
                            vcpu[v].faults += fault
                            vcpu[v].refaults += ever >> bit & fault
                            vcpu[v].hits += fault ^ 1
                            word[vcpu[v].word].leaves += fault
                            i += 1
                            continue
                if not self._room():
                    return i
                self.at = first + i
                if self._do(o, g):
                    return i
                i += 1
        return i

    def run_each(
        self,
        op: cython.const[cython.uint][::1],
        gfn: cython.const[cython.longlong][::1],
        ranges: cython.const[cython.longlong][::1],
        start: cython.longlong,
        first: cython.longlong,
        changes: cython.longlong[:, ::1],
    ) -> cython.longlong:
        """Run operations as `run` does, all of them on the slow path.

        Row i of `changes` gets what operation i added to the counts in `engine.CHANGES`.
        """
        n: cython.longlong = op.shape[0]
        i: cython.longlong = start
        v: cython.longlong
        stops: cython.bint
        if cython.compiled:
            self.ranges = cython.cast(cython.pointer[cython.longlong], cython.address(ranges[0]))
        else:
            self.ranges = memoryview(ranges)
        while i < n and self._room():
            v = op[i] >> 16 if op[i] & 15 <= SWITCH else 0
            self._tell(v, changes, i, -1)
            self.at = first + i
            stops = self._do(op[i], gfn[i])
            self._tell(v, changes, i, 1)
            if stops:
                break
            i += 1
        return i

    @cython.cfunc
    @cython.exceptval(check=False)
    def _tell(
        self, v: cython.longlong, changes: cython.longlong[:, ::1], i: cython.longlong, sign: cython.longlong
    ) -> cython.void:
        changes[i, 0] += sign * self.slots[v].creations
        changes[i, 1] += sign * self.slots[v].reuses
        changes[i, 2] += sign * self.frees
        changes[i, 3] += sign * self.tables
        changes[i, 4] += sign * self.tables_freed
        changes[i, 5] += sign * (self.vcpu[v].faults + self.prefetched)
        changes[i, 6] += sign * self.slots[v].fixes
        changes[i, 7] += sign * self.zapped

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _do(self, o: cython.longlong, g: cython.longlong) -> cython.bint:
        """Run one operation on the slow path; return True if it could not be finished."""
        kind: cython.longlong = o & 15
        v: cython.longlong = o >> 16
        level: cython.longlong = o >> 4 & 7
        if kind <= SWITCH:
            if self.vcpu[v].stuck >= 0:
                return False
            if kind == 0:
                self._touch(v, g, level, o >> 7 & 7, o >> 10 & 7, o >> 13 & 1)
            elif kind == ENTER:
                self._enter(v)
            elif kind == FIX:
                self._fix(v, g, level, o >> 13 & 1)
            elif kind == UNLOAD:
                self._unload(v, g)
            elif kind == ROLE:
                self.slots[v].word = g
            else:
                self._switch(v, g)
        elif kind == INVALIDATE:
            self._invalidate()
        elif kind == ZAP:
            self._zap(level, self.ranges[g * 2], self.ranges[g * 2 + 1])
        elif kind == ZAP_ALL:
            self._zap_all()
        elif kind == SPLIT:
            return self._split(level, self.ranges[g * 2], self.ranges[g * 2 + 1])
        elif kind == COLLAPSE:
            self._collapse(v, level, g, o >> 7 & 1)
        elif kind == END:
            self._end()
        return self.error != 0
