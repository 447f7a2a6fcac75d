# SPDX-License-Identifier: Apache-2.0
"""What `validate` knows of a VM under shadow paging: its pages by table,
gfn and root, and which vCPUs hold them as roots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from replay.validate.expect import Spte

ROOTS: Final = 4  # a vCPU's slots: the current root and three previous ones (KVM_MMU_NUM_PREV_ROOTS)
CREATED, UNSYNC = 1, 2  # bits of the column `flags`
PAE: Final = 3  # the level of a root with four page directories, which is not a page itself
LEVEL: Final = 15  # the level's bits in a role word
FREE_LEAST: Final = 5  # make_mmu_pages_available zaps the oldest pages if fewer than this are free
# kvm_mmu_calculate_default_mmu_pages: the minimum, and the share of the memslots' pages in thousandths.
_LIMIT_LEAST: Final = 64
_PERMILLE: Final = 20


@dataclass(eq=False)
class ShadowPage:
    """A kvm_mmu_page. `role` is without the invalid bit; `root` is its id as a root in the recording (0: unknown)."""

    gfn: int
    role: int
    table: int
    refs: int = 0
    root: int = 0
    unsync: bool = False
    obsolete: bool = False
    invalid: bool = False
    held: bool = False  # may have references: it was loaded, and puts are not recorded
    leaves: dict[int, int] = field(default_factory=dict)  # gfn -> page frame that was installed last

    @property
    def level(self) -> int:
        return self.role & LEVEL


@dataclass(eq=False)
class RootSlot:
    """A root in a vCPU's slot: one page, or the page directories of a PAE root. `root` is the recorded id."""

    pages: list[ShadowPage]
    root: int
    role: int  # the role word with which it was loaded

    @property
    def obsolete(self) -> bool:
        """Follow is_obsolete_root: a PAE root, which is not a page itself, always is obsolete."""
        return self.role & LEVEL == PAE or any(page.invalid or page.obsolete for page in self.pages)


@dataclass
class Leaf:
    """The leaf that a fault requested, and the last of its neighbours that was prefetched with it."""

    table: int
    gfn: int
    last: int | None = None


@dataclass
class PagesState:
    """A VM's shadow pages. `active` and `invalid_roots` (zapped while they were roots) are by table, oldest first."""

    invalid_bit: int
    direct_bit: int
    guest_bits: int  # the bits of a role word that a root and all pages below it share
    counted: bool  # loads and puts of roots are recorded, so references are known
    # Whether the kernel behaves like 5.10 and not like 6.1 (the versions between were not read): a lookup for an upper
    # level syncs unsync pages of its gfn instead of zapping them; a switch of page tables rotates an empty current slot
    # as well; kvm_mmu_spte_requested shows the frame of the guest-virtual address, and its low bits in the page frame.
    old: bool
    vcpus: int = 1
    active: dict[int, ShadowPage] = field(default_factory=dict)
    invalid_roots: dict[int, ShadowPage] = field(default_factory=dict)
    by_gfn: dict[int, list[ShadowPage]] = field(default_factory=dict)  # active pages, the newest first
    by_root: dict[int, ShadowPage] = field(default_factory=dict)
    slots: dict[int, list[RootSlot | None]] = field(default_factory=dict)  # by vCPU: current, three previous
    memslots: dict[tuple[int, int], int] = field(default_factory=dict)  # by (address space, slot): number of pages
    limit: int = 0  # the page limit set by KVM_SET_NR_MMU_PAGES; 0: the default
    generation: int = 0
    destroyed: bool = False
    emptied: bool = False  # kvm_mmu_zap_all has begun
    lookups: int = 0
    zaps: int = 0  # zaps that the guest caused
    turns: int = 0  # times that the guest made a page unsync, or in sync again
    puts: int = 0  # final zaps of roots whose put is not recorded
    counts: int = 0  # zaps of pages whose references are not known
    neighbours: int = 0  # leaves other than requested ones

    # Queries

    def find(self, gfn: int, role: int) -> ShadowPage | None:
        """Follow kvm_mmu_find_shadow_page: return the page that is not obsolete, or None."""
        return next((p for p in self.by_gfn.get(gfn, ()) if p.role == role and not p.obsolete), None)

    def in_the_way(self, gfn: int, role: int) -> ShadowPage | None:
        """Return the unsync page of this gfn that a lookup for an upper level syncs or zaps first, or None."""
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
        """Return the columns that a page's events must show."""
        role = page.role | (self.invalid_bit if page.invalid else 0)
        want: dict[str, Any] = {"gfn": page.gfn, "role": role, "level": page.level, "table": page.table}
        want["flags"] = UNSYNC * page.unsync
        if page.root:
            want["root"] = page.root
        if self.counted or not page.held or page.invalid:
            want["refs"] = page.refs
        else:
            # A vCPU has a page in at most one of its slots: it would have reused that slot instead of loading again.
            want["refs"] = self._up_to(self.vcpus)
        return want

    @staticmethod
    def _up_to(most: int) -> Spte:
        return Spte(f"0 to {most}", lambda got: 0 <= got <= most)
