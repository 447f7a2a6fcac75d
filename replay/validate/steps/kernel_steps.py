# SPDX-License-Identifier: Apache-2.0
"""All steps of one VM: those of roots, faults, zaps and dirty logging, and in addition those of MMU notifiers."""

from __future__ import annotations

from replay.simulate import page_table
from replay.simulate.page_table import Table
from replay.validate import expect
from replay.validate.expect import Activity, perhaps
from replay.validate.steps.dirty_steps import DirtySteps
from replay.validate.steps.slot_lookup import Memslot
from replay.validate.steps.vm_state import RootWalk
from traces.kernels.spte import WRITABLE


class KernelSteps(DirtySteps):
    """Everything that the recorded kernel's MMU does for one VM, by itself or on behalf of the host."""

    def unmap(self, start: int, end: int) -> Activity:
        """Handle an MMU notifier: each memslot that the host addresses overlap gives a range of guest frames to zap."""
        walk = RootWalk(between=bool(self.roots) and any(True for _ in self.slots.overlaps(start, end)))
        self.walks.add(walk)
        return self._unmap(start, end, walk)

    def _unmap(self, start: int, end: int, walk: RootWalk) -> Activity:
        if not self.kernel.spte_changed:
            return
        self.sequence += 1
        visits = list(self.slots.overlaps(start, end))
        for left, (slot, first, last, certain) in zip(range(len(visits) - 1, -1, -1), visits, strict=True):
            walk.more = left > 0
            zap = self.zap_range(slot.as_id, first, last, walk)
            if certain:
                yield from zap
            else:
                yield from perhaps(zap)

    def zap_range(self, as_id: int, start: int, end: int, walk: RootWalk | None = None) -> Activity:
        """Follow kvm_tdp_mmu_unmap_gfn_range: zap the leaves in [start, end) in every root of an address space."""
        for root in self.held():
            if walk is not None:
                walk.between = False
            if self.as_id(root) == as_id:
                yield from self.zap_leafs(root, start, end)
            yield from self.put(root, walk)

    def zap_slot(self, slot: Memslot) -> Activity:
        """Follow kvm_mmu_zap_memslot: with KVM_X86_QUIRK_SLOT_ZAP_ALL off,
        only the leaves of a removed slot are zapped.
        """
        yield from self.zap_range(slot.as_id, slot.gfn, slot.end)
        self.slot_zap = True

    def zap_gfns(self, as_id: int, start: int, end: int) -> Activity:
        """Follow kvm_tdp_mmu_zap_leafs, for an APICv inhibit.

        From 6.9 on it zaps all address spaces, and valid roots only.
        """
        once = self.kernel.zap_leafs_once
        for root in self.held(only_valid=once):
            if once or self.as_id(root) == as_id:
                yield from self.zap_leafs(root, start, end)
            yield from self.put(root)

    def finds(self, start: int, end: int) -> bool:
        """Return whether a notifier for these host addresses would certainly show an event."""
        return bool(self.roots) and any(certain for *_, certain in self.slots.overlaps(start, end))

    def age(self, start: int, end: int) -> Activity:
        """Follow kvm_age_hva: clear the accessed bit of leaves in the range for which the processor has set it."""
        for slot, first, last, _ in self.slots.overlaps(start, end):
            for root in list(self.roots):
                for table, at in list(page_table.within(root.top, first, last)):
                    word = table.entries.get(at)
                    if self.as_id(root) != slot.as_id or not isinstance(word, int) or not self.present(word):
                        continue
                    row = yield self.change(root, table, at, expect.leaf(word, self.kernel), optional=True)
                    if row is not None:
                        yield None

    def track(self, as_id: int, gfn: int) -> Activity:
        """Follow kvm_mmu_slot_gfn_write_protect: a table of L1 is about to be
        shadowed, so it is write-protected in all roots.
        """
        for root in self.roots:
            found = page_table.leaf(root.top, gfn) if self.as_id(root) == as_id else None
            if found is None:
                continue
            table, at = found
            word = table.entries[at]
            assert isinstance(word, int)
            new = word & ~(WRITABLE | self.mmu_writable)
            if self.present(word) and new != word:
                row = yield self.change(root, table, at, expect.leaf(new, self.kernel))
                assert row is not None
                table.entries[at] = row.new
                yield None

    def recover(self, as_id: int, level: int, gfn: int) -> Activity:
        """Follow kvm_recover_nx_huge_pages: zap a table that was built to execute smaller pages.

        The worker chooses which.
        """
        for root in self.roots:
            table, at = self.entry(root, gfn, level)
            below = table.entries.get(at)
            if self.as_id(root) == as_id and isinstance(below, Table) and below.frame in self.executed:
                self.take("tables that NX huge page recovery chose")
                shared = self.kernel.nx_recovery == "read"
                yield from self.zap_entry(root, table, at, shared, put=self.zapped() if shared else None)
                return
