# SPDX-License-Identifier: Apache-2.0
"""The steps of dirty logging: huge leaves are split, leaves
write-protected, tables collapsed (kvm-mmu.md, "Dirty logging").
"""

from __future__ import annotations

from replay.simulate import page_table
from replay.simulate.model_state import Root
from replay.simulate.page_table import Table
from replay.validate import expect
from replay.validate.expect import Activity, Attempt, Expect, Spte, perhaps
from replay.validate.row_tuples import RowTuple
from replay.validate.steps.faults import FaultSteps
from replay.validate.steps.roots import Roots
from replay.validate.steps.slot_lookup import Memslot
from traces.kernels.spte import WRITABLE, pfn

_CHUNK = 64  # pages whose bits are in one word of a dirty bitmap
_CHOSEN = "leaves whose writes are logged anew by KVM_CLEAR_DIRTY_LOG or KVM_RESET_DIRTY_RINGS (the VMM says which)"


class DirtySteps(Roots, FaultSteps):
    """The kernel's steps when logging of a slot's dirty pages begins, is read, is rearmed, and ends."""

    def log_on(self, slot: Memslot) -> Activity:
        """Logging of a slot's dirty pages begins.

        With KVM_DIRTY_LOG_INITIALLY_SET nothing happens until KVM_CLEAR_DIRTY_LOG. Whether a VMM asked for that shows
        at the first slot for which logging begins while there is a root: without it, a reference on the root is put.
        """
        if not self.kernel.spte_changed or self.initially_set:
            return
        logging = self._log_on(slot)
        if self.capable and self.initially_set is None:
            if any(root.valid for root in self.roots):
                self.initially_set = not (yield from perhaps(logging))
        else:
            yield from logging

    def _log_on(self, slot: Memslot) -> Activity:
        """Split huge leaves (eager_page_split), then write-protect every leaf, or clear its dirty bit (PML)."""
        if self.kernel.eager_split and self.eager_split:
            for root in self.held(only_valid=True):
                if self.as_id(root) == slot.as_id:
                    yield from self.split(root, slot.gfn, slot.end)
                yield from self.put(root)
        for level in (1, 2) if self.pml else (1,):
            for root in self.held(only_valid=True):
                if self.as_id(root) == slot.as_id and self.pml and level == 1:
                    yield from self.clear_dirty(root, slot.gfn, slot.end)
                elif self.as_id(root) == slot.as_id:
                    yield from self.write_protect(root, slot.gfn, slot.end, level)
                yield from self.put(root)

    def split(self, root: Root, start: int, end: int) -> Activity:
        """Follow kvm_tdp_mmu_try_split_huge_pages, down to 4 KiB."""
        for table, at in page_table.within(root.top, start, end):
            if self.is_huge(table, at):
                yield from self.split_one(root, table, at)

    def is_huge(self, table: Table, at: int) -> bool:
        """Return whether an entry is a huge leaf."""
        entry = table.entries.get(at)
        return table.level > 1 and isinstance(entry, int) and self.present(entry)

    def split_one(self, root: Root, table: Table, at: int) -> Activity:
        """Follow tdp_mmu_split_huge_page: a table of smaller leaves replaces one leaf."""
        whole = table.entries[at]
        assert isinstance(whole, int)
        child = Table(table.level - 1, table.gfn_of(at))
        want = {"role": self.child_role(root, child.level), "level": child.level, "gfn": child.gfn, "flags": 1}
        row = yield Expect("kvm_mmu_get_page", want)
        assert row is not None
        child.frame = row.table
        yield None
        yield from self.link(root, table, at, child)
        yield None
        old = expect.leaf(whole, self.kernel)
        place = {"level": table.level, "gfn": table.gfn_of(at)}
        yield Expect("kvm_mmu_split_huge_page", {**place, "old": old, "ret": 0})
        yield None

    def write_protect(self, root: Root, start: int, end: int, least: int = 1) -> Activity:
        """Clear the W bit of each writable leaf in [start, end) of level `least` or higher."""
        for table, at in list(page_table.within(root.top, start, end)):
            word = table.entries.get(at)
            if not isinstance(word, int) or not self.present(word) or not word & WRITABLE or table.level < least:
                continue
            row = yield self.change(root, table, at, expect.leaf(word & ~WRITABLE, self.kernel))
            assert row is not None
            table.entries[at] = row.new
            yield None

    def clear_dirty(self, root: Root, start: int, end: int) -> Activity:
        """Clear the dirty bit of each leaf in [start, end) for which the processor has set it; no other bit changes."""
        for table, at in list(page_table.within(root.top, start, end)):
            word = table.entries.get(at)
            if not isinstance(word, int) or not self.present(word):
                continue
            row = yield self.change(root, table, at, expect.leaf(word, self.kernel), optional=True)
            if row is not None:
                yield None

    def log_off(self, slot: Memslot) -> Activity:
        """Logging ends: tables whose memory the host maps huge are zapped
        (zap_collapsible_spte_range), or replaced (6.13).
        """
        if not self.kernel.spte_changed:
            return
        for root in self.held(only_valid=True):
            if self.as_id(root) == slot.as_id:
                for table, at in list(page_table.within(root.top, slot.gfn, slot.end)):
                    child = table.entries.get(at)
                    inside = slot.gfn <= table.gfn_of(at) < slot.end
                    if not isinstance(child, Table) or child.level > 2 or not inside:
                        continue
                    pages = [word for word in child.entries.values() if isinstance(word, int) and self.present(word)]
                    if pages or not self.kernel.recovers:
                        # Only the recording can show whether the host maps this range huge: the first event decides.
                        yield from perhaps(self.collapse(root, table, at, pfn(pages[0]) if pages else 0))
            yield from self.put(root)

    def collapse(self, root: Root, table: Table, at: int, frame: int) -> Activity:
        """A table is removed; from 6.13 on, the huge leaf whose pieces it mapped takes its place."""
        put = self.zapped()
        if self.kernel.recovers:
            put = expect.to_page(frame & -page_table.span(table.level), self.kernel)
        yield from self.zap_entry(root, table, at, shared=True, put=put)

    def report(self, slot: Memslot) -> Activity:
        """KVM_GET_DIRTY_LOG without manual protection: the reported pages,
        which are writable, are protected, 64 at a time.
        """
        for start in range(slot.gfn, slot.end, _CHUNK):
            for root in self.roots:
                if self.as_id(root) != slot.as_id:
                    continue
                step = self.clear_dirty if self.pml else self.write_protect
                yield from step(root, start, min(start + _CHUNK, slot.end))

    def log_anew(self) -> Activity:
        """KVM_CLEAR_DIRTY_LOG and KVM_RESET_DIRTY_RINGS: protect the pages that the VMM names, 64 at a time.

        With KVM_DIRTY_LOG_INITIALLY_SET their huge leaves are split first, or protected where they could not be split.
        """
        parted = self.initially_set and self.kernel.eager_split and self.eager_split
        while not parted or (yield from self.split_chunk()):
            chunk: list[int] = []
            while (yield from self.protect_one(chunk if parted else [])):
                pass
            if not parted:
                return

    def split_chunk(self) -> Attempt:
        """Split the huge leaves of 64 pages, and put each root's reference.

        Returns False if there are no more pages.
        """
        began = False
        for root in self.held(only_valid=True):
            while (yield from perhaps(self.split_any(root))):
                began = True
            put = self.put(root)
            if began:
                yield from put
            elif (yield from perhaps(put)):
                began = True
            else:
                return False
        return began

    def split_any(self, root: Root) -> Activity:
        """Split a huge leaf of a logged slot; the recorded row says which."""

        def place(row: RowTuple) -> tuple[Table, int]:
            return self.entry(root, row.gfn or 0, row.level + 1)

        def huge(row: RowTuple) -> bool:
            table, at = place(row)
            return self.is_huge(table, at) and table.level == row.level + 1 and table.gfn_of(at) == row.gfn

        logged = Spte("of a slot that is logged", lambda gfn: self.logged(self.as_id(root), gfn))
        row = yield Expect("kvm_mmu_get_page", {"gfn": logged, "flags": 1}, agrees=huge)
        assert row is not None
        splitting = self.split_one(root, *place(row))
        expected = next(splitting)
        assert expected is not None
        if expected.misfit(row):
            yield expected
        splitting.send(row)
        yield from splitting

    def entry(self, root: Root, gfn: int, level: int) -> tuple[Table, int]:
        """Return the entry for a guest frame at this level, or at a higher one that has no table below it."""
        table = page_table.walk(root.top, gfn, level)
        return table, page_table.index(gfn, table.level)

    def protect_one(self, chunk: list[int]) -> Attempt:
        """Rearm the logging of one leaf. `chunk` are the guest frames so far, all within the same 64 pages."""
        row = yield Expect(
            "kvm_tdp_mmu_spte_changed", optional=True, agrees=lambda got: self._logged_anew(got, chunk) is not None
        )
        if row is None:
            return False
        found = self._logged_anew(row, chunk)
        assert found is not None
        assert row.gfn is not None
        if row.level == 1:
            chunk.append(row.gfn)
        table, at = found
        table.entries[at] = row.new
        self.take(_CHOSEN)
        yield None
        return True

    def _logged_anew(self, row: RowTuple, chunk: list[int]) -> tuple[Table, int] | None:
        """Return the leaf that a row changes, if the leaf is in a logged slot
        and the change is the expected one, else None.
        """
        slot = None if row.gfn is None else self.slots.of(row.as_id, row.gfn)
        if row.gfn is None or slot is None or not slot.logged:
            return None
        if row.level == 1 and chunk and (row.gfn - slot.gfn) // _CHUNK != (chunk[0] - slot.gfn) // _CHUNK:
            return None
        for root in self.roots:
            table, at = self.entry(root, row.gfn, row.level)
            word = table.entries.get(at)
            mine = self.as_id(root) == row.as_id and row.root in (0, self.name(root))
            if not mine or table.level != row.level or table.gfn_of(at) != row.gfn or not isinstance(word, int):
                continue
            new = word
            if row.level > 1:
                new &= ~(WRITABLE | self.mmu_writable)
            elif not self.pml:
                new &= ~WRITABLE
            changes = new != word or (self.pml and row.level == 1)
            old, to = expect.leaf(word, self.kernel), expect.leaf(new, self.kernel)
            if self.present(word) and changes and old.fits(row.old) and to.fits(row.new):
                return table, at
        return None
