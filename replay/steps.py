"""What KVM does step by step, as activities that foretell each event of a thread (see `expect`).

The model's own state (`model.Root`, `model.Vcpu`, `tree`) is changed at the step at which the kernel changes its own.
Sections named are those of the project's reference document.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from replay import expect, tree
from replay.axes import Axes
from replay.expect import Activity, Expect, Spte
from replay.model import CURRENT, Root, Vcpu
from replay.rows import Row
from replay.shapes import PRESENT, WRITABLE, Shape, pfn
from replay.tree import Table

Step = Generator[Expect | None, Row | None, Row]
Zapped = Generator[Expect | None, Row | None, None]


@dataclass
class Slot:
    """A memslot: `hva` in bytes, `logged` if its dirty pages are."""

    as_id: int
    slot: int
    gfn: int
    pages: int
    hva: int
    logged: bool

    @property
    def end(self) -> int:
        return self.gfn + self.pages


@dataclass
class Machine:
    """One VM as `validate` knows it, and the steps of its kernel."""

    axes: Axes
    shape: Shape
    vendor: str
    nothing: Spte  # an entry that maps nothing
    frozen: Spte  # an entry whose table is being removed
    invalid_bit: int  # of the role word
    smm_bit: int  # lowest bit of the role word's smm field
    wp_bit: int = 0  # of the role word, where the guest's CR0.WP and EFER.NX are in it
    nx_bit: int = 0
    words: dict[int, int] = field(default_factory=dict)  # model word index -> role word
    roots: list[Root] = field(default_factory=list)  # newest first, as the kernel's list
    recorded: dict[int, Root] = field(default_factory=dict)  # by the recording's root id
    names: dict[int, int] = field(default_factory=dict)  # model root id -> the recording's
    frames: dict[int, int] = field(default_factory=dict)  # model root id -> page frame
    vcpus: dict[int, Vcpu] = field(default_factory=dict)
    slots: dict[tuple[int, int], Slot] = field(default_factory=dict)
    queued: list[Root] = field(default_factory=list)  # for the zap worker
    scheduled: set[int] = field(default_factory=set)  # invalid roots whose zap is due
    removed: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # frames to be freed: (role, level, gfn)
    base: int | None = None  # the role word of the VM's first root, smm bits off
    smm: set[int] = field(default_factory=set)  # vCPUs in SMM
    guest: dict[int, int] = field(default_factory=dict)  # by vCPU, the role word's guest bits
    sequence: int = 0  # moves with each invalidation and notifier
    destroyed: bool = False
    inferred: int = 0  # removals that no event showed
    learned: int = 0  # loads whose role word the trace does not tell beforehand
    _ids: int = 0

    # Helpers

    @property
    def guest_bits(self) -> int:
        return self.wp_bit | self.nx_bit

    def guest_bit(self, vcpu: int, bit: int, on: bool) -> None:
        """The guest set or cleared what a bit of the role word stands for."""
        if vcpu in self.guest:
            self.guest[vcpu] = self.guest[vcpu] | bit if on else self.guest[vcpu] & ~bit

    def role(self, root: Root) -> int:
        """A root's role word as it reads now."""
        return self.words[root.word] | (0 if root.valid else self.invalid_bit)

    def child_role(self, root: Root, level: int) -> int:
        """The role word of a child table of `level`, as the kernel records it."""
        return (self.words[root.word] & ~15) | (level + self.shape.child_level)

    def name(self, root: Root) -> int:
        return self.names.get(root.id, 0)

    def as_id(self, root: Root) -> int:
        return int(bool(self.words[root.word] & self.smm_bit))

    def spte(self, table: Table, at: int) -> Spte:
        """What the model holds in an entry, to be met in `old`."""
        entry = table.entries.get(at)
        if entry is None:
            return self.nothing
        if isinstance(entry, Table):
            return expect.to_table(entry.frame)
        return expect.leaf(entry, self.vendor)

    def word_of(self, vcpu: Vcpu) -> int:
        """The role word that the vCPU's next load is of; 0 if there was none yet to learn it from."""
        if self.base is None or (self.guest_bits and vcpu.index not in self.guest):
            return 0
        word = self.base | self.guest.get(vcpu.index, 0)
        if vcpu.index in self.smm:
            return (word & ~self.nx_bit) | self.smm_bit  # SMM begins with EFER 0
        return word

    # Roots (section 3)

    def load(self, vcpu: Vcpu) -> Activity:
        """kvm_mmu_load: the valid root of the vCPU's role word, or a new one."""
        word = self.word_of(vcpu)
        root = None
        for other in self.held(only_valid=True):
            if self.words[other.word] == word:
                root = other  # the reference is the slot's from now on
                break
            if self.shape.search_puts:
                yield from self.put(other)
            else:
                other.refs -= 1
        role: int | Spte = self.role_of(vcpu, word)
        self.learned += not word
        if root is None and self.shape.root_get_page:
            row = yield Expect("kvm_mmu_get_page", {"gfn": 0, "flags": 1, "role": role}, agrees=top_level)
            assert row is not None
            root = self.new_root(vcpu, row.role, row.root, row.table)
            role = row.role
            yield None
        want = {"role": role} if root is None else {"role": role, "root": self.name(root), "refs": root.refs}
        row = yield Expect("root_get", want, agrees=lambda got: got.refs == self.refs_after(root, got.role))
        assert row is not None
        if root is None and not word:
            root = self.valid(row.role)
            if root is not None:
                root.refs += 1
                self.guest[vcpu.index] = row.role & self.guest_bits
        root = root or self.new_root(vcpu, row.role, row.root, 0)
        vcpu.slots[CURRENT] = root
        yield None
        yield Expect("mmu_load", {"root": self.name(root), "role": self.words[root.word], "ret": 0})
        yield None

    def valid(self, role: int) -> Root | None:
        """The valid root of a role word."""
        return next((root for root in self.roots if root.valid and self.words[root.word] == role), None)

    def refs_after(self, root: Root | None, role: int) -> int:
        """References after a load of a role word, which found `root`, or what the word leads to."""
        if root is not None:
            return root.refs
        found = self.valid(role)
        return self.first_refs if found is None else found.refs + 1

    @property
    def first_refs(self) -> int:
        """References on a root just built: the slot's, and the VM's own."""
        return 1 + self.axes.own_reference

    def role_of(self, vcpu: Vcpu, word: int) -> int | Spte:
        """What the role word of a load must be, as far as it is known."""
        if word or self.base is None:
            return word or Spte("a role word", lambda got: True)
        known = self.base | (self.smm_bit if vcpu.index in self.smm else 0)
        return Spte(f"{known:#x} with any guest bits", lambda got: got & ~self.guest_bits == known)

    def new_root(self, vcpu: Vcpu, word: int, name: int, frame: int) -> Root:
        """A root that the kernel has just built."""
        if vcpu.index not in self.guest and vcpu.index not in self.smm:
            self.guest[vcpu.index] = word & self.guest_bits
        if self.base is None:
            self.base = word & ~self.smm_bit & ~self.guest_bits
        if word not in self.words.values():
            self.words[len(self.words)] = word
        index = next(i for i, w in self.words.items() if w == word)
        root = Root(self._ids, index, Table(word & 15, 0, frame), self.first_refs)
        self._ids += 1
        self.roots.insert(0, root)
        self.recorded[name] = root
        self.names[root.id] = name
        self.frames[root.id] = frame
        return root

    def free_slots(self, vcpu: Vcpu, mask: int) -> Activity:
        """kvm_mmu_free_roots (2.1): previous slots in order, then the current one."""
        for i in (1, 2, 3, CURRENT):
            root = vcpu.slots[i]
            if root is not None and mask >> i & 1:
                vcpu.slots[i] = None
                yield from self.put(root)

    def put(self, root: Root) -> Zapped:
        """One reference less; what the last one brings about is the policy (3.1 to 3.5)."""
        row = yield Expect("root_put", {"root": self.name(root), "role": self.role(root), "refs": root.refs})
        assert row is not None
        self.frames[root.id] = row.table
        root.refs -= 1
        if root.refs == 0:
            if root.valid and self.axes.teardown == "worker":
                root.valid = False
                root.refs = 1
                self.queued.append(root)
            elif root.valid and self.axes.teardown == "inline":
                self.roots.remove(root)
                yield None
                yield from self.zap_inline(root)
                return
            else:
                self.gone(root)
        yield None

    def gone(self, root: Root) -> None:
        """Off the list; its page is freed after a grace period."""
        self.roots.remove(root)
        self.removed[self.frames[root.id]] = (self.role(root), root.top.level, 0)

    def zap_inline(self, root: Root) -> Zapped:
        """kvm_tdp_mmu_free_root (3.1): the last putter zaps the tree and frees the page."""
        yield Expect("zap_root_begin", {"root": self.name(root), "role": self.words[root.word]})
        root.top.entries.clear()
        yield None
        freed = {"root": self.name(root), "role": 0, "level": 0, "gfn": 0}  # a bare page: its struct is gone
        yield Expect("table_free", {**freed, "table": self.frames[root.id]})
        yield None
        yield Expect("zap_root_end")
        yield None

    def invalidate(self) -> Activity | None:
        """Every valid root is marked (3.3 to 3.5), or emptied (3.1)."""
        self.sequence += 1
        for root in self.roots:
            if self.axes.invalidate == "empty":
                root.top.entries.clear()
            elif root.valid:
                root.valid = False
                if self.axes.teardown == "worker":
                    root.refs += not self.axes.own_reference
                    self.queued.append(root)
                else:
                    self.scheduled.add(root.id)
        return None

    def worker(self, root: Root) -> Activity:
        """tdp_mmu_zap_root_work: zap one queued root, put the reference it came with."""
        self.queued.remove(root)
        yield from self.zap_root(root, shared=True)
        yield from self.put(root)

    def zap_invalidated(self) -> Activity:
        """kvm_tdp_mmu_zap_invalidated_roots (3.5): roots visited newest first, each with a reference meanwhile."""
        shared = not (self.destroyed and self.shape.ends_exclusively)
        for root in self.held():
            if root.id in self.scheduled:
                self.scheduled.discard(root.id)
                yield from self.zap_root(root, shared)
                yield from self.put(root)
            yield from self.put(root)

    def zap_all(self) -> Activity:
        """kvm_tdp_mmu_zap_all: every root is emptied under mmu_lock held for write; none is invalidated."""
        self.sequence += 1
        for root in self.held():
            if self.shape.changes:
                yield from self.zap_root(root, shared=False)
                yield from self.put(root)
            else:
                root.refs -= 1
                root.top.entries.clear()

    def held(self, only_valid: bool = False) -> Iterator[Root]:
        """Roots as the kernel's yielding iterator visits them: newest first, each with a reference meanwhile."""
        for root in list(self.roots):
            if root in self.roots and (root.valid or not only_valid):
                root.refs += 1
                yield root

    # Zaps (section 5)

    def zap_root(self, root: Root, shared: bool) -> Zapped:
        """tdp_mmu_zap_root (5.1): one pass a level, biggest last."""
        for level in self.shape.passes:
            level = level or root.top.level
            want = {"root": self.name(root), "role": self.role(root), "refs": root.refs, "flags": int(shared)}
            yield Expect("zap_root_begin", {**want, "level": level})
            yield None
            for table in list(_tables(root.top, level)):
                for at in sorted(table.entries):
                    if self.present(table.entries[at]):
                        yield from self.zap_entry(root, table, at, shared)
            yield Expect("zap_root_end", {"root": self.name(root)})
            yield None

    @staticmethod
    def present(entry: Table | int) -> bool:
        """Whether an entry maps something; an MMIO SPTE does not."""
        return isinstance(entry, Table) or bool(entry & PRESENT)

    def zap_entry(self, root: Root, table: Table, at: int, shared: bool, put: Spte | None = None) -> Zapped:
        """One present entry becomes absent (or `put`), with all that is below it (5.2, 5.3)."""
        entry = table.entries[at]
        change = Expect(
            "kvm_tdp_mmu_spte_changed",
            {
                "root": self.name(root),
                "level": table.level,
                "as_id": self.as_id(root),
                "gfn": table.gfn_of(at),
                "old": self.spte(table, at),
                "new": put or self.nothing,
            },
        )
        if not self.shape.children_first or not isinstance(entry, Table):
            yield change
            del table.entries[at]
            yield None
            if isinstance(entry, Table):
                yield from self.remove_table(root, entry, shared)
        else:
            yield from self.remove_table(root, entry, shared)
            row = yield change
            del table.entries[at]
            if put is not None and row is not None and row.new & PRESENT:
                table.entries[at] = row.new
            yield None

    def remove_table(self, root: Root, table: Table, shared: bool) -> Zapped:
        """handle_removed_pt: under mmu_lock held for read every entry is frozen, even absent ones."""
        role = self.child_role(root, table.level)
        yield Expect(
            "kvm_mmu_prepare_zap_page",
            {"role": role, "level": table.level, "gfn": table.gfn, "table": table.frame},
        )
        self.removed[table.frame] = (role, table.level, table.gfn)
        yield None
        for at in range(tree.ENTRIES) if shared else sorted(table.entries):
            entry = table.entries.get(at)
            if not shared and entry is not None and not self.present(entry):
                continue
            change = Expect(
                "kvm_tdp_mmu_spte_changed",
                {
                    "root": self.name(root),
                    "level": table.level,
                    "as_id": self.as_id(root),
                    "gfn": table.gfn_of(at),
                    "old": self.spte(table, at),
                    "new": self.frozen,
                },
            )
            if isinstance(entry, Table) and self.shape.children_first:
                yield from self.remove_table(root, entry, shared)
            yield change
            table.entries.pop(at, None)
            yield None
            if isinstance(entry, Table) and not self.shape.children_first:
                yield from self.remove_table(root, entry, shared)

    def zap_leafs(self, root: Root, start: int, end: int) -> Zapped:
        """tdp_mmu_zap_leafs (5.5): leaves in [start, end) go, tables stay."""
        for table, at in list(tree.within(root.top, start, end)):
            entry = table.entries.get(at)
            if isinstance(entry, int) and self.present(entry):
                yield from self.zap_entry(root, table, at, shared=False)

    def unmap(self, start: int, end: int) -> Activity:
        """An MMU notifier (5.6): host addresses become guest frames by each memslot that they overlap."""
        if not self.shape.changes:
            return
        self.sequence += 1
        for slot, first, last in self.overlaps(start, end):
            for root in self.held():
                if self.as_id(root) == slot.as_id:
                    yield from self.zap_leafs(root, first, last)
                yield from self.put(root)

    def overlaps(self, start: int, end: int) -> list[tuple[Slot, int, int]]:
        """The memslots that host addresses [start, end) overlap, each with the guest frames [first, last) there."""
        return [
            (
                slot,
                slot.gfn + (max(start, slot.hva) - slot.hva >> 12),
                slot.gfn + (min(end, slot.hva + slot.pages * 4096) - slot.hva + 4095 >> 12),
            )
            for slot in sorted(self.slots.values(), key=lambda s: (s.as_id, s.hva))
            if slot.hva < end and start < slot.hva + slot.pages * 4096
        ]

    # Faults (section 4)

    def fault(self, vcpu: Vcpu, addr: int, code: int) -> Activity:
        """A TDP fault: the lockless fix, a cached MMIO SPTE, or the way through kvm_tdp_mmu_map."""
        gfn = addr >> 12
        root = vcpu.slots[CURRENT]
        if root is None:
            return
        present, write, reserved = bool(code & 1), bool(code & 2), bool(code & 8)
        if reserved:
            found = tree.leaf(root.top, gfn)
            old = self.mmio(*found) if found else self.nothing
            row = yield Expect("check_mmio_spte", {"old": old}, may_stop=True)
            yield None
            if row is not None and row.code == row.value:
                yield Expect("handle_mmio_page_fault", {"gfn": gfn})
                yield None
                return
        elif present and write and self.fast:
            found = tree.leaf(root.top, gfn)
            if found is not None:
                table, at = found
                word = table.entries[at]
                assert isinstance(word, int)
                fixable = table.level == 1 or not self.logged(self.as_id(root), gfn)
                ret = self.shape.fixed if fixable else self.shape.invalid
                want = {"root": self.name(root), "addr": addr, "old": expect.leaf(word, self.vendor), "ret": ret}
                if fixable:
                    want["new"] = expect.leaf(word | WRITABLE, self.vendor)
                row = yield Expect("fast_page_fault", want)
                assert row is not None
                if fixable:
                    table.entries[at] = row.new
                yield None
                if fixable:
                    return
        row = yield Expect("kvm_mmu_spte_requested", {"root": self.name(root), "gfn": gfn}, may_stop=True)
        assert row is not None
        unseen = not present and not self.shape.changes and self.infer(root, gfn)
        yield None
        yield from self.map(root, gfn, row.level, row.value, unseen)

    def infer(self, root: Root, gfn: int) -> bool:
        """5.10 shows no notifier: a leaf that faults as absent was removed unseen, perhaps with its table."""
        found = tree.leaf(root.top, gfn)
        if found is None:
            return False
        del found[0].entries[found[1]]
        self.inferred += 1
        return True

    @property
    def fast(self) -> bool:
        """Whether faults are tried without mmu_lock."""
        return self.shape.fast

    def mmio(self, table: Table, at: int) -> Spte:
        """The MMIO SPTE in an entry."""
        return self.spte(table, at)

    def page(self, frame: int) -> Spte:
        """A leaf of a page frame."""
        return expect.to_page(frame)

    def read_dirty_log(self) -> None:
        """KVM_GET_DIRTY_LOG: `clear_dirty` does it, once its first event says which slot."""

    def logged(self, as_id: int, gfn: int) -> bool:
        """Whether the page lies in a memslot whose dirty pages are logged."""
        slot = self.slot_of(as_id, gfn)
        return slot is not None and slot.logged

    def slot_of(self, as_id: int, gfn: int) -> Slot | None:
        return next((s for s in self.slots.values() if s.as_id == as_id and s.gfn <= gfn < s.end), None)

    def map(self, root: Root, gfn: int, goal: int, frame: int, unseen: bool = False) -> Zapped:
        """kvm_tdp_mmu_map (4.2): tables downwards to the goal level, then the leaf.

        `unseen`: something was removed here that no event showed, so that a table may be built anew.
        """
        table = root.top
        while table.level > goal:
            at = tree.index(gfn, table.level)
            below = table.entries.get(at)
            if isinstance(below, Table) and not unseen:
                table = below
                continue
            if isinstance(below, int) and not self.axes.split_in_place:
                yield from self.zap_huge(root, table, at)
            child = Table(table.level - 1, gfn)
            level = child.level
            want = {"role": self.child_role(root, level), "level": level + self.shape.child_level, "flags": 1}
            row = yield Expect("kvm_mmu_get_page", {**want, "gfn": child.gfn}, optional=isinstance(below, Table))
            if row is None:
                assert isinstance(below, Table)
                table = below
                continue
            child.frame = row.table
            if not self.shape.changes:
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

    def zapped(self) -> Spte | None:
        """What a single entry zapped under mmu_lock for read is shown to become; None: nothing."""
        return self.frozen if self.shape.zapped_as_frozen else None

    def zap_huge(self, root: Root, table: Table, at: int) -> Zapped:
        """To 6.2 a huge leaf above the goal is zapped, and the walk goes on as if there had been nothing."""
        if self.shape.changes:
            yield from self.zap_entry(root, table, at, shared=False, put=self.zapped())
        else:
            del table.entries[at]

    def link(self, root: Root, table: Table, at: int, child: Table) -> Zapped:
        """The entry points to the child from now on; where it was a huge leaf, the child holds its pieces."""
        whole = table.entries.get(at)
        if isinstance(whole, int):
            size = tree.span(child.level)
            for i in range(tree.ENTRIES):
                piece = whole + (i * size << 12)
                child.entries[i] = piece if child.level > 1 else piece & ~(1 << 7)
        yield Expect(
            "kvm_tdp_mmu_spte_changed",
            {
                "root": self.name(root),
                "level": table.level,
                "as_id": self.as_id(root),
                "gfn": table.gfn_of(at),
                "old": self.spte(table, at),
                "new": expect.to_table(child.frame),
            },
        )
        table.entries[at] = child
        yield None
        if self.shape.get_page_twice:
            want = {"role": self.child_role(root, child.level), "gfn": child.gfn, "table": child.frame}
            yield Expect("kvm_mmu_get_page", want)
            yield None

    def install(self, root: Root, table: Table, gfn: int, frame: int) -> Zapped:
        """tdp_mmu_map_handle_target_level: the leaf, or an MMIO SPTE where no memslot is."""
        at = tree.index(gfn, table.level)
        mmio = self.slot_of(self.as_id(root), gfn) is None
        frame &= -tree.span(table.level)
        before = table.entries.get(at)
        same = isinstance(before, int) and bool(before & PRESENT) and pfn(before) == frame and not mmio
        new = expect.any_mmio() if mmio else expect.to_page(frame)
        place = {"root": self.name(root), "level": table.level, "gfn": table.gfn_of(at)}
        if self.shape.changes:
            change = {**place, "as_id": self.as_id(root), "old": self.spte(table, at), "new": new}
            row = yield Expect("kvm_tdp_mmu_spte_changed", change, optional=same)
            if row is not None:
                table.entries[at] = row.new
                new = Spte(f"{row.new:#x}", lambda word, installed=row.new: word == installed)  # type: ignore[misc]
                same = False
                yield None
                if isinstance(before, Table):
                    yield from self.remove_table(root, before, shared=True)
        if mmio:
            yield Expect("mark_mmio_spte", {"root": self.name(root), "gfn": gfn})
            yield None
        if (not mmio or not self.shape.changes) and not (same and not self.shape.set_spte_when_spurious):
            row = yield Expect("kvm_mmu_set_spte", {**place, "gfn": gfn if mmio else place["gfn"], "new": new})
            if row is not None and not self.shape.changes:
                table.entries[at] = row.new
            yield None

    # Dirty logging

    def log_on(self, slot: Slot) -> Activity:
        """A slot's dirty pages are logged from now on: huge leaves are split (eager_page_split), all protected."""
        if not self.shape.changes:
            return
        for root in self.held(only_valid=True):
            if self.as_id(root) == slot.as_id:
                yield from self.split(root, slot)
            yield from self.put(root)
        for root in self.held(only_valid=True):
            if self.as_id(root) == slot.as_id:
                yield from self.write_protect(root, slot.gfn, slot.end)
            yield from self.put(root)

    def split(self, root: Root, slot: Slot) -> Zapped:
        """kvm_tdp_mmu_try_split_huge_pages down to 4 KiB."""
        for table, at in tree.within(root.top, slot.gfn, slot.end):
            whole = table.entries[at]
            if table.level == 1 or not isinstance(whole, int) or not whole & PRESENT:
                continue
            child = Table(table.level - 1, table.gfn_of(at))
            want = {"role": self.child_role(root, child.level), "level": child.level, "gfn": child.gfn, "flags": 1}
            row = yield Expect("kvm_mmu_get_page", want)
            assert row is not None
            child.frame = row.table
            yield None
            yield from self.link(root, table, at, child)
            old = expect.leaf(whole, self.vendor)
            place = {"level": table.level, "gfn": table.gfn_of(at)}
            yield Expect("kvm_mmu_split_huge_page", {**place, "old": old, "ret": 0})
            yield None

    def write_protect(self, root: Root, start: int, end: int) -> Zapped:
        """Each writable leaf in [start, end) loses its W bit."""
        for table, at in list(tree.within(root.top, start, end)):
            word = table.entries.get(at)
            if not isinstance(word, int) or not word & PRESENT or not word & WRITABLE:
                continue
            want = {
                "root": self.name(root),
                "level": table.level,
                "as_id": self.as_id(root),
                "gfn": table.gfn_of(at),
                "old": expect.leaf(word, self.vendor),
                "new": expect.leaf(word & ~WRITABLE, self.vendor),
            }
            row = yield Expect("kvm_tdp_mmu_spte_changed", want)
            assert row is not None
            table.entries[at] = row.new
            yield None

    def log_off(self, slot: Slot) -> Activity:
        """Tables whose memory the host maps huge go (zap_collapsible_spte_range), or become huge leaves (6.13)."""
        if not self.shape.changes:
            return
        for root in self.held(only_valid=True):
            if self.as_id(root) == slot.as_id:
                for table, at in list(tree.within(root.top, slot.gfn, slot.end)):
                    child = table.entries.get(at)
                    if not isinstance(child, Table) or child.level != 1:
                        continue
                    pages = [word for word in child.entries.values() if isinstance(word, int) and word & PRESENT]
                    if pages:
                        yield from self.collapse(root, table, at, pfn(pages[0]))
            yield from self.put(root)

    def collapse(self, root: Root, table: Table, at: int, frame: int) -> Zapped:
        """Whether the host maps this range huge only the recording can tell: its first event decides."""
        child = table.entries[at]
        assert isinstance(child, Table)
        put = self.zapped()
        if self.shape.recovers:
            put = expect.to_page(frame & -tree.span(table.level))
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

    def clear_dirty(self, slot: Slot) -> Activity:
        """KVM_GET_DIRTY_LOG: the pages reported, which are the writable ones, are write-protected, 64 at a time."""
        for start in range(slot.gfn, slot.end, 64):
            for root in self.roots:
                if self.as_id(root) == slot.as_id:
                    yield from self.write_protect(root, start, min(start + 64, slot.end))


def top_level(row: Row) -> bool:
    """A root's level is its role's."""
    return row.level == row.role & 15


def _tables(table: Table, level: int) -> Iterator[Table]:
    """The tables of one level below (or at) `table`, in order of gfn."""
    if table.level == level:
        yield table
        return
    for at in sorted(table.entries):
        below = table.entries[at]
        if isinstance(below, Table):
            yield from _tables(below, level)
