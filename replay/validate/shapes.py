"""How each kernel shows in events what its MMU does: the dated table behind `validate`. Dated 2026-11.

What a kernel does is in `kernels`; here is only what of it can be seen, in which order, and with which words. Source:
reference/kvm-mmu.md 4.2 to 4.5 and 5, checked against recordings of 5.10.262, 6.1.192, 6.12.107 and 7.3-rc7.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

PRESENT: Final = 1 << 11  # 5.12 and later
WRITABLE: Final = 1 << 1
LARGE: Final = 1 << 7
_PFN: Final = (1 << 52) - (1 << 12)
# Accessed and dirty bits, which the processor sets by itself: of AMD's tables (5, 6) and of Intel's (8, 9).
_ACCESSED_DIRTY: Final = {"AuthenticAMD": 3 << 5, "GenuineIntel": 3 << 8}


@dataclass(frozen=True)
class Shape:
    """One stretch of kernel versions, from `since` on."""

    since: tuple[int, int]
    # A TDP root's creation is a kvm_mmu_get_page (5.13).
    root_get_page: bool = True
    # kvm_tdp_mmu_spte_changed, kvm_mmu_prepare_zap_page for TDP tables, the freeing of child tables (5.12).
    changes: bool = True
    # kvm_mmu_get_page fires before the link and once more after it (5.13 to 5.17).
    get_page_twice: bool = False
    # A child's recorded level is one too high (5.10 took it from the entry that points to the child).
    child_level: int = 0
    # The levels that a root's zap goes through, one pass each; 0 stands for the root's own.
    passes: tuple[int, ...] = (3, 0)
    # A removed entry is shown after what was below it (7.x), not before.
    children_first: bool = False
    # kvm_mmu_set_spte fires for a fault that found its leaf already there.
    set_spte_when_spurious: bool = True
    # The return codes of fast_page_fault.
    invalid: int = 3
    fixed: int = 4
    # Ended dirty logging puts a huge leaf in place of a table (6.13), rather than nothing.
    recovers: bool = False
    # fast_page_fault exists for TDP roots (5.12).
    fast: bool = True
    # The guest's CR0.WP and EFER.NX are in a TDP root's role word (to 5.18).
    guest_bits: bool = False
    # A load searches the roots with references taken and put on the way (6.9), not under mmu_lock for write.
    search_puts: bool = False
    # A single entry that is zapped under mmu_lock for read is shown as frozen (to 6.8), not as absent.
    zapped_as_frozen: bool = False
    # At the VM's end roots are zapped under mmu_lock for write (6.14).
    ends_exclusively: bool = False


_TO_5_11: Final = Shape(
    (5, 10),
    root_get_page=False,
    changes=False,
    child_level=1,
    passes=(),
    invalid=2,
    fixed=3,
    fast=False,
    guest_bits=True,
)
_TO_5_17: Final = Shape(
    (5, 12), get_page_twice=True, passes=(), invalid=2, fixed=3, guest_bits=True, zapped_as_frozen=True
)
_TO_6_8: Final = Shape((5, 18), passes=(3, 0), zapped_as_frozen=True)
_TO_6_12: Final = Shape((6, 9), passes=(1, 2, 3, 0), invalid=4, fixed=5, search_puts=True)
_TO_6_18: Final = replace(_TO_6_12, since=(6, 13), recovers=True, ends_exclusively=True)
_FROM_7_0: Final = replace(_TO_6_18, since=(7, 0), children_first=True, set_spte_when_spurious=False)
_TABLE: Final = (_TO_5_11, _TO_5_17, _TO_6_8, _TO_6_12, _TO_6_18, _FROM_7_0)


def shape_of(release: str) -> Shape | None:
    """The shape of a kernel release such as "6.1.0-56-amd64"; None before 5.10 or for no release."""
    found = re.match(r"(\d+)\.(\d+)", release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    fitting = [shape for shape in _TABLE if shape.since <= version]
    return fitting[-1] if fitting else None


def pfn(spte: int) -> int:
    """The page frame in an SPTE."""
    return (spte & _PFN) >> 12


def same_leaf(one: int, other: int, vendor: str) -> bool:
    """Whether two SPTEs differ in nothing but what the processor sets by itself."""
    return (one ^ other) & ~_ACCESSED_DIRTY.get(vendor, 0) == 0
