"""What the conformance check knows of one VM, and what it would expect to meet in an entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from replay.simulate.page_table import Table
from replay.simulate.reference import Root, Vcpu
from replay.validate import expect
from replay.validate.expect import Expect, Spte
from traces.kernels import Kernel
from traces.kernels.policies import PolicyParameters


@dataclass
class Memslot:
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
class State:
    """One VM as `validate` knows it."""

    parameters: PolicyParameters
    kernel: Kernel
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
    slots: dict[tuple[int, int], Memslot] = field(default_factory=dict)
    queued: list[Root] = field(default_factory=list)  # for the zap worker
    scheduled: set[int] = field(default_factory=set)  # invalid roots whose zap is due
    removed: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # frames to be freed: (role, level, gfn)
    mmio_words: dict[int, int] = field(default_factory=dict)  # MMIO SPTEs -> the guest frames they were made for
    base: int | None = None  # the role word of the VM's first root, smm bits off
    smm: set[int] = field(default_factory=set)  # vCPUs in SMM
    guest: dict[int, int] = field(default_factory=dict)  # by vCPU, the role word's guest bits
    sequence: int = 0  # moves with each invalidation and notifier
    destroyed: bool = False
    inferred: int = 0  # removals that no event showed
    role_words_taken: int = 0  # loads whose role word the trace does not tell beforehand
    _ids: int = 0

    @property
    def mmu_writable(self) -> int:
        """The bit of an SPTE whose page KVM may make writable by itself."""
        return self.kernel.spte.mmu_writable[self.kernel.vendor.paging == "ept"]

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
        return (self.words[root.word] & ~15) | (level + self.kernel.child_level)

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
            return expect.to_table(entry.frame, self.kernel)
        return expect.leaf(entry, self.kernel)

    def change(self, root: Root, table: Table, at: int, new: Spte, optional: bool = False) -> Expect:
        """The event of an entry that becomes `new`, from what the model holds in it."""
        place = {"root": self.name(root), "level": table.level, "as_id": self.as_id(root), "gfn": table.gfn_of(at)}
        return Expect("kvm_tdp_mmu_spte_changed", {**place, "old": self.spte(table, at), "new": new}, optional)

    def word_of(self, vcpu: Vcpu) -> int:
        """The role word that the vCPU's next load is of; 0 if there was none yet to learn it from."""
        if self.base is None or (self.guest_bits and vcpu.index not in self.guest):
            return 0
        word = self.base | self.guest.get(vcpu.index, 0)
        if vcpu.index in self.smm:
            return (word & ~self.nx_bit) | self.smm_bit  # SMM begins with EFER 0
        return word

    def valid(self, role: int) -> Root | None:
        """The valid root of a role word."""
        return next((root for root in self.roots if root.valid and self.words[root.word] == role), None)

    def held(self, only_valid: bool = False) -> Iterator[Root]:
        """Roots as the kernel's yielding iterator visits them: newest first, each with a reference meanwhile."""
        for root in list(self.roots):
            if root in self.roots and (root.valid or not only_valid):
                root.refs += 1
                yield root

    def present(self, entry: Table | int) -> bool:
        """Whether an entry maps something; an MMIO SPTE does not."""
        return isinstance(entry, Table) or self.kernel.spte.is_present(entry)

    def overlaps(self, start: int, end: int) -> list[tuple[Memslot, int, int]]:
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

    def logged(self, as_id: int, gfn: int) -> bool:
        """Whether the page lies in a memslot whose dirty pages are logged."""
        slot = self.slot_of(as_id, gfn)
        return slot is not None and slot.logged

    def slot_of(self, as_id: int, gfn: int) -> Memslot | None:
        return next((s for s in self.slots.values() if s.as_id == as_id and s.gfn <= gfn < s.end), None)

    @property
    def fast(self) -> bool:
        """Whether faults are tried without mmu_lock."""
        return self.kernel.fast

    def mmio(self, table: Table, at: int) -> Spte:
        """The MMIO SPTE in an entry."""
        return self.spte(table, at)

    def page(self, frame: int) -> Spte:
        """A leaf of a page frame."""
        return expect.to_page(frame, self.kernel)

    def read_dirty_log(self) -> None:
        """KVM_GET_DIRTY_LOG: `clear_dirty` does it, once its first event says which slot."""
