# SPDX-License-Identifier: Apache-2.0
"""The steps of KVM's shadow MMU for pages that shadow a guest's own page tables: lookups in the hash, creation, zaps.

docs/kvm-mmu.md, "The shadow MMU", explains them. The guest decides which page is looked up (gfn, role word, level), so
that is taken from the recording. What the kernel does with it is predicted. That is possible with certainty, as `struct
kvm_mmu_page` changes only under mmu_lock held for write: whether the page exists, which table it has, its references,
and whether it is in sync; that a page is zapped once, and in the order of the list of active pages where a walk of that
list zaps it; that a root which is zapped stays, invalid, until its last put zaps it again.

Links between pages have no event. So which unsync pages are zapped with the page above them is taken from the
recording, and so are zaps that are caused by the guest's writes to its page tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from replay.simulate.model_state import CURRENT
from replay.simulate.operations import PREFETCH
from replay.validate.expect import Activity, Expect, Spte
from replay.validate.row_tuples import RowTuple
from replay.validate.steps.shadow_state import CREATED, LEVEL, PAE, ROOTS, Leaf, PagesState, RootSlot, ShadowPage
from traces.kernels.spte import WRITABLE, pfn

_HELD_MOST: Final = ROOTS  # the most pages that a vCPU holds: in its slots, or the four directories of its PAE root
_REFILL: Final = 25  # make_mmu_pages_available zaps until this many pages are free


class Pages(PagesState):
    """The kernel's steps on a VM's shadow pages."""

    # Lookups

    def lookup(self, row: RowTuple, load: bool, below: int, beside: int) -> Activity:
        """Follow kvm_mmu_get_page: a page is found or created.

        `load` says that it is looked up as a root. `below` is the level that a fault's lookups have reached; it is 0
        for the first lookup of a fault or load, before which pages are recycled if too few are free. `beside` is the
        role word of the root in use, or 0 if it is not known.
        """
        assert row.gfn is not None
        hidden = self.in_the_way(row.gfn, row.role)
        if hidden is not None:
            yield Expect("kvm_mmu_sync_page" if self.old else "kvm_mmu_prepare_zap_page", self.want(hidden))
        if not below and self.short:
            oldest = next((p for p in self.active.values() if not p.refs and not p.held), None)
            if oldest is not None:
                yield Expect("kvm_mmu_prepare_zap_page", self.want(oldest))
        page = self.find(row.gfn, row.role)
        if page is None:
            fresh = Spte(
                "a table that is not in use", lambda got: got not in self.active and got not in self.invalid_roots
            )
            want: dict[str, Any] = {"level": row.role & LEVEL, "flags": CREATED, "refs": 0, "table": fresh}
        else:
            want = self.want(page)
            if load and not self.counted and page.held:
                want["refs"] = self._up_to(self.vcpus - 1)  # this vCPU would not look up a page that it holds
        if below:
            want["level"] = Spte(f"a level below {below}", lambda got: got == row.role & LEVEL and got < below)
        if beside:
            like = Spte(f"a word of root {beside:#x}", lambda got: not (got ^ beside) & self.guest_bits)
            want["role"] = like
        got = yield Expect("kvm_mmu_get_page", want, agrees=lambda new: self._named(new, page))
        assert got is not None
        self.lookups += 1
        if page is None:
            page = ShadowPage(row.gfn, row.role, got.table)
            self.active[got.table] = page
            self.by_gfn.setdefault(row.gfn, []).insert(0, page)
        self._name(page, got.root)
        page.held |= load and not self.counted
        yield None

    def _named(self, row: RowTuple, page: ShadowPage | None) -> bool:
        """Return whether a row's root id belongs to this page and no other, and its role word has no invalid bit."""
        return not row.role & self.invalid_bit and (not row.root or self.by_root.get(row.root, page) is page)

    def _name(self, page: ShadowPage, root: int) -> None:
        if root and not page.root:
            page.root = root
            self.by_root[root] = page

    # Roots

    def load(self, vcpu: int, pages: list[ShadowPage]) -> Activity:
        """Follow kvm_mmu_load at its return: the pages that it looked up are the current root from now on."""
        top = pages[-1]
        whole = len(pages) == 1
        if top.level < PAE:
            whole = len(pages) <= ROOTS
            if top.role & self.direct_bit:  # one directory for each of the guest's first four GiB
                whole = [page.gfn for page in pages] == [quarter << 18 for quarter in range(ROOTS)]
        if not whole:
            yield Expect("kvm_mmu_get_page", {"level": top.level})
        want: dict[str, Any] = {"ret": 0}
        if top.level > PAE:
            want["role"] = top.role
            if top.root:
                want["root"] = top.root
        else:
            want["role"] = Spte(
                f"a PAE root of {top.role:#x}",
                lambda got: got & LEVEL == PAE and not (got ^ top.role) & self.guest_bits,
            )
        row = yield Expect("mmu_load", want)
        assert row is not None
        for page in pages:
            page.refs += 1
        self.slots_of(vcpu)[CURRENT] = RootSlot(pages, row.root, row.role)
        yield None

    def switch(self, vcpu: int, pgd: int, role: int) -> Activity:
        """Follow kvm_mmu_new_pgd: a slot with that page table becomes current,
        or the least recently used one is emptied.
        """
        slots = self.slots_of(vcpu)
        if slots[CURRENT] is None and not self.old:
            at = next((i for i in range(1, ROOTS) if self._usable(slots[i], pgd, role)), 0)
            if at:
                slots[:] = [slots[at], *slots[1:at], *slots[at + 1 :], None]
            return
        if role & LEVEL > PAE and all(slot is None or slot.role & LEVEL > PAE for slot in slots):
            if self._usable(slots[CURRENT], pgd, role):
                return
            for i in range(1, ROOTS):
                slots[CURRENT], slots[i] = slots[i], slots[CURRENT]
                if self._usable(slots[CURRENT], pgd, role):
                    return
        yield from self.free(vcpu, 1 << CURRENT)

    def _usable(self, slot: RootSlot | None, pgd: int, role: int) -> bool:
        """Follow is_root_usable: a zapped page has the invalid bit in its role word, which makes its root unusable."""
        if slot is None or slot.role & LEVEL <= PAE:
            return False
        page = slot.pages[0]
        return not page.invalid and page.role == role and bool(role & self.direct_bit or page.gfn == pgd >> 12)

    def free_obsolete(self, vcpu: int) -> Activity:
        """Follow kvm_mmu_free_obsolete_roots."""
        mask = sum(1 << i for i, slot in enumerate(self.slots_of(vcpu)) if slot is not None and slot.obsolete)
        if mask:
            yield from self.free(vcpu, mask)

    def free(self, vcpu: int, mask: int | None = None) -> Activity:
        """Follow kvm_mmu_free_roots: previous slots in order, then the current one.

        An invalid root is zapped with its last put.

        `mask` are the slots that must be emptied; without it, the recording says which.
        """
        slots = self.slots_of(vcpu)
        current = slots[CURRENT]
        want: dict[str, Any] = {"root": 0 if current is None else current.root}
        if mask is not None:
            want["value"] = Spte(f"slots {mask:#x}", lambda got: got & (1 << ROOTS) - 1 == mask)
        row = yield Expect("mmu_free_roots", want)
        assert row is not None
        freed = [(i, slots[i]) for i in (1, 2, 3, CURRENT) if row.value >> i & 1]
        if not row.role & ~self.invalid_bit:
            freed = []  # these are slots of the vCPU's other context, for nested guests
        for i, _ in freed:
            slots[i] = None
        yield None
        for page in [page for _, slot in freed if slot is not None for page in slot.pages]:
            want = self.want(page)
            want = {column: want[column] for column in ("root", "role", "table", "refs") if column in want}
            row = yield Expect("root_put", want, agrees=_of(self, page))
            assert row is not None
            self._name(page, row.root)
            page.refs -= 1
            yield None
            if not page.refs and page.invalid:
                yield from self.zap(page)

    # Zaps

    def zap(self, page: ShadowPage) -> Activity:
        """Follow __kvm_mmu_prepare_zap_page: zap the page and the unsync pages below it.

        A page that was unsync is synced.
        """
        row = yield Expect("kvm_mmu_prepare_zap_page", self.want(page), agrees=_still(self, page))
        assert row is not None
        yield from self._zapped(page, row)

    def _zapped(self, page: ShadowPage, row: RowTuple) -> Activity:
        want = self.want(page)  # the row of the page's sync has the role word from before it became invalid
        unsync, page.unsync = page.unsync, False
        if page.invalid:
            del self.invalid_roots[page.table]
            self.by_root.pop(page.root, None)
        else:
            del self.active[page.table]
            self.by_gfn[page.gfn].remove(page)
            self._name(page, row.root)
            self.counts += page.held
            page.refs = row.refs
            page.invalid = True
            if page.refs:
                self.invalid_roots[page.table] = page
            else:
                self.by_root.pop(page.root, None)
        yield None
        while page.level > 1:
            child = yield Expect("kvm_mmu_prepare_zap_page", {"table": Spte("an unsync page", self._unsync)}, True)
            if child is None:
                break
            self.zaps += 1
            below = self.active[child.table]
            why = Expect("kvm_mmu_prepare_zap_page", self.want(below)).misfit(child)
            if why:
                yield Expect("kvm_mmu_prepare_zap_page", self.want(below))
            yield from self._zapped(below, child)
        if unsync:
            yield Expect("kvm_mmu_sync_page", want)
            yield None

    def _unsync(self, table: int) -> bool:
        page = self.active.get(table)
        return page is not None and page.unsync

    def zap_all(self) -> Activity:
        """Follow kvm_mmu_zap_all, as the VM's process ends: pages are zapped newest first."""
        self.emptied = True
        while self.active:
            yield from self.zap(next(reversed(self.active.values())))

    def zap_obsolete(self) -> Activity:
        """Follow kvm_zap_obsolete_pages: pages are zapped oldest first, up to the first of this generation."""
        while (oldest := next(iter(self.active.values()), None)) is not None and oldest.obsolete:
            yield from self.zap(oldest)

    def invalidate(self) -> Activity:
        """Follow kvm_mmu_zap_all_fast: no page that exists now is found by a lookup any more."""
        self.generation ^= 1
        for page in self.active.values():
            page.obsolete = True
        return self.zap_obsolete()

    def recycle(self) -> Activity:
        """Follow make_mmu_pages_available: pages are zapped oldest first, except roots that have references."""
        goal = self.used - (_REFILL - self.available)
        passed = 0
        for page in list(self.active.values()):
            if self.used <= goal:
                return
            if page.refs or page.table not in self.active:
                continue
            want = self.want(page) | {"refs": 0}
            may_be_held = page.held and passed < _HELD_MOST * self.vcpus
            row = yield Expect("kvm_mmu_prepare_zap_page", want, may_be_held, agrees=_still(self, page))
            if row is None:
                passed += 1
            else:
                page.held = False
                yield from self._zapped(page, row)

    def last_put(self, page: ShadowPage) -> Activity:
        """Model the last put of an invalid root if puts are not recorded: it zaps the page."""
        page.refs = 0
        self.puts += 1
        return self.zap(page)

    def given_up(self, page: ShadowPage) -> Activity:
        """Zap a page because of the guest: it wrote to the page table, or the contents cannot be synced."""
        self.zaps += 1
        return self.zap(page)

    # In and out of sync

    def out_of_sync(self, page: ShadowPage) -> Activity:
        """Follow kvm_unsync_page: the guest may write to the page table from now on."""
        yield Expect("kvm_mmu_unsync_page", self.want(page))
        self.turns += 1
        page.unsync = True
        yield None

    def in_sync(self, page: ShadowPage) -> Activity:
        """Follow kvm_unlink_unsync_page, for a flush or a lookup."""
        yield Expect("kvm_mmu_sync_page", self.want(page))
        self.turns += 1
        page.unsync = False
        yield None

    # Leaves

    def install(self, page: ShadowPage, asked: RowTuple | None, beside: Leaf | None) -> Activity:
        """Follow mmu_set_spte: the requested leaf (`asked`), or a neighbour of the leaf `beside`.

        In a direct page the neighbours are those of an aligned group of 8 that the host has, in ascending order
        (direct_pte_prefetch); in others the guest's entries say which. A page that the guest may write to from now on
        is not a page table, or one that is out of sync (mmu_try_to_unsync_pages).
        """
        span = 1 << 9 * (page.level - 1)
        want: dict[str, Any] = {"level": page.level}
        if page.role & self.direct_bit:
            end = page.gfn + 512 * span
            want["gfn"] = Spte(f"{page.gfn:#x} to {end:#x}", lambda got: page.gfn <= got < end)
        if asked is not None:
            want["new"] = Spte(f"leaf of page {asked.value:#x}", lambda got: self.answers(pfn(got), asked, page.level))
            if not self.old:
                want |= {"gfn": (asked.gfn or 0) & -span, "level": asked.level}
        else:
            self.neighbours += 1
        if asked is None and beside is not None and page.role & self.direct_bit and page.table == beside.table:
            start = beside.gfn & -PREFETCH
            least = start if beside.last is None else beside.last + 1
            near = range(least, start + PREFETCH if page.level == 1 else least)
            want["gfn"] = Spte(f"another of {near}", lambda got: got in near and got != beside.gfn)
        row = yield Expect("kvm_mmu_set_spte", want, agrees=lambda new: not new.new & WRITABLE or self._open(new.gfn))
        assert row is not None
        assert row.gfn is not None
        page.leaves[row.gfn] = pfn(row.new)
        yield None

    def _open(self, gfn: int | None) -> bool:
        shadows = [page for page in self.by_gfn.get(gfn or 0, ()) if not page.role & self.direct_bit]
        return all(page.unsync or page.obsolete for page in shadows)

    def answers(self, frame: int, asked: RowTuple, level: int) -> bool:
        """Return whether a leaf with this page frame is the one that kvm_mmu_spte_requested announced."""
        if self.old:
            return frame | (asked.gfn or 0) & (1 << 9 * (asked.level - 1)) - 1 == asked.value
        return frame == asked.value & -(1 << 9 * (level - 1))

    def has_leaf(self, asked: RowTuple) -> bool:
        """Return whether the requested leaf was there before; the fault then shows no kvm_mmu_set_spte."""
        return any(
            self.answers(page.leaves[gfn], asked, page.level)
            for page in self.active.values()
            for gfn in (page.leaves if self.old else ((asked.gfn or 0) & -(1 << 9 * (page.level - 1)),))
            if gfn in page.leaves
        )


def _still(pages: Pages, page: ShadowPage) -> Callable[[RowTuple], bool]:
    """Return a condition: no other thread has zapped the page before this one."""
    return lambda row: (pages.invalid_roots if page.invalid else pages.active).get(page.table) is page


def _of(pages: Pages, page: ShadowPage) -> Callable[[RowTuple], bool]:
    """Return a condition: a row's root is that of the page, or not known yet."""
    return lambda row: pages.by_root.get(row.root, page) is page
