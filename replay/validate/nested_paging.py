# SPDX-License-Identifier: Apache-2.0
"""Rows about nested guests' own paging: KVM's shadow of the tables that L1 made for L2, distinguished but not modelled.

L1's nested page tables are shadowed in the vCPU's other context (guest_mmu), by pages whose role word has guest_mode
and not direct, or that lie below such a page. A row is distinguished only if it shows this itself, and only in a VM
that has entered a nested guest: never because it is not what the model expects.
"""

from __future__ import annotations

from collections import Counter

from replay.validate.row_tuples import RowTuple


class NestedPaging:
    """The roots and tables of one VM that shadow L1's tables; `rows` is the number of rows about them, by kind."""

    def __init__(self, guest_mode_bit: int, direct_bit: int) -> None:
        self._guest_mode = guest_mode_bit
        self._direct = direct_bit
        self._roots: set[int] = set()
        self._tables: dict[int, tuple[int, bool]] = {}  # page frame -> guest frame, whether writes to it are tracked
        self._faults: set[int] = set()  # threads that are handling a fault of a nested guest
        self.entered = False
        self.rows: Counter[str] = Counter()
        self.tracked: Counter[int] = Counter()  # guest frames to which writes are emulated: upper tables of L1

    def shadows(self, role: int) -> bool:
        """Return whether a role word is that of a page that shadows one of L1's tables."""
        return self.entered and bool(role & self._guest_mode) and not role & self._direct

    def faults(self, tid: int) -> bool:
        """Return whether a thread is handling a fault of a nested guest."""
        return tid in self._faults

    def happen(self, row: RowTuple) -> bool:
        """Take note of a row that is not a response; return True if it concerns only the shadow of L1's tables."""
        if row.kind == "kvm_nested_vmenter":
            self.entered = True
        elif row.kind == "kvm_page_fault":
            if self.shadows(row.role):
                self._faults.add(row.tid)
                return True
            self._faults.discard(row.tid)
        elif row.kind in ("kvm_entry", "kvm_exit", "kvm_userspace_exit"):
            self._faults.discard(row.tid)
        return row.kind in ("new_pgd", "mmu_free_roots") and self.shadows(row.role)

    def has(self, row: RowTuple) -> bool:
        """Return whether a response belongs to the shadow of L1's tables, and count it if it does."""
        if not self.entered or not self._is_of(row):
            return False
        self.rows[row.kind] += 1
        if row.kind == "kvm_mmu_get_page":
            if row.table not in self._tables:
                tracked = not row.role & self._direct and row.level > 1
                self._tables[row.table] = (row.gfn or 0, tracked)
                self.tracked[row.gfn or 0] += tracked
            if row.root:
                self._roots.add(row.root)
        elif row.kind == "mmu_load" and row.root:
            self._roots.add(row.root)
        elif row.kind == "kvm_mmu_prepare_zap_page":
            gfn, tracked = self._tables.pop(row.table, (0, False))
            self.tracked[gfn] -= tracked
        return True

    def _is_of(self, row: RowTuple) -> bool:
        if row.kind == "kvm_mmu_get_page":
            below = self.faults(row.tid) and bool(row.role & self._guest_mode)  # a direct page below L1's huge page
            return self.shadows(row.role) or below
        if row.kind == "kvm_mmu_prepare_zap_page":
            return row.table in self._tables or self.shadows(row.role)
        if row.kind == "kvm_mmu_set_spte":
            return row.table in self._tables
        if row.kind in ("mmu_load", "root_put"):
            return self.shadows(row.role)
        if row.kind in ("kvm_mmu_spte_requested", "mark_mmio_spte", "check_mmio_spte", "handle_mmio_page_fault"):
            return self.faults(row.tid)
        return row.kind == "fast_page_fault" and (row.root in self._roots or self.faults(row.tid))
