# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Pages that a vCPU needed: leaves that a fault installed, repaired or split.

Where removals are not recorded (5.10), a page that a root installs again was removed before (`decode.rows.inferred`).
"""

from __future__ import annotations

from typing import Any

import cython

from replay.decode.inputs import HAS_HIDDEN, HAS_TOUCH, HIDDEN
from replay.decode.rows.inferred import GONE_PAGE, GONE_TABLE, Unseen
from replay.decode.rows.vm_events import VmEvents
from replay.simulate.operations import Op

_PAGE_BITS = cython.declare(cython.int, 9)  # of a table's index
_TOUCH = cython.declare(cython.uint, int(Op.TOUCH))
_FIX = cython.declare(cython.uint, int(Op.FIX))
_ZAP = cython.declare(cython.uint, int(Op.ZAP))
_HIDDEN = cython.declare(cython.uint, HIDDEN)
_LEVEL_SHIFT = cython.declare(cython.int, 4)
_FIRST_SHIFT = cython.declare(cython.int, 7)
_LAST_SHIFT = cython.declare(cython.int, 10)
_HAS_TOUCH = cython.declare(cython.longlong, HAS_TOUCH)
_HAS_HIDDEN = cython.declare(cython.longlong, HAS_HIDDEN)
_GONE_PAGE = cython.declare(cython.int, GONE_PAGE)
_GONE_TABLE = cython.declare(cython.int, GONE_TABLE)


@cython.cclass
class PageInstalls(VmEvents):
    """Makes TOUCH and FIX of the leaves that faults install, and ZAP of removals that follow from them."""

    inferred: cython.longlong
    hidden: cython.longlong

    _unseen: Any
    _groups: cython.bint
    _shadow: cython.bint
    _infers: cython.bint

    def __init__(self, capabilities: Any, vcpus: int, timed: bool, role_words: Any, slots: Any, groups: bool) -> None:
        """`groups` says to find out what the shadow MMU may prefetch around each touch."""
        super().__init__(capabilities, vcpus, timed, role_words, slots)
        self._unseen = Unseen() if capabilities.infers else None
        self._shadow, self._infers = capabilities.shadow, capabilities.infers
        self._groups = groups
        self.inferred = self.hidden = 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _leaf(
        self,
        v: cython.Py_ssize_t,
        mmio: cython.bint,
        level: cython.longlong,
        gfn: cython.longlong,
        root: cython.longlong,
        table: cython.longlong,
    ) -> cython.void:
        """A leaf was installed: the vCPU needed it, or the shadow MMU prefetched it."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        space: cython.longlong
        op: cython.uint
        asked: cython.longlong
        has: cython.longlong = _HAS_TOUCH
        marked: cython.longlong = vcpu[v].marked
        if mmio:
            level = 1
        if level < 1 or level > 5:
            level = 1
        gfn &= -(cython.cast(cython.longlong, 1) << _PAGE_BITS * (level - 1))
        # The TDP MMU of 5.10 reports an MMIO SPTE by both events.
        vcpu[v].marked = gfn if mmio else -1
        if not mmio and marked == gfn:
            return
        # An access to MMIO exits whether its SPTE is present or not, and is then emulated.
        op = _FIX if mmio or vcpu[v].present else _TOUCH
        if vcpu[v].split > vcpu[v].faulted:
            return  # counted where the huge leaf was split
        asked = vcpu[v].requested & -(cython.cast(cython.longlong, 1) << _PAGE_BITS * (level - 1))
        if self._shadow and not mmio and asked != gfn:
            op |= _HIDDEN
            has = _HAS_HIDDEN
            self.hidden += 1
        space = 1 if self._role_of(root) >> 24 else 0
        op |= cython.cast(cython.uint, level << _LEVEL_SHIFT)
        if self._groups:
            op |= self._group(space, gfn)
        if self._infers:
            self._infer(v, root, gfn, level, space, table, not vcpu[v].present and has == _HAS_TOUCH)
        vcpu[v].touch = self._at
        vcpu[v].touch_input = self.inputs
        self._put_of(v, op, gfn, has)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _group(self, space: cython.longlong, gfn: cython.longlong) -> cython.uint:
        """Return, as bits of an operation, the first and last entry of a page's aligned group of 8 that its slot has.

        Without a slot both are the page's own entry.
        """
        own: cython.longlong = gfn & 7
        base: cython.longlong = gfn - own
        first: cython.longlong = own
        last: cython.longlong = own
        low: cython.Py_ssize_t = 0
        high: cython.Py_ssize_t
        middle: cython.Py_ssize_t
        key: cython.longlong = space << 52 | gfn
        self._look_up_slots()
        high = self._slot_count
        while low < high:
            middle = (low + high) // 2
            if self._slot_key[middle] <= key:
                low = middle + 1
            else:
                high = middle
        low -= 1
        if low >= 0 and self._slot_space[low] == space and gfn < self._slot_gfn[low] + self._slot_pages[low]:
            first = max(self._slot_gfn[low] - base, 0)
            last = min(self._slot_gfn[low] + self._slot_pages[low] - base, 8) - 1
        return cython.cast(cython.uint, first << _FIRST_SHIFT | last << _LAST_SHIFT)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _repaired(self, v: cython.Py_ssize_t, addr: cython.ulonglong, huge: cython.bint) -> cython.void:
        """A fault was repaired without mmu_lock."""
        level: cython.longlong = 2 if huge else 1
        gfn: cython.longlong = cython.cast(cython.longlong, addr >> 12) & -(
            cython.cast(cython.longlong, 1) << _PAGE_BITS * (level - 1)
        )
        own: cython.longlong = gfn & 7
        op: cython.longlong = level << _LEVEL_SHIFT | own << _FIRST_SHIFT | own << _LAST_SHIFT
        self._vcpu[v].touch = self._at
        self._vcpu[v].touch_input = self.inputs
        self._put_of(v, _FIX | cython.cast(cython.uint, op), gfn, _HAS_TOUCH)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _splits(self, v: cython.Py_ssize_t, gfn: cython.longlong, level: cython.longlong) -> cython.void:
        """A fault splits a huge leaf that grants too little; the split alone may grant what the fault needs."""
        op: cython.longlong = max(level, 1) << _LEVEL_SHIFT | (gfn & 7) << _FIRST_SHIFT | (gfn & 7) << _LAST_SHIFT
        self._vcpu[v].split = self._vcpu[v].touch = self._at
        self._vcpu[v].touch_input = self.inputs
        self._put_of(v, _FIX | cython.cast(cython.uint, op), gfn, _HAS_TOUCH)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _infer(
        self,
        v: cython.Py_ssize_t,
        root: cython.longlong,
        gfn: cython.longlong,
        level: cython.longlong,
        space: cython.longlong,
        table: cython.longlong,
        asks: cython.bint,
    ) -> cython.void:
        """Infer, where removals are not recorded, that a page which its root had
        mapped was removed before it is installed again.
        """
        vcpu: cython.pointer[Vcpu] = self._vcpu
        region: cython.longlong = gfn & -512
        rebuilt: cython.bint = vcpu[v].built > vcpu[v].faulted and vcpu[v].built_at == region
        gone: cython.int
        with cython.gil:
            gone = self._unseen.find(
                root, gfn, level, table, self._at, vcpu[v].faulted, asks, rebuilt, self._invalidated
            )
        if gone & _GONE_PAGE:
            self.inferred += 1
            self._put_range(_ZAP, space, gfn, gfn + (cython.cast(cython.longlong, 1) << _PAGE_BITS * (level - 1)))
        if gone & _GONE_TABLE:
            self.inferred += 1
            self._put_range(_ZAP, space, region, region + 512)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _forget(self, root: cython.longlong) -> cython.void:
        """Forget what a root had mapped, since it has ended."""
        if root:
            with cython.gil:
                self._unseen.end(root)
