# SPDX-License-Identifier: Apache-2.0
"""The steps of KVM's shadow MMU in direct mode (`kvm.tdp_mmu=0`): a VM's pages are in one hash, roots among them.

docs/kvm-mmu.md, "The shadow MMU", explains them. Few of these steps have an event: links, removals by notifiers and
write protection show only in what later faults find.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from replay.simulate import page_table
from replay.simulate.model_state import CURRENT, Root, Vcpu
from replay.simulate.operations import PREFETCH
from replay.simulate.page_table import Table
from replay.validate import expect
from replay.validate.expect import Activity, Expect
from replay.validate.steps.kernel_steps import KernelSteps
from replay.validate.steps.roots import top_level
from replay.validate.steps.slot_lookup import Memslot
from replay.validate.steps.vm_state import NO_SLOT, Mapping, RootWalk
from traces.kernels.spte import WRITABLE, pfn


@dataclass(eq=False)
class DirectPage:
    """A kvm_mmu_page: its table, its role word, and the entries that point to it. `root` is set once it was loaded."""

    table: Table
    role: int
    parents: list[tuple[Table, int]] = field(default_factory=list)
    root: Root | None = None


@dataclass
class ShadowSteps(KernelSteps):
    """The steps of `KernelSteps` as the shadow MMU does them. `pages` are the active pages, oldest first."""

    pages: list[DirectPage] = field(default_factory=list)

    def child_role(self, root: Root, level: int) -> int:
        return (self.words[root.word] & ~15) | level

    @property
    def fast(self) -> bool:
        return True

    def find(self, gfn: int, role: int) -> DirectPage | None:
        """Return the active page with this gfn and role word, or None."""
        return next((page for page in self.pages if page.role == role and page.table.gfn == gfn), None)

    def load(self, vcpu: Vcpu) -> Activity:
        """Follow mmu_alloc_direct_roots: the page of gfn 0 with the vCPU's role word is found or created."""
        word = self.word_of(vcpu)
        page = self.find(0, word) if word else None
        found = page.root if page is not None else None
        want = {"gfn": 0, "role": self.role_of(vcpu, word)}
        if word:
            want |= {"flags": int(page is None), "refs": found.refs if found else 0}
        if found is not None:
            want["root"] = self.name(found)
        row = yield Expect("kvm_mmu_get_page", want, agrees=top_level)
        assert row is not None
        self.role_words_taken += not word
        if page is None and not word:
            page = self.find(0, row.role)
            found = page.root if page is not None else None
            if found is not None:
                self.guest[vcpu.index] = row.role & self.guest_bits
        if found is None:
            found = self.new_root(vcpu, row.role, row.root, row.table)
            found.refs = 0
            self.pages.append(DirectPage(found.top, row.role, root=found))
        found.refs += 1
        vcpu.slots[CURRENT] = found
        yield None
        yield Expect("mmu_load", {"root": self.name(found), "role": self.words[found.word], "ret": 0})
        yield None

    def put(self, root: Root, walk: RootWalk | None = None) -> Activity:
        """Follow mmu_free_root_page: a root that nobody holds stays in the hash, unless it was zapped meanwhile.

        `walk` is not used: notifiers use the reverse maps and do not walk roots.
        """
        role = self.role(root)
        yield Expect("root_put", {"root": self.name(root), "role": role, "refs": root.refs})
        root.refs -= 1
        yield None
        if root.refs == 0 and not root.valid:
            want = {"root": self.name(root), "role": role, "level": root.top.level, "gfn": 0, "table": root.top.frame}
            yield Expect("kvm_mmu_prepare_zap_page", {**want, "refs": 0})
            self.roots.remove(root)
            yield None

    def invalidate(self) -> Activity:
        """Follow kvm_mmu_zap_all_fast: every page becomes obsolete and is zapped, oldest first."""
        self.sequence += 1
        return self.zap_pages(list(self.pages))

    def zap_all(self) -> Activity:
        """Follow kvm_mmu_zap_all: pages are zapped newest first."""
        self.sequence += 1
        return self.zap_pages(self.pages[::-1])

    def zap_pages(self, pages: list[DirectPage]) -> Activity:
        """Follow __kvm_mmu_prepare_zap_page for each page: a loaded root
        becomes invalid and stays until its last put.
        """
        for page in pages:
            refs = page.root.refs if page.root is not None else 0
            want = {"role": page.role, "level": page.table.level, "gfn": page.table.gfn, "table": page.table.frame}
            yield Expect("kvm_mmu_prepare_zap_page", {**want, "refs": refs})
            self.pages.remove(page)
            for table, at in page.parents:
                if table.entries.get(at) is page.table:
                    del table.entries[at]
            page.table.entries.clear()
            if page.root is not None:
                page.root.valid = False
                if not refs:
                    self.roots.remove(page.root)
            yield None

    def zap_invalidated(self) -> Activity:
        return _silent()

    def map(self, fault: Mapping, goal: int, frame: int, unseen: bool = False) -> Activity:
        """Follow direct_map: pages from the hash or new ones downwards, the leaf, and neighbours that the host has."""
        root, gfn = fault.root, fault.gfn
        yield None
        table = root.top
        while table.level > goal:
            at = page_table.index(gfn, table.level)
            below = table.entries.get(at)
            if isinstance(below, Table):
                table = below
                continue
            level = table.level - 1
            role = self.child_role(root, level)
            start = gfn & -(page_table.span(level) * page_table.ENTRIES)
            page = self.find(start, role)
            want = {"role": role, "level": level, "gfn": start, "flags": int(page is None)}
            if page is not None:
                want["table"] = page.table.frame
            row = yield Expect("kvm_mmu_get_page", want)
            assert row is not None
            if page is None:
                page = DirectPage(Table(level, gfn, row.table), role)
                self.pages.append(page)
            table.entries[at] = page.table
            page.parents.append((table, at))
            yield None
            table = page.table
        yield from self.leaf(root, table, gfn, frame)

    def leaf(self, root: Root, table: Table, gfn: int, frame: int) -> Activity:
        """Follow mmu_set_spte and direct_pte_prefetch, which fills absent entries
        of the aligned group of 8 if the host has them.
        """
        at = page_table.index(gfn, table.level)
        if frame == NO_SLOT:
            yield Expect("mark_mmio_spte", {"root": self.name(root), "gfn": gfn})
            table.entries[at] = self.kernel.spte.some_mmio  # only 5.10 has an event with the SPTE's actual word
            yield None
            if not self.kernel.spte_changed:
                yield Expect(
                    "kvm_mmu_set_spte", {"gfn": gfn, "new": expect.any_mmio(self.kernel), "table": table.frame}
                )
                yield None
            return
        frame &= -page_table.span(table.level)
        before = table.entries.get(at)
        same = isinstance(before, int) and self.present(before) and pfn(before) == frame
        place = {"root": self.name(root), "level": table.level}
        want = {**place, "gfn": table.gfn_of(at), "new": self.page(frame), "table": table.frame}
        row = yield Expect("kvm_mmu_set_spte", want, optional=same)
        if row is None:
            return
        table.entries[at] = row.new
        yield None
        base = at & -PREFETCH
        for near in range(base, base + PREFETCH) if table.level == 1 else ():
            if near in table.entries or self.slots.of(self.as_id(root), table.gfn_of(near)) is None:
                continue
            want = {**place, "gfn": table.gfn_of(near), "table": table.frame}
            row = yield Expect("kvm_mmu_set_spte", want, optional=True)
            if row is not None:
                table.entries[near] = row.new
                yield None

    def mmio(self, table: Table, at: int) -> expect.Spte:
        return expect.any_mmio(self.kernel)

    def unmap(self, start: int, end: int) -> Activity:
        """An MMU notifier zaps the SPTEs in the reverse maps of the range, without an event."""
        self.sequence += 1
        for slot, first, last, _ in self.slots.overlaps(start, end):
            for table, at in self.leaves(slot.as_id, first, last):
                del table.entries[at]
        return _silent()

    def leaves(self, as_id: int, start: int, end: int) -> list[tuple[Table, int]]:
        """Return the present leaves in [start, end) of an address space."""
        return [
            (page.table, at)
            for page in self.pages
            if bool(page.role & self.smm_bit) == bool(as_id)
            for at, entry in list(page.table.entries.items())
            if isinstance(entry, int) and self.present(entry) and start <= page.table.gfn_of(at) < end
        ]

    def log_on(self, slot: Memslot) -> Activity:
        """Write-protect a slot whose dirty pages are logged from now on; there is no event."""
        self.protect(slot)
        return _silent()

    def log_off(self, slot: Memslot) -> Activity:
        return _silent()

    def protect(self, slot: Memslot) -> None:
        """Clear the W bit of each leaf in the slot."""
        for table, at in self.leaves(slot.as_id, slot.gfn, slot.end):
            entry = table.entries[at]
            assert isinstance(entry, int)
            table.entries[at] = entry & ~WRITABLE

    def read_dirty_log(self) -> None:
        """KVM_GET_DIRTY_LOG: write-protect all logged slots, since the trace does not say which slot it was for."""
        for slot in self.slots:
            if slot.logged:
                self.protect(slot)


def _silent() -> Activity:
    """Return an activity that shows no event; its effects on the model took place already."""
    yield from ()
