# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What happens to a VM as a whole: its memslots change, ranges are unmapped, roots and tables are zapped."""

from __future__ import annotations

from typing import Any

import cython

from replay.decode.rows.unload_triggers import UnloadTriggers
from replay.simulate.operations import FOR_GOOD, Op
from traces.kernels.spte import LARGE

_ZAP = cython.declare(cython.uint, int(Op.ZAP))
_SPLIT = cython.declare(cython.uint, int(Op.SPLIT))
_COLLAPSE = cython.declare(cython.uint, int(Op.COLLAPSE))
_LEVEL_SHIFT = cython.declare(cython.int, 4)
_FOR_GOOD = cython.declare(cython.uint, FOR_GOOD)
_VCPU_SHIFT = cython.declare(cython.int, 16)
_LARGE = cython.declare(cython.ulonglong, LARGE)


@cython.cclass
class VmEvents(UnloadTriggers):
    """Makes ZAP, SPLIT and COLLAPSE of memslot changes, of notifiers, and of tables that the kernel removes."""

    _slots: Any
    _collapsing: set  # type: ignore[type-arg]  # threads in an ioctl that ends dirty logging
    _invalidating: set  # type: ignore[type-arg]  # threads in kvm_mmu_zap_all_fast
    _zapping: set  # type: ignore[type-arg]  # threads that zap a root
    _deleting: dict  # type: ignore[type-arg]  # by thread, the address space and frames of the slot it removes
    _collapses: cython.bint
    _deletes: cython.bint
    _slot_zap: cython.bint  # removing a slot without an invalidation zaps the slot's leaves
    _recovers: cython.bint  # a table that is removed by itself shows NX huge page recovery
    _spte_present: cython.ulonglong
    # The memslots as they are from `_slots_since` on and before `_slots_until`
    _slots_since: cython.longlong
    _slots_until: cython.longlong
    _slot_count: cython.Py_ssize_t
    _most_slots: cython.Py_ssize_t
    _slot_key: cython.const[cython.longlong][::1]
    _slot_gfn: cython.const[cython.longlong][::1]
    _slot_pages: cython.const[cython.longlong][::1]
    _slot_hva: cython.const[cython.ulonglong][::1]
    _slot_space: cython.const[cython.longlong][::1]

    def __init__(self, capabilities: Any, vcpus: int, timed: bool, role_words: Any, slots: Any) -> None:
        """`slots` has the VM's memslots by time (`decode.slots.Slots`)."""
        super().__init__(capabilities, vcpus, timed, role_words)
        kernel = capabilities.kernel
        self._slots, self._slots_since, self._slots_until = slots, 0, 0
        self._slot_count, self._most_slots = 0, len(slots)
        self._collapsing, self._invalidating, self._zapping = set(), set(), set()
        self._deleting = {}
        self._collapses = self._deletes = False
        self._slot_zap = kernel.slot_zap and bool(capabilities.has("kvm_mmu_zap_all_fast"))
        # Up to 5.17 a notifier takes tables as well.
        zaps_roots = bool(capabilities.trace.metadata.kinds.get("zap_root_begin"))
        self._recovers = kernel.spte_changed and not kernel.zap_tables and zaps_roots
        self._spte_present = kernel.spte.present

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _is_empty(self, tid: cython.int, all_roots: cython.bint) -> cython.bint:
        """Return whether a zap_all empties every root for good: before 5.12 an invalidation calls the same function."""
        empties: cython.bint
        with cython.gil:
            empties = all_roots and tid not in self._invalidating
            if not all_roots:
                self._invalidating.add(tid)
            elif not empties:
                self._invalidating.discard(tid)
        return empties

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _change_slot(self, tid: cython.int, slot: cython.int, space: cython.int) -> cython.void:
        """A memslot changes.

        If dirty logging begins, huge leaves are split; if it ends, tables of huge memory are removed.

        If the slot is deleted or moved, all roots are invalidated or, if the VMM has chosen that, only its leaves are
        zapped.
        """
        with cython.gil:
            if self._slot_zap:
                start, end = self._slots.gone(self._now, slot, space)
                if start < end:
                    self._deleting[tid] = (space, start, end)
                    self._deletes = True
            change, start, end = self._slots.logging_change(self._now, slot, space)
            if change > 0:
                self._put_range(_SPLIT, space, start, end)
            elif change < 0:
                self._collapsing.add(tid)
                self._collapses = True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _end_slot(self, tid: cython.int, zaps: cython.bint) -> cython.void:
        """The thread that removes a slot zaps the slot's leaves or ends (`zaps`), or invalidates all roots."""
        with cython.gil:
            gone = self._deleting.pop(tid, None)
            self._deletes = bool(self._deleting)
            if gone is not None and zaps:
                self._put_range(_ZAP, gone[0], gone[1], gone[2])

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _zaps_root(self, tid: cython.int, begins: cython.bint) -> cython.void:
        with cython.gil:
            if begins:
                self._zapping.add(tid)
            else:
                self._zapping.discard(tid)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _end_collapse(self, tid: cython.int) -> cython.void:
        with cython.gil:
            self._collapsing.discard(tid)
            self._collapses = bool(self._collapsing)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _collapse(
        self,
        v: cython.Py_ssize_t,
        tid: cython.int,
        level: cython.int,
        space: cython.int,
        gfn: cython.longlong,
        old: cython.ulonglong,
        new: cython.ulonglong,
    ) -> cython.void:
        """A table is removed by the thread whose ioctl ends dirty logging, or by the worker of NX huge page recovery.

        The worker is a thread without a vCPU that is not zapping a root.
        """
        op: cython.uint
        mine: cython.bint
        worker: cython.bint
        was_table: cython.bint = old & self._spte_present != 0 and old & _LARGE == 0
        is_table: cython.bint = new & self._spte_present != 0 and new & _LARGE == 0
        if not was_table or is_table:
            return
        with cython.gil:
            mine = tid in self._collapsing
            worker = not mine and v < 0 and self._recovers and tid not in self._zapping
        if mine or worker:
            op = _COLLAPSE | cython.cast(cython.uint, level << _LEVEL_SHIFT)
            op |= cython.cast(cython.uint, space << _VCPU_SHIFT)
            self._put(op | _FOR_GOOD if worker else op, gfn)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _look_up_slots(self) -> cython.void:
        """Load the memory slots as they are at the time of this row. Times may go back a little between CPUs."""
        if self._slots_since <= self._now < self._slots_until:
            return
        with cython.gil:
            table = self._slots.at(self._now)
            self._slots_since, self._slots_until = table.since, table.until
            self._slot_count = len(table.key)
            self._slot_key, self._slot_gfn, self._slot_pages = table.key, table.gfn, table.pages
            self._slot_hva, self._slot_space = table.hva, table.as_id

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _unmap(self, start: cython.ulonglong, end: cython.ulonglong) -> cython.void:
        """An MMU notifier unmaps host addresses: zap the guest frames behind them in each slot that has some."""
        s: cython.Py_ssize_t
        low: cython.ulonglong
        high: cython.ulonglong
        top: cython.ulonglong
        first: cython.longlong
        past: cython.longlong
        self._look_up_slots()
        for s in range(self._slot_count):
            top = self._slot_hva[s] + (cython.cast(cython.ulonglong, self._slot_pages[s]) << 12)
            low = max(start, self._slot_hva[s])
            high = min(end, top)
            if low < high:
                first = self._slot_gfn[s] + cython.cast(cython.longlong, (low - self._slot_hva[s]) >> 12)
                past = self._slot_gfn[s] + cython.cast(cython.longlong, (high - self._slot_hva[s] + 4095) >> 12)
                self._put_range(_ZAP, self._slot_space[s], first, past)
