"""The steps of a fault (docs/kvm-mmu.md, "Page faults"), and of mapping by other hands."""

from __future__ import annotations

from replay.simulate import page_table
from replay.simulate.page_table import Table
from replay.simulate.reference import CURRENT, Root, Vcpu
from replay.validate import expect
from replay.validate.expect import Activity, Expect, Spte
from replay.validate.zap_steps import Zaps
from traces.kernels.spte import LARGE, WRITABLE, pfn


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
            row = yield Expect("check_mmio_spte", {"old": old}, may_stop=True)
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
                row = yield Expect("fast_page_fault", want)
                assert row is not None
                if fixable:
                    table.entries[at] = row.new
                yield None
                if fixable:
                    return
        yield from self.requested(root, gfn, present)

    def misconfigured(self, vcpu: Vcpu) -> Activity:
        """An EPT misconfiguration: the guest accessed an MMIO SPTE. Which one, the exit does not say: its SPTE does."""
        root = vcpu.slots[CURRENT]
        if root is None:
            return
        mmio = Spte("an MMIO SPTE of this root", lambda got: self.mmio_at(root, got) is not None)
        row = yield Expect("check_mmio_spte", {"old": mmio}, may_stop=True)
        assert row is not None
        gfn = self.mmio_at(root, row.old)
        assert gfn is not None
        yield None
        if row.code == row.value:
            yield Expect("handle_mmio_page_fault", {"gfn": gfn})
            yield None
        else:
            yield from self.requested(root, gfn, present=True)

    def mmio_at(self, root: Root, word: int) -> int | None:
        """The guest frame that a root has this very MMIO SPTE for."""
        gfn = self.mmio_words.get(word)
        found = None if gfn is None else page_table.leaf(root.top, gfn)
        return gfn if found is not None and self.mmio(*found).fits(word) else None

    def requested(self, root: Root, gfn: int, present: bool) -> Activity:
        """The fault's way under mmu_lock: what it is about to map, and the mapping."""
        row = yield Expect("kvm_mmu_spte_requested", {"root": self.name(root), "gfn": gfn}, may_stop=True)
        assert row is not None
        unseen = not present and not self.kernel.spte_changed and self.infer(root, gfn)
        yield None
        yield from self.map(root, gfn, row.level, row.value, unseen)

    def infer(self, root: Root, gfn: int) -> bool:
        """5.10 shows no notifier: a leaf that faults as absent was removed unseen, perhaps with its table."""
        found = page_table.leaf(root.top, gfn)
        if found is None:
            return False
        del found[0].entries[found[1]]
        self.inferred += 1
        return True

    def map(self, root: Root, gfn: int, goal: int, frame: int, unseen: bool = False) -> Activity:
        """kvm_tdp_mmu_map: tables downwards to the goal level, then the leaf.

        `unseen`: something was removed here that no event showed, so that a table may be built anew.
        """
        table = root.top
        while table.level > goal:
            at = page_table.index(gfn, table.level)
            below = table.entries.get(at)
            if isinstance(below, Table) and not unseen:
                table = below
                continue
            if isinstance(below, int) and not self.parameters.split_in_place:
                yield from self.zap_huge(root, table, at)
            child = Table(table.level - 1, gfn)
            level = child.level
            want = {"role": self.child_role(root, level), "level": level + self.kernel.child_level, "flags": 1}
            row = yield Expect("kvm_mmu_get_page", {**want, "gfn": child.gfn}, optional=isinstance(below, Table))
            if row is None:
                assert isinstance(below, Table)
                table = below
                continue
            child.frame = row.table
            if not self.kernel.spte_changed:
                table.entries[at] = child
                yield None
                table = child
                continue
            yield None
            if table.entries.get(at) is not below:
                return  # another vCPU linked its own table first: RETRY
            yield from self.link(root, table, at, child)
            table = child
        yield from self.install(root, table, gfn, frame)

    def zap_huge(self, root: Root, table: Table, at: int) -> Activity:
        """To 6.2 a huge leaf above the goal is zapped, and the walk goes on as if there had been nothing."""
        if self.kernel.spte_changed:
            yield from self.zap_entry(root, table, at, shared=False, put=self.zapped())
        else:
            del table.entries[at]

    def link(self, root: Root, table: Table, at: int, child: Table) -> Activity:
        """The entry points to the child from now on; where it was a huge leaf, the child holds its pieces."""
        whole = table.entries.get(at)
        if isinstance(whole, int):
            size = page_table.span(child.level)
            for i in range(page_table.ENTRIES):
                piece = whole + (i * size << 12)
                child.entries[i] = piece if child.level > 1 else piece & ~LARGE
        yield self.change(root, table, at, expect.to_table(child.frame, self.kernel))
        table.entries[at] = child
        yield None
        if self.kernel.get_page_twice:
            want = {"role": self.child_role(root, child.level), "gfn": child.gfn, "table": child.frame}
            yield Expect("kvm_mmu_get_page", want)
            yield None

    def install(self, root: Root, table: Table, gfn: int, frame: int) -> Activity:
        """tdp_mmu_map_handle_target_level: the leaf, or an MMIO SPTE where no memslot is."""
        at = page_table.index(gfn, table.level)
        mmio = self.slot_of(self.as_id(root), gfn) is None
        frame &= -page_table.span(table.level)
        before = table.entries.get(at)
        same = isinstance(before, int) and self.present(before) and pfn(before) == frame and not mmio
        new = expect.any_mmio(self.kernel) if mmio else expect.to_page(frame, self.kernel)
        place = {"root": self.name(root), "level": table.level, "gfn": table.gfn_of(at)}
        if self.kernel.spte_changed:
            row = yield self.change(root, table, at, new, optional=same)
            if row is not None:
                table.entries[at] = row.new
                if mmio:
                    self.mmio_words[row.new] = gfn
                new = Spte(f"{row.new:#x}", lambda word, installed=row.new: word == installed)  # type: ignore[misc]
                same = False
                yield None
                if isinstance(before, Table):
                    yield from self.remove_table(root, before, shared=True)
        if mmio:
            yield Expect("mark_mmio_spte", {"root": self.name(root), "gfn": gfn})
            yield None
        if (not mmio or not self.kernel.spte_changed) and not (same and not self.kernel.set_spte_when_spurious):
            row = yield Expect("kvm_mmu_set_spte", {**place, "gfn": gfn if mmio else place["gfn"], "new": new})
            if row is not None and not self.kernel.spte_changed:
                table.entries[at] = row.new
            yield None
