"""The steps of dirty logging: huge leaves split, leaves write-protected, tables collapsed; and of notifiers."""

from __future__ import annotations

from replay.simulate import page_table
from replay.simulate.page_table import Table
from replay.simulate.reference import Root
from replay.validate import expect
from replay.validate.expect import Activity, Expect
from replay.validate.faults import FaultSteps
from replay.validate.roots import Roots
from replay.validate.vm_state import Memslot
from traces.kernels.spte import WRITABLE, pfn


class KernelSteps(Roots, FaultSteps):
    """All that the recorded kernel does of its own accord or at the host's bidding, for one VM."""

    def unmap(self, start: int, end: int) -> Activity:
        """An MMU notifier: host addresses become guest frames by each memslot that they overlap."""
        if not self.kernel.spte_changed:
            return
        self.sequence += 1
        for slot, first, last in self.overlaps(start, end):
            for root in self.held():
                if self.as_id(root) == slot.as_id:
                    yield from self.zap_leafs(root, first, last)
                yield from self.put(root)

    def log_on(self, slot: Memslot) -> Activity:
        """A slot's dirty pages are logged from now on: huge leaves are split (eager_page_split), all protected."""
        if not self.kernel.spte_changed:
            return
        for root in self.held(only_valid=True):
            if self.as_id(root) == slot.as_id:
                yield from self.split(root, slot)
            yield from self.put(root)
        for root in self.held(only_valid=True):
            if self.as_id(root) == slot.as_id:
                yield from self.write_protect(root, slot.gfn, slot.end)
            yield from self.put(root)

    def split(self, root: Root, slot: Memslot) -> Activity:
        """kvm_tdp_mmu_try_split_huge_pages down to 4 KiB."""
        for table, at in page_table.within(root.top, slot.gfn, slot.end):
            whole = table.entries[at]
            if table.level == 1 or not isinstance(whole, int) or not self.present(whole):
                continue
            child = Table(table.level - 1, table.gfn_of(at))
            want = {"role": self.child_role(root, child.level), "level": child.level, "gfn": child.gfn, "flags": 1}
            row = yield Expect("kvm_mmu_get_page", want)
            assert row is not None
            child.frame = row.table
            yield None
            yield from self.link(root, table, at, child)
            old = expect.leaf(whole, self.kernel)
            place = {"level": table.level, "gfn": table.gfn_of(at)}
            yield Expect("kvm_mmu_split_huge_page", {**place, "old": old, "ret": 0})
            yield None

    def write_protect(self, root: Root, start: int, end: int) -> Activity:
        """Each writable leaf in [start, end) loses its W bit."""
        for table, at in list(page_table.within(root.top, start, end)):
            word = table.entries.get(at)
            if not isinstance(word, int) or not self.present(word) or not word & WRITABLE:
                continue
            row = yield self.change(root, table, at, expect.leaf(word & ~WRITABLE, self.kernel))
            assert row is not None
            table.entries[at] = row.new
            yield None

    def log_off(self, slot: Memslot) -> Activity:
        """Tables whose memory the host maps huge go (zap_collapsible_spte_range), or become huge leaves (6.13)."""
        if not self.kernel.spte_changed:
            return
        for root in self.held(only_valid=True):
            if self.as_id(root) == slot.as_id:
                for table, at in list(page_table.within(root.top, slot.gfn, slot.end)):
                    child = table.entries.get(at)
                    if not isinstance(child, Table) or child.level != 1:
                        continue
                    pages = [word for word in child.entries.values() if isinstance(word, int) and self.present(word)]
                    if pages:
                        yield from self.collapse(root, table, at, pfn(pages[0]))
            yield from self.put(root)

    def collapse(self, root: Root, table: Table, at: int, frame: int) -> Activity:
        """Whether the host maps this range huge only the recording can tell: its first event decides."""
        child = table.entries[at]
        assert isinstance(child, Table)
        put = self.zapped()
        if self.kernel.recovers:
            put = expect.to_page(frame & -page_table.span(table.level), self.kernel)
        activity = self.zap_entry(root, table, at, shared=True, put=put)
        first = next(activity)
        assert first is not None
        row = yield Expect(first.kind, first.want, optional=True)
        if row is None:
            activity.close()
            return
        wanted: Expect | None = activity.send(row)
        while True:
            row = yield wanted
            try:
                wanted = activity.send(row)
            except StopIteration:
                return

    def clear_dirty(self, slot: Memslot) -> Activity:
        """KVM_GET_DIRTY_LOG: the pages reported, which are the writable ones, are write-protected, 64 at a time."""
        for start in range(slot.gfn, slot.end, 64):
            for root in self.roots:
                if self.as_id(root) == slot.as_id:
                    yield from self.write_protect(root, start, min(start + 64, slot.end))
