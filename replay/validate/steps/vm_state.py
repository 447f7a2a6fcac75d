# SPDX-License-Identifier: Apache-2.0
"""The state of one VM in the conformance check, and the value that is expected in an entry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakSet

from replay.simulate.model_state import Root, Vcpu
from replay.simulate.page_table import Table
from replay.validate import expect
from replay.validate.expect import Expect, Spte
from replay.validate.steps.slot_lookup import SlotLookup
from traces.kernels import Kernel
from traces.kernels.policies import PolicyParameters

NO_SLOT: Final = 1 << 63  # KVM_PFN_NOSLOT
# Guest frames of memslots that KVM makes for itself, without an ioctl: the APIC page, and on Intel the identity map and
# the TSS of guests in real mode, at the addresses where QEMU and kvmtool put them.
_PRIVATE: Final = frozenset([0xFEE00, *range(0xFFFBC, 0xFFFC0), *range(0xFEFFC, 0xFF000)])


@dataclass(eq=False)
class Mapping:
    """A fault that holds mmu_lock and is about to map a guest frame. `fetch` says that the guest executes from it."""

    root: Root
    gfn: int
    fetch: bool = False


@dataclass(eq=False)
class RootWalk:
    """A walk over the roots for several memslots in turn, whose references may show in rows of other threads.

    `more` says that visits of roots are still to come; `between` that the next visit may have begun without a row yet.
    """

    more: bool = False
    between: bool = False


@dataclass
class State:
    """The state of one VM as `validate` knows it."""

    parameters: PolicyParameters
    kernel: Kernel
    nothing: Spte  # an entry that maps nothing
    frozen: Spte  # an entry whose table is being removed
    invalid_bit: int  # the role word's invalid bit
    smm_bit: int  # the lowest bit of the role word's smm field
    wp_bit: int = 0  # the role word's bit for the guest's CR0.WP; 0 on kernels without it
    nx_bit: int = 0  # the role word's bit for the guest's EFER.NX; 0 on kernels without it
    guest_mode_bit: int = 0
    direct_bit: int = 0
    words: dict[int, int] = field(default_factory=dict)  # index of the role in the model -> role word
    roots: list[Root] = field(default_factory=list)  # newest first, as the kernel's list
    recorded: dict[int, Root] = field(default_factory=dict)  # by the recording's root id
    names: dict[int, int] = field(default_factory=dict)  # model root id -> the recording's
    frames: dict[int, int] = field(default_factory=dict)  # model root id -> page frame
    vcpus: dict[int, Vcpu] = field(default_factory=dict)
    slots: SlotLookup = field(default_factory=SlotLookup)
    eager_split: bool = True  # the module parameter eager_page_split is on
    pml: bool = False  # the processor logs dirty pages; KVM then clears the dirty bit, not the W bit
    nx_huge_pages: bool | None = None  # huge leaves are not executable; None: not known until one is installed
    executed: set[int] = field(default_factory=set)  # page frames of tables that were built because the guest executes
    tracked: Counter[int] = field(default_factory=Counter)  # guest frames whose writes are emulated (tables of L1)
    mapping: list[Mapping] = field(default_factory=list)  # faults, until they have written their leaf
    walks: WeakSet[RootWalk] = field(default_factory=WeakSet)  # each lives as long as the activity that makes it
    capable: bool = False  # KVM_ENABLE_CAP was called, perhaps for KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
    initially_set: bool | None = None  # whether KVM_DIRTY_LOG_INITIALLY_SET was requested; None: not known yet
    slot_zap: bool | None = None  # removing a slot zaps only its leaves; None: not known until one is removed
    taken: dict[str, int] = field(default_factory=dict)  # numbers of facts taken from the recording, not predicted
    queued: list[Root] = field(default_factory=list)  # roots queued for the zap worker
    scheduled: set[int] = field(default_factory=set)  # invalid roots whose zap is due
    removed: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # frames to be freed: (role, level, gfn)
    mmio_words: dict[int, int] = field(default_factory=dict)  # MMIO SPTEs -> the guest frames they were made for
    mmio_made: dict[int, int] = field(default_factory=dict)  # MMIO SPTEs -> the memslot generation in them
    base: int | None = None  # the role word of the VM's first root, smm bits off
    smm: set[int] = field(default_factory=set)  # vCPUs in SMM
    nested: set[int] = field(default_factory=set)  # vCPUs in a nested guest that has no nested paging of its own
    guest: dict[int, int] = field(default_factory=dict)  # by vCPU, the role word's guest bits
    sequence: int = 0  # counts invalidations and notifiers
    destroyed: bool = False
    inferred: int = 0  # removals that no event showed
    role_words_taken: int = 0  # loads whose role word was taken from the recording, not predicted
    _ids: int = 0

    @property
    def mmu_writable(self) -> int:
        """The SPTE bit which says that KVM may make the page writable by itself."""
        return self.kernel.spte.mmu_writable[self.kernel.vendor.paging == "ept"]

    def executable(self, word: int) -> bool:
        """Return whether the guest may execute the page that a leaf maps."""
        return bool(word & 1 << 2) if self.kernel.vendor.paging == "ept" else not word >> 63

    def made_executable(self, word: int) -> int:
        """Return the leaf with the guest allowed to execute."""
        return word | 1 << 2 if self.kernel.vendor.paging == "ept" else word & ~(1 << 63)

    @property
    def guest_bits(self) -> int:
        return self.wp_bit | self.nx_bit

    def guest_bit(self, vcpu: int, bit: int, on: bool) -> None:
        """The guest set or cleared the control bit that `bit` of the role word stands for."""
        if vcpu in self.guest:
            self.guest[vcpu] = self.guest[vcpu] | bit if on else self.guest[vcpu] & ~bit

    def role(self, root: Root) -> int:
        """Return a root's role word as it reads now, with the invalid bit if the root is invalid."""
        return self.words[root.word] | (0 if root.valid else self.invalid_bit)

    def child_role(self, root: Root, level: int) -> int:
        """Return the role word of a child table of `level`, as the kernel records it."""
        return (self.words[root.word] & ~15) | (level + self.kernel.child_level)

    def name(self, root: Root) -> int:
        return self.names.get(root.id, 0)

    def as_id(self, root: Root) -> int:
        return int(bool(self.words[root.word] & self.smm_bit))

    def spte(self, table: Table, at: int) -> Spte:
        """Return the model's content of an entry, which the column `old` must show."""
        entry = table.entries.get(at)
        if entry is None:
            return self.nothing
        if isinstance(entry, Table):
            return expect.to_table(entry.frame, self.kernel)
        return expect.leaf(entry, self.kernel)

    def change(self, root: Root, table: Table, at: int, new: Spte, optional: bool = False) -> Expect:
        """Return the expected event of an entry that changes from the model's content to `new`."""
        place = {"root": self.name(root), "level": table.level, "as_id": self.as_id(root), "gfn": table.gfn_of(at)}
        return Expect("kvm_tdp_mmu_spte_changed", {**place, "old": self.spte(table, at), "new": new}, optional)

    def word_of(self, vcpu: Vcpu) -> int:
        """Return the role word of the vCPU's next load, or 0 if it is not known."""
        if self.base is None or (self.guest_bits and vcpu.index not in self.guest):
            return 0
        word = self.base | self.guest.get(vcpu.index, 0)
        if vcpu.index in self.nested:
            word |= self.guest_mode_bit
        if vcpu.index in self.smm:
            return (word & ~self.nx_bit) | self.smm_bit  # SMM begins with EFER 0
        return word

    def valid(self, role: int) -> Root | None:
        """Return the valid root with a role word, or None."""
        return next((root for root in self.roots if root.valid and self.words[root.word] == role), None)

    def held(self, only_valid: bool = False) -> Iterator[Root]:
        """Yield the roots as the kernel's yielding iterator visits them: newest first, each with a reference meanwhile.

        A caller that continues to the next root must have put the reference; if it stops the iteration, the reference
        is dropped.
        """
        for root in list(self.roots):
            if root in self.roots and (root.valid or not only_valid):
                root.refs += 1
                try:
                    yield root
                except GeneratorExit:
                    root.refs -= 1
                    raise

    def refs_seen(self, root: Root) -> Spte:
        """Return the references that a row may show for a root, including
        those that walks have taken between their rows.
        """
        may = self.may_be_held
        what = f"{root.refs} to {root.refs + may}" if may else f"{root.refs}"
        return Spte(what, lambda got: root.refs <= got <= root.refs + self.may_be_held)

    @property
    def may_be_held(self) -> int:
        """How many references walks may have taken without a row that shows it."""
        return sum(walk.between for walk in self.walks)

    def present(self, entry: Table | int) -> bool:
        """Return whether an entry maps something; an MMIO SPTE does not."""
        return isinstance(entry, Table) or self.kernel.spte.is_present(entry)

    def logged(self, as_id: int, gfn: int) -> bool:
        """Return whether the page is in a memslot whose dirty pages are logged."""
        slot = self.slots.of(as_id, gfn)
        return slot is not None and slot.logged

    def found(self, as_id: int, gfn: int) -> Spte:
        """Return the possible results of a fault's lookup of the memslot and
        the host's page: a page frame, or no memslot.
        """
        none = {slot is None for slot in self.slots.possible(as_id, gfn)}
        own = gfn in _PRIVATE
        what = "a page frame" if none == {False} else "no memslot" if none == {True} else "a page frame or no memslot"
        return Spte(what, lambda got: (got == NO_SLOT) in none or (own and got != NO_SLOT))

    def take(self, what: str) -> None:
        """Count one more fact of this sort that was taken from the recording and not predicted."""
        self.taken[what] = self.taken.get(what, 0) + 1

    @property
    def fast(self) -> bool:
        """Whether the kernel tries faults without mmu_lock first."""
        return self.kernel.fast

    def mmio(self, table: Table, at: int) -> Spte:
        """Return the MMIO SPTE that the model has in an entry."""
        return self.spte(table, at)

    def page(self, frame: int) -> Spte:
        """Return a leaf that maps a page frame."""
        return expect.to_page(frame, self.kernel)

    def read_dirty_log(self) -> None:
        """KVM_GET_DIRTY_LOG: nothing to do here, `report` does it once the first event says which slot it was for."""
