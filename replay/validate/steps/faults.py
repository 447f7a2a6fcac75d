# SPDX-License-Identifier: Apache-2.0
"""The steps of a fault (docs/kvm-mmu.md, "Page faults"), and the mapping of pages in general."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from errno import EBUSY

from replay.simulate import page_table
from replay.simulate.model_state import CURRENT, Root, Vcpu
from replay.simulate.page_table import Table
from replay.validate import expect
from replay.validate.expect import Activity, Expect, Spte, perhaps
from replay.validate.row_tuples import RowTuple
from replay.validate.steps.vm_state import NO_SLOT, Mapping
from replay.validate.steps.zap_steps import Zaps
from traces.kernels.roles import has_ad_disabled
from traces.kernels.spte import LARGE, WRITABLE, pfn

# Returns the table of the goal level, and the levels at which other threads changed an entry meanwhile; or None.
Descent = Generator[Expect | None, RowTuple | None, tuple[Table, set[int]] | None]


class FaultSteps(Zaps):
    """The steps from a fault's address to its leaf."""

    def fault(self, vcpu: Vcpu, addr: int, code: int) -> Activity:
        """Handle a TDP fault: a cached MMIO SPTE, fast_page_fault without
        mmu_lock, or the full path through kvm_tdp_mmu_map.
        """
        gfn = addr >> 12
        root = vcpu.slots[CURRENT]
        if root is None:
            return
        codes = self.kernel.vendor.fault
        present, write = bool(code & codes.present), bool(code & codes.write)
        if code & codes.reserved:
            found = page_table.leaf(root.top, gfn)
            old = self.mmio(*found) if found else self.nothing
            row = yield self.generation(old)
            if row is not None:
                yield None
            if row is not None and row.code == row.value:
                yield Expect("handle_mmio_page_fault", {"gfn": gfn})
                yield None
                return
        elif present and write and self.fast:
            found = page_table.leaf(root.top, gfn)
            if found is not None:
                table, at = found
                word = table.entries[at]
                assert isinstance(word, int)
                # A page that is read-only for KVM on the host (zero page, COW, KSM) needs a full fault.
                fixable = bool(word & self.mmu_writable) and (
                    table.level == 1 or not self.logged(self.as_id(root), gfn)
                )
                ret = self.kernel.ret_pf.fixed if fixable else self.kernel.ret_pf.invalid
                want = {"root": self.name(root), "addr": addr, "old": expect.leaf(word, self.kernel), "ret": ret}
                if fixable:
                    want["new"] = expect.leaf(word | WRITABLE, self.kernel)
                row = yield Expect("fast_page_fault", want, may_stop=self.tracked[gfn] > 0)
                assert row is not None
                if fixable:
                    table.entries[at] = row.new
                yield None
                if fixable:
                    return
        elif not present and self.fast and has_ad_disabled(self.role(root)):
            # Without A/D bits, access tracking also clears the present bit, so page_fault_can_be_fast() allows a try.
            found = page_table.leaf(root.top, gfn)
            if found is None:
                want = {"root": self.name(root), "addr": addr, "old": self.nothing, "ret": self.kernel.ret_pf.invalid}
                yield Expect("fast_page_fault", want)
                yield None
        yield from self.requested(root, gfn, present, bool(code & codes.fetch))

    def misconfigured(self, vcpu: Vcpu) -> Activity:
        """Handle an EPT misconfiguration: the guest accessed an MMIO SPTE.

        The exit has no address; the SPTE in the row gives it.
        """
        root = vcpu.slots[CURRENT]
        if root is None:
            return
        mmio = Spte("an MMIO SPTE of this root", lambda got: self.mmio_at(root, got) is not None)
        row = yield self.generation(mmio)
        if row is None:
            served = Spte("an MMIO SPTE's guest frame", lambda got: self.made_for_mmio(root, got))
            row = yield Expect("kvm_mmu_spte_requested", {"root": self.name(root), "gfn": served}, may_stop=True)
            assert row is not None
            assert row.gfn is not None
            yield from self.map(Mapping(root, row.gfn), row.level, row.value)
            return
        gfn = self.mmio_at(root, row.old)
        assert gfn is not None
        yield None
        if row.code == row.value:
            yield Expect("handle_mmio_page_fault", {"gfn": gfn})
            yield None
        else:
            yield from self.requested(root, gfn, present=True)

    def generation(self, mmio: Spte) -> Expect:
        """Expect the check of an MMIO SPTE's memslot generation.

        It does not show while memslots change (check_mmio_spte() has no event then, and the fault is served anew), nor
        if the vCPU has the page in its MMIO cache.
        """
        return Expect("check_mmio_spte", {"old": mmio}, optional=bool(self.slots.updates), may_stop=True)

    def made_for_mmio(self, root: Root, gfn: int) -> bool:
        """Return whether a root has an MMIO SPTE for a guest frame."""
        found = page_table.leaf(root.top, gfn)
        word = None if found is None else found[0].entries[found[1]]
        return isinstance(word, int) and not self.present(word)

    def mmio_at(self, root: Root, word: int) -> int | None:
        """Return the guest frame for which a root has this very MMIO SPTE, or None."""
        gfn = self.mmio_words.get(word)
        found = None if gfn is None else page_table.leaf(root.top, gfn)
        return gfn if found is not None and self.mmio(*found).fits(word) else None

    def requested(self, root: Root, gfn: int, present: bool, fetch: bool = False) -> Activity:
        """Handle a fault under mmu_lock: the request (kvm_mmu_spte_requested), then the mapping."""
        want = {"root": self.name(root), "gfn": gfn, "value": self.found(self.as_id(root), gfn)}
        row = yield Expect("kvm_mmu_spte_requested", want, may_stop=True)
        assert row is not None
        unseen = not present and not self.kernel.spte_changed and self.infer(root, gfn)
        yield from self.map(Mapping(root, gfn, fetch), row.level, row.value, unseen)

    def infer(self, root: Root, gfn: int) -> bool:
        """Infer a removal that the kernel does not show (5.10), and return whether there was one.

        A leaf that faults as absent although the model has it was removed, perhaps with its table.
        """
        found = page_table.leaf(root.top, gfn)
        if found is None:
            return False
        del found[0].entries[found[1]]
        self.inferred += 1
        return True

    def map(self, fault: Mapping, goal: int, frame: int, unseen: bool = False) -> Activity:
        """Follow kvm_tdp_mmu_map: tables down to the goal level, then the leaf.

        `unseen` says that something was removed here without an event, so that a table may be built again.

        Faults hold mmu_lock for read, so others may change the same entries meanwhile. A fault that reads an entry
        before such a change and writes to it afterwards loses the race and tries again; so does one that meets a frozen
        entry.
        """
        self.mapping.append(fault)
        try:
            yield from self._map(fault, goal, frame, unseen)
        finally:
            self.mapped(fault)

    def _map(self, fault: Mapping, goal: int, frame: int, unseen: bool) -> Activity:
        raced = yield from self._wait(fault)
        found = yield from self._descend(fault, fault.root.top, goal, unseen, raced)
        while found is not None:
            table, raced = found
            below = table.entries.get(page_table.index(fault.gfn, goal))
            if not isinstance(below, Table) or self.nx_huge_pages is False:
                yield from self.install(fault, table, frame, raced=goal in raced)
                return
            # Where the guest executed from smaller pages the goal is one level lower (disallowed_hugepage_adjust). Old
            # kernels do so at every table; from which version on only there (6.2 or later) was not read in the source.
            made_for_it = self.nx_huge_pages and below.frame in self.executed
            if not made_for_it and (yield from perhaps(self.install(fault, table, frame, raced=goal in raced))):
                return
            span = page_table.span(goal)
            frame = frame & -span | fault.gfn & (span - 1)
            goal -= 1
            found = yield from self._descend(fault, table, goal, unseen, raced)

    def _descend(self, fault: Mapping, table: Table, goal: int, unseen: bool, raced: set[int]) -> Descent:
        """Walk and build tables down to the goal level; return None if the fault lost a race and tries again."""
        root, gfn = fault.root, fault.gfn
        while table.level > goal:
            at = page_table.index(gfn, table.level)
            below = table.entries.get(at)
            child = Table(table.level - 1, gfn)
            level = child.level
            want = {"role": self.child_role(root, level), "level": level + self.kernel.child_level, "flags": 1}
            want["gfn"] = child.gfn
            if isinstance(below, Table) and not unseen:
                if table.level in raced and (yield Expect("kvm_mmu_get_page", want, optional=True)) is not None:
                    yield None
                    return None  # another vCPU linked its table before this one was made: RETRY
                table = below
                continue
            if isinstance(below, int) and not self.parameters.split_in_place:
                yield from self.zap_huge(root, table, at)
                below = table.entries.get(at)
            there = isinstance(below, Table)
            row = yield Expect("kvm_mmu_get_page", want, optional=there, may_stop=table.level in raced)
            if row is None:
                assert isinstance(below, Table)
                table = below
                continue
            child.frame = row.table
            if fault.fetch:
                self.executed.add(child.frame)
            if not self.kernel.spte_changed:
                table.entries[at] = child
                yield None
                table = child
                continue
            yield None
            split: dict[str, object] = {"level": table.level, "gfn": table.gfn_of(at)}
            if isinstance(below, int):
                split["old"] = expect.leaf(below, self.kernel)
            if table.entries.get(at) is not below:
                if isinstance(below, int):
                    yield Expect("kvm_mmu_split_huge_page", {**split, "ret": -EBUSY})
                return None  # another vCPU linked its own table first: RETRY
            yield from self.link(root, table, at, child, may_stop=self.contended(fault, table, at))
            if isinstance(below, int):
                yield None
                yield Expect("kvm_mmu_split_huge_page", {**split, "ret": 0})
            raced = yield from self._wait(fault)
            table = child
        return table, raced

    def _wait(self, fault: Mapping) -> Generator[None, None, set[int]]:
        """Wait for the thread's next row, and return the levels at which
        others changed the entry for the gfn meanwhile.
        """
        before = self._way(fault)
        yield None
        now = self._way(fault)
        return {level for level in before.keys() | now.keys() if before.get(level) != now.get(level)}

    def _way(self, fault: Mapping) -> dict[int, Table | int | None]:
        """Return the entries for the fault's gfn, by level."""
        found: dict[int, Table | int | None] = {}
        table: Table | int | None = fault.root.top
        while isinstance(table, Table):
            level = table.level
            table = found[level] = table.entries.get(page_table.index(fault.gfn, level))
        return found

    def contended(self, fault: Mapping, table: Table, at: int) -> bool:
        """Return whether another fault is about to write to the entry, or may have done so without showing it yet."""
        first = table.gfn_of(at)
        span = page_table.span(table.level)
        return any(
            other is not fault and other.root is fault.root and first <= other.gfn < first + span
            for other in self.mapping
        )

    def mapped(self, fault: Mapping) -> None:
        """Note that a fault has written its leaf, or was given up."""
        if fault in self.mapping:
            self.mapping.remove(fault)

    def zap_huge(self, root: Root, table: Table, at: int) -> Activity:
        """Up to 6.2: zap a huge leaf above the goal level; the walk continues as if there had been nothing."""
        if self.kernel.spte_changed:
            yield from self.zap_entry(root, table, at, shared=False, put=self.zapped())
        else:
            del table.entries[at]

    def link(self, root: Root, table: Table, at: int, child: Table, may_stop: bool = False) -> Activity:
        """Link a child table to the entry; if there was a huge leaf, the child holds its pieces."""
        whole = table.entries.get(at)
        if isinstance(whole, int):
            size = page_table.span(child.level)
            for i in range(page_table.ENTRIES):
                piece = whole + (i * size << 12)
                if child.level == 1:
                    piece = (self.made_executable(piece) if self.nx_huge_pages else piece) & ~LARGE
                child.entries[i] = piece
        yield replace(self.change(root, table, at, expect.to_table(child.frame, self.kernel)), may_stop=may_stop)
        table.entries[at] = child
        if self.kernel.get_page_twice:
            yield None
            want = {"role": self.child_role(root, child.level), "gfn": child.gfn, "table": child.frame}
            yield Expect("kvm_mmu_get_page", want)

    def install(self, fault: Mapping, table: Table, frame: int, raced: bool) -> Activity:
        """Follow tdp_mmu_map_handle_target_level: install the leaf, or an MMIO SPTE if there is no memslot.

        `raced` says that another thread wrote to the entry since this fault's last row, perhaps after this fault had
        read it.
        """
        root, gfn = fault.root, fault.gfn
        at = page_table.index(gfn, table.level)
        mmio = frame == NO_SLOT
        may_stop = raced or self.contended(fault, table, at)
        frame &= -page_table.span(table.level)
        before = table.entries.get(at)
        same = isinstance(before, int) and self.present(before) and pfn(before) == frame and not mmio
        again = isinstance(before, int) and not self.present(before) and mmio
        new = expect.any_mmio(self.kernel) if mmio else expect.to_page(frame, self.kernel)
        place = {"root": self.name(root), "level": table.level, "gfn": table.gfn_of(at)}
        # If the host has merged the pages meanwhile, a huge leaf replaces the table here, which is removed.
        first = isinstance(before, Table) and self.kernel.children_first
        if first:
            assert isinstance(before, Table)
            yield from self.remove_table(root, before, shared=True, may_stop=may_stop)
            may_stop = False
        if self.kernel.spte_changed:
            row = yield replace(self.change(root, table, at, new, optional=same or again), may_stop=may_stop)
            if row is not None:
                self.mapped(fault)
                may_stop = False
                if table.level > 1:
                    self.nx_huge_pages = not self.executable(row.new)
                table.entries[at] = row.new
                if mmio:
                    self.mmio_words[row.new] = gfn
                new = Spte(f"{row.new:#x}", lambda word, installed=row.new: word == installed)  # type: ignore[misc]
                same = False
                yield None
                if isinstance(before, Table) and not first:
                    yield from self.remove_table(root, before, shared=True)
        if mmio:
            want: dict[str, object] = {"root": self.name(root), "gfn": gfn}
            spte = table.entries.get(at)
            if again and spte is before and spte in self.mmio_made:  # unchanged, so of the same generation
                want["value"] = self.mmio_made[spte]
            row = yield Expect("mark_mmio_spte", want)
            if row is not None and isinstance(spte, int):
                self.mmio_made[spte] = row.value
            yield None
        if (not mmio or not self.kernel.spte_changed) and not (same and not self.kernel.set_spte_when_spurious):
            want = {**place, "gfn": gfn if mmio else place["gfn"], "new": new}
            row = yield Expect("kvm_mmu_set_spte", want, may_stop=may_stop)
            if row is not None and not self.kernel.spte_changed:
                table.entries[at] = row.new
            yield None
