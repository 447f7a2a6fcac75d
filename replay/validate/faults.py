# SPDX-License-Identifier: Apache-2.0
"""The steps of a fault (docs/kvm-mmu.md, "Page faults"), and of mapping by other hands."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from errno import EBUSY

from replay.simulate import page_table
from replay.simulate.page_table import Table
from replay.simulate.reference import CURRENT, Root, Vcpu
from replay.validate import expect
from replay.validate.expect import Activity, Expect, Spte, perhaps
from replay.validate.row_tuples import RowTuple
from replay.validate.vm_state import NO_SLOT, Mapping
from replay.validate.zap_steps import Zaps
from traces.kernels.roles import has_ad_disabled
from traces.kernels.spte import LARGE, WRITABLE, pfn

# A table of the goal level, and the levels that were changed by others meanwhile.
Descent = Generator[Expect | None, RowTuple | None, tuple[Table, set[int]] | None]


class FaultSteps(Zaps):
    """From the fault's address to the leaf."""

    def fault(self, vcpu: Vcpu, addr: int, code: int) -> Activity:
        """A TDP fault: fast_page_fault without mmu_lock, a cached MMIO SPTE, or the way through kvm_tdp_mmu_map."""
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
                # A page that the host lets KVM only read (zero page, COW, KSM) takes a full fault.
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
            # Without A/D bits an access that is tracked looks like this, too: page_fault_can_be_fast() lets it try.
            found = page_table.leaf(root.top, gfn)
            if found is None:
                want = {"root": self.name(root), "addr": addr, "old": self.nothing, "ret": self.kernel.ret_pf.invalid}
                yield Expect("fast_page_fault", want)
                yield None
        yield from self.requested(root, gfn, present, bool(code & codes.fetch))

    def misconfigured(self, vcpu: Vcpu) -> Activity:
        """An EPT misconfiguration: the guest accessed an MMIO SPTE. Which one, the exit does not say: its SPTE does."""
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
        """The memslots' generation of an MMIO SPTE is compared with the VM's, except while memslots change.

        check_mmio_spte() shows nothing then, and the fault is served anew; nor where the vCPU has the page cached.
        """
        return Expect("check_mmio_spte", {"old": mmio}, optional=bool(self.slots.updates), may_stop=True)

    def made_for_mmio(self, root: Root, gfn: int) -> bool:
        """Whether a root has an MMIO SPTE for a guest frame."""
        found = page_table.leaf(root.top, gfn)
        word = None if found is None else found[0].entries[found[1]]
        return isinstance(word, int) and not self.present(word)

    def mmio_at(self, root: Root, word: int) -> int | None:
        """The guest frame that a root has this very MMIO SPTE for."""
        gfn = self.mmio_words.get(word)
        found = None if gfn is None else page_table.leaf(root.top, gfn)
        return gfn if found is not None and self.mmio(*found).fits(word) else None

    def requested(self, root: Root, gfn: int, present: bool, fetch: bool = False) -> Activity:
        """The fault's way under mmu_lock: what it is about to map, and the mapping."""
        want = {"root": self.name(root), "gfn": gfn, "value": self.found(self.as_id(root), gfn)}
        row = yield Expect("kvm_mmu_spte_requested", want, may_stop=True)
        assert row is not None
        unseen = not present and not self.kernel.spte_changed and self.infer(root, gfn)
        yield from self.map(Mapping(root, gfn, fetch), row.level, row.value, unseen)

    def infer(self, root: Root, gfn: int) -> bool:
        """5.10 shows no notifier: a leaf that faults as absent was removed unseen, perhaps with its table."""
        found = page_table.leaf(root.top, gfn)
        if found is None:
            return False
        del found[0].entries[found[1]]
        self.inferred += 1
        return True

    def map(self, fault: Mapping, goal: int, frame: int, unseen: bool = False) -> Activity:
        """kvm_tdp_mmu_map: tables downwards to the goal level, then the leaf.

        `unseen`: something was removed here that no event showed, so that a table may be built anew.

        Faults hold mmu_lock for read, so that others may change the same entries meanwhile. Who read an entry before
        that and writes to it after has lost, and tries again; so has who meets a frozen entry.
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
            # Where the guest executed from smaller pages the goal is one level less (disallowed_hugepage_adjust); from
            # 6.2 or later on (not read) only there, before that at every table.
            made_for_it = self.nx_huge_pages and below.frame in self.executed
            if not made_for_it and (yield from perhaps(self.install(fault, table, frame, raced=goal in raced))):
                return
            span = page_table.span(goal)
            frame = frame & -span | fault.gfn & (span - 1)
            goal -= 1
            found = yield from self._descend(fault, table, goal, unseen, raced)

    def _descend(self, fault: Mapping, table: Table, goal: int, unseen: bool, raced: set[int]) -> Descent:
        """Tables downwards to the goal level; None: the fault lost a race, and tries again."""
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
        """Wait for the thread's next row. The levels whose entry on the way was changed by others meanwhile."""
        before = self._way(fault)
        yield None
        now = self._way(fault)
        return {level for level in before.keys() | now.keys() if before.get(level) != now.get(level)}

    def _way(self, fault: Mapping) -> dict[int, Table | int | None]:
        """The entries on the way to a guest frame, by level."""
        found: dict[int, Table | int | None] = {}
        table: Table | int | None = fault.root.top
        while isinstance(table, Table):
            level = table.level
            table = found[level] = table.entries.get(page_table.index(fault.gfn, level))
        return found

    def contended(self, fault: Mapping, table: Table, at: int) -> bool:
        """Whether another fault is about to write to the entry: it may have done so already, and not shown it yet."""
        first = table.gfn_of(at)
        span = page_table.span(table.level)
        return any(
            other is not fault and other.root is fault.root and first <= other.gfn < first + span
            for other in self.mapping
        )

    def mapped(self, fault: Mapping) -> None:
        """A fault has written its leaf, or was given up."""
        if fault in self.mapping:
            self.mapping.remove(fault)

    def zap_huge(self, root: Root, table: Table, at: int) -> Activity:
        """To 6.2 a huge leaf above the goal is zapped, and the walk goes on as if there had been nothing."""
        if self.kernel.spte_changed:
            yield from self.zap_entry(root, table, at, shared=False, put=self.zapped())
        else:
            del table.entries[at]

    def link(self, root: Root, table: Table, at: int, child: Table, may_stop: bool = False) -> Activity:
        """The entry points to the child from now on; where it was a huge leaf, the child holds its pieces."""
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
        """tdp_mmu_map_handle_target_level: the leaf, or an MMIO SPTE where no memslot is.

        `raced`: another wrote to the entry since this fault's last row, perhaps after this one had read it.
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
        # A table in the place of a huge leaf (the host has merged its pages since) goes with it.
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
            if again and spte is before and spte in self.mmio_made:  # not changed: of the same generation
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
