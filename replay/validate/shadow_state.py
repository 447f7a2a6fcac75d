# SPDX-License-Identifier: Apache-2.0
"""What `validate` knows of a VM under shadow paging: its pages, by table, gfn and root, and who holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from replay.validate.expect import Spte

ROOTS: Final = 4  # a vCPU's slots: the current root and three before it (KVM_MMU_NUM_PREV_ROOTS)
CREATED, UNSYNC = 1, 2  # of a row's flags
PAE: Final = 3  # level of roots of four page directories, none of which is the root itself
LEVEL: Final = 15
FREE_LEAST: Final = 5  # make_mmu_pages_available zaps the oldest pages where fewer are free
# kvm_mmu_calculate_default_mmu_pages: the least, and thousandths of the memslots' pages.
_LIMIT_LEAST: Final = 64
_PERMILLE: Final = 20


@dataclass(eq=False)
class ShadowPage:
    """A kvm_mmu_page. `role` without the invalid bit, `root` the recording's id of it as a root (0: not known)."""

    gfn: int
    role: int
    table: int
    refs: int = 0
    root: int = 0
    unsync: bool = False
    obsolete: bool = False
    invalid: bool = False
    held: bool = False  # loaded since it was last seen without references, where these are not recorded
    leaves: dict[int, int] = field(default_factory=dict)  # gfn -> page frame, as installed last

    @property
    def level(self) -> int:
        return self.role & LEVEL


@dataclass(eq=False)
class RootSlot:
    """What a vCPU has in a root slot: one page, or the page directories of a PAE root. `root` as recorded."""

    pages: list[ShadowPage]
    root: int
    role: int  # of the load

    @property
    def obsolete(self) -> bool:
        """is_obsolete_root: a root that is no page itself always is."""
        return self.role & LEVEL == PAE or any(page.invalid or page.obsolete for page in self.pages)


@dataclass
class Leaf:
    """The leaf that a fault asked for, and the last of its neighbours that came with it."""

    table: int
    gfn: int
    last: int | None = None


@dataclass
class PagesState:
    """A VM's shadow pages. `active` and `invalid_roots` (zapped while they were roots) by table, the oldest first."""

    invalid_bit: int
    direct_bit: int
    guest_bits: int  # of a role word: those that a root and all pages under it share
    counted: bool  # loads and puts of roots are recorded, hence references known
    # As 5.10 does and 6.1 no more (what is between was not read): a lookup for an upper level syncs unsync pages of its
    # gfn rather than zap them; a switch of page tables rotates an empty current slot as well; kvm_mmu_spte_requested
    # tells the frame of the guest's virtual address, its bits below the guest's page size set in the page frame too.
    old: bool
    vcpus: int = 1
    active: dict[int, ShadowPage] = field(default_factory=dict)
    invalid_roots: dict[int, ShadowPage] = field(default_factory=dict)
    by_gfn: dict[int, list[ShadowPage]] = field(default_factory=dict)  # active pages, the newest first
    by_root: dict[int, ShadowPage] = field(default_factory=dict)
    slots: dict[int, list[RootSlot | None]] = field(default_factory=dict)  # by vCPU: current, three previous
    memslots: dict[tuple[int, int], int] = field(default_factory=dict)  # pages
    limit: int = 0  # of KVM_SET_NR_MMU_PAGES; 0: the default
    generation: int = 0
    destroyed: bool = False
    emptied: bool = False  # kvm_mmu_zap_all has begun
    lookups: int = 0
    zaps: int = 0  # whose cause is the guest's
    turns: int = 0  # in and out of sync, likewise
    puts: int = 0  # final zaps of roots whose put is not recorded
    counts: int = 0  # references that are not known
    neighbours: int = 0  # leaves that nobody asked for

    # What is there

    def find(self, gfn: int, role: int) -> ShadowPage | None:
        """kvm_mmu_find_shadow_page, obsolete pages passed over."""
        return next((p for p in self.by_gfn.get(gfn, ()) if p.role == role and not p.obsolete), None)

    def in_the_way(self, gfn: int, role: int) -> ShadowPage | None:
        """An unsync page of the gfn that a lookup for an upper level does not leave as it is."""
        if role & LEVEL == 1:
            return None
        if self.old and self.find(gfn, role) is not None:
            return None
        for page in self.by_gfn.get(gfn, ()):
            if page.role == role and not page.obsolete:
                return None
            if page.unsync and not page.obsolete and page.role != role:
                return page
        return None

    @property
    def used(self) -> int:
        return len(self.active) + len(self.invalid_roots)

    @property
    def available(self) -> int:
        """How many more pages the VM may have."""
        default = max(_LIMIT_LEAST, sum(self.memslots.values()) * _PERMILLE // 1000)
        return max((self.limit or default) - self.used, 0)

    @property
    def short(self) -> bool:
        """Whether the next fault or load zaps the oldest pages first."""
        return self.available < FREE_LEAST

    def slots_of(self, vcpu: int) -> list[RootSlot | None]:
        return self.slots.setdefault(vcpu, [None] * ROOTS)

    def want(self, page: ShadowPage) -> dict[str, Any]:
        """A page's columns as its events must have them."""
        role = page.role | (self.invalid_bit if page.invalid else 0)
        want: dict[str, Any] = {"gfn": page.gfn, "role": role, "level": page.level, "table": page.table}
        want["flags"] = UNSYNC * page.unsync
        if page.root:
            want["root"] = page.root
        if self.counted or not page.held or page.invalid:
            want["refs"] = page.refs
        else:
            # A vCPU has a page in one of its slots at most: with two, the first would have been taken for the second.
            want["refs"] = self._up_to(self.vcpus)
        return want

    @staticmethod
    def _up_to(most: int) -> Spte:
        return Spte(f"0 to {most}", lambda got: 0 <= got <= most)
