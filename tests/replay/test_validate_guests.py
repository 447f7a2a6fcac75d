# SPDX-License-Identifier: Apache-2.0
"""What guests other than the lab's own cause, row by row: each kind comes out, and each wrong row is found.

Where the kernel's threads race, the rows permit a set of outcomes; a test of each has one that is not in the set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from replay.validate.compare import ConformanceReport, VmReport
from replay.validate.misbooked import notifiers_of_others
from replay.validate.row_tuples import RowTuple
from replay.validate.threads import RESPONSES, MatchTally
from replay.validate.validate_text import headline, to_dict
from tests.replay.kernel_rows import (
    CLEAR_LOG,
    ENABLE_CAP,
    GET_LOG,
    HVA,
    LEAF,
    MMIO,
    NESTED_ROLE,
    NO_SLOT,
    ROLE,
    SET_MEMORY,
    SHADOW_ROLE,
    VCPU,
    VMM,
    KernelRows,
)

GFN, PAGES = 0x1000, 0x400
LOGGED, READ_ONLY = 1, 2
NEW = "6.12.50"


def guest(kernel: str = "6.1.100", pages: int = 4, vcpus: int = 1) -> KernelRows:
    """A VM of one slot, whose vCPUs have root 1 and the first pages of the slot mapped in it."""
    made = KernelRows(kernel)
    made.slot(GFN, PAGES)
    made.load()
    for vcpu in range(1, vcpus):
        made.load(vcpu, refs=2 + vcpu, created=False)
    for page in range(pages):
        made.fault(0, GFN + page, 0x500 + page)
    return made


# Scripts: each is what a kernel shows; every response in it is mutated.


def a_notifier_before_the_first_root() -> KernelRows:
    made = KernelRows()
    made.slot(GFN, PAGES)
    made.unmap(GFN, PAGES)  # there is no root: nothing to do, and no row
    made.load()
    made.fault(0, GFN, 0x500)
    made.ioctl(GET_LOG)  # only now is the next row of that thread
    made.done(GET_LOG)
    made.unmapped(GFN, PAGES, refs=3)
    return made


def a_notifier_that_waited_for_a_fault() -> KernelRows:
    made = guest()
    made.unmap(GFN, PAGES)
    made.fault(0, GFN + 9, 0x600)  # mmu_lock was the fault's first
    for at in sorted(made.leaves):
        made.row("kvm_tdp_mmu_spte_changed", level=1, gfn=at, old=made.leaves.pop(at))
    made.put(3)
    return made


def a_notifier_while_a_slot_is_deleted() -> KernelRows:
    """The slot is in KVM's lists until the ioctl is nearly done: the notifier may find it or not."""
    made = guest(pages=0)
    made.slot(0x8000, 16, slot=1)
    made.memslot(0x8000, 0, slot=1)
    made.unmap(0x8000, 16, tid=5)
    made.put(3, tid=5)
    made.unmap(0x8000, 16, tid=5)
    made.row("ioctl", tid=5)
    made.done(SET_MEMORY)
    made.unmapped(GFN, PAGES, refs=3)
    return made


def aging() -> KernelRows:
    made = guest()
    made.row("kvm_age_hva", addr=HVA + (GFN << 12), value=HVA + (GFN + 4 << 12))
    for gfn in (GFN + 1, GFN + 3):  # the processor had not set the accessed bit of the first, nor of the one between
        word = made.leaves[gfn]
        made.leaves[gfn] = word & ~0x20
        made.row("kvm_tdp_mmu_spte_changed", level=1, gfn=gfn, old=word, new=word & ~0x20)
    made.unmapped(GFN, PAGES, refs=3)
    return made


def a_page_that_another_vcpu_mapped_first() -> KernelRows:
    made = guest(vcpus=2)
    made.requested(0, GFN + 8, 0x700)
    made.requested(1, GFN + 8, 0x700)
    made.leaf(1, GFN + 8, 0x700)
    made.of(1, "kvm_entry")
    made.of(0, "kvm_entry")  # lost: it will try again
    made.unmapped(GFN, PAGES, refs=4)
    return made


def a_page_lost_before_the_winner_shows() -> KernelRows:
    made = guest(vcpus=2)
    made.requested(0, GFN + 8, 0x700)
    made.requested(1, GFN + 8, 0x700)
    made.of(0, "kvm_entry")
    made.leaf(1, GFN + 8, 0x700)
    made.of(1, "kvm_entry")
    made.unmapped(GFN, PAGES, refs=4)
    return made


def a_table_that_another_vcpu_linked_first() -> KernelRows:
    made = guest(vcpus=2)
    other = GFN + 512
    made.requested(0, other, 0x700)
    made.requested(1, other + 1, 0x701)
    won = made.table(1, other, 1)
    made.link(1, other, 1, won)
    made.table(0, other, 1)  # made in vain: vCPU 0 had found nothing there
    made.of(0, "kvm_entry")
    made.leaf(1, other + 1, 0x701)
    made.of(1, "kvm_entry")
    made.fault(0, other, 0x700)
    made.unmapped(GFN, PAGES, refs=4)
    return made


def a_root_that_another_vcpu_made_during_the_search() -> KernelRows:
    """From 6.9 on loads share mmu_lock, and search a second time before they make a root."""
    made = KernelRows(NEW)
    made.slot(GFN, PAGES)
    made.load(0, root=2, role=0x1003784)
    made.of(0, "mmu_free_roots", root=2, value=1)
    made.put(2, root=2, role=0x1003784, tid=VCPU)
    made.put(2, root=2, role=0x1003784, tid=VCPU + 1)  # vCPU 1 passes SMM's root: it finds none of its own
    made.put(2, root=2, role=0x1003784, tid=VCPU)
    made.load(0)
    made.load(1, refs=3, created=False)
    made.fault(0, GFN, 0x500)
    made.row("kvm_unmap_hva_range", addr=HVA + (GFN << 12), value=HVA + (GFN + 8 << 12))
    made.row("kvm_tdp_mmu_spte_changed", level=1, gfn=GFN, old=made.leaves.pop(GFN), new=made.absent)
    made.put(4)
    made.put(2, root=2, role=0x1003784)
    return made


def mmio_while_a_slot_is_moved_back() -> KernelRows:
    made = guest()
    made.memslot(0x8000, 16, slot=1)
    made.requested(0, 0x8001, NO_SLOT)  # the slot is not there yet
    made.tables(0, 0x8001)
    made.of(0, "kvm_tdp_mmu_spte_changed", 0x8001, root=1, level=1, new=MMIO | 0x8001 << 12)
    made.of(0, "mark_mmio_spte", 0x8001, root=1)
    made.of(0, "kvm_entry")
    made.fault(0, 0x8002, 0x900)  # and now it is
    made.done(SET_MEMORY)
    made.fault(0, 0x8003, 0x901)
    made.unmapped(0x8000, 16, refs=3)
    made.unmapped(GFN, PAGES, refs=3)
    return made


def mmio_while_slots_change() -> KernelRows:
    """The memslots' generation is not looked at then, and every access is served anew; after it, it is another."""
    made = guest()
    page, spte = 0x8001, MMIO | 0x8001 << 12
    made.requested(0, page, NO_SLOT)
    made.tables(0, page)
    made.of(0, "kvm_tdp_mmu_spte_changed", page, root=1, level=1, new=spte)
    made.of(0, "mark_mmio_spte", page, root=1, value=8)
    made.of(0, "kvm_entry")
    made.memslot(0x9000, 16, slot=1)
    for _ in range(2):
        made.requested(0, page, NO_SLOT, code=0xC)
        made.of(0, "mark_mmio_spte", page, root=1, value=8)
        made.of(0, "kvm_entry")
    made.done(SET_MEMORY)
    made.of(0, "kvm_page_fault", root=1, role=ROLE, addr=page << 12, code=0xC)
    made.of(0, "check_mmio_spte", old=spte, code=8, value=10)
    made.of(0, "kvm_mmu_spte_requested", page, root=1, level=1, value=NO_SLOT)
    made.of(0, "kvm_tdp_mmu_spte_changed", page, root=1, level=1, old=spte, new=spte + 16)
    made.of(0, "mark_mmio_spte", page, root=1, value=10)
    made.of(0, "kvm_entry")
    made.of(0, "kvm_page_fault", root=1, role=ROLE, addr=page << 12, code=0xC)
    made.of(0, "check_mmio_spte", old=spte + 16, code=10, value=10)
    made.of(0, "handle_mmio_page_fault", page)
    made.of(0, "kvm_entry")
    made.unmapped(GFN, PAGES, refs=3)
    return made


def a_slot_that_could_not_be_set() -> KernelRows:
    made = guest()
    made.memslot(0x8000, 16, slot=1)
    made.done(SET_MEMORY, ret=-17)
    made.requested(0, 0x8001, NO_SLOT)
    made.tables(0, 0x8001)
    made.of(0, "kvm_tdp_mmu_spte_changed", 0x8001, root=1, level=1, new=MMIO | 0x8001 << 12)
    made.of(0, "mark_mmio_spte", 0x8001, root=1)
    made.of(0, "kvm_entry")
    made.unmapped(GFN, PAGES, refs=3)
    return made


def dirty_logging_initially_set() -> KernelRows:
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with KVM_DIRTY_LOG_INITIALLY_SET, which is QEMU's way."""
    made = KernelRows()
    made.ioctl(ENABLE_CAP)
    made.done(ENABLE_CAP)
    made.slot(GFN, PAGES)
    made.load()
    made.fault(0, GFN, 0x800, level=2)
    made.fault(0, GFN + 512, 0x600)
    made.fault(0, GFN + 513, 0x601)
    made.slot(GFN, PAGES, LOGGED)  # nothing is protected
    made.ioctl(GET_LOG)
    made.done(GET_LOG)
    made.ioctl(CLEAR_LOG)
    child, huge = made.table(0, GFN, 1), made.leaves.pop(GFN)
    made.rows[-1] = made.rows[-1]._replace(tid=VMM, vcpu=None)
    made.row("kvm_tdp_mmu_spte_changed", level=2, gfn=GFN, old=huge, new=child << 12 | 0x827)
    made.row("kvm_mmu_split_huge_page", level=2, gfn=GFN, old=huge)
    made.leaves |= {GFN + page: (0x800 + page) << 12 | LEAF for page in range(512)}
    made.put(3)
    for page in range(64):
        made.protect(GFN + page)
    made.put(3)
    for page in (64, 70):  # of these 64 the VMM says two
        made.protect(GFN + page)
    made.put(3)
    made.protect(GFN + 513)
    made.done(CLEAR_LOG)
    word = made.leaves[GFN]
    made.of(0, "kvm_page_fault", root=1, role=ROLE, addr=GFN << 12, code=7)
    made.leaves[GFN] = word | 2
    made.of(0, "fast_page_fault", root=1, addr=GFN << 12, code=7, old=word, new=word | 2, ret=4)
    made.of(0, "kvm_entry", root=1)
    made.unmapped(GFN, PAGES, refs=3)
    return made


def dirty_logging_of_a_read_only_slot() -> KernelRows:
    made = KernelRows()
    made.slot(GFN, PAGES, READ_ONLY)
    made.load()
    made.fault(0, GFN, 0x500)
    made.slot(GFN, PAGES, READ_ONLY | LOGGED)  # nothing can get dirty: nothing is done
    made.unmapped(GFN, PAGES, refs=3)
    return made


def a_nested_guest_without_nested_paging() -> KernelRows:
    """Its roots are the TDP MMU's own, with guest_mode in the role word; a vCPU has both in its slots."""
    made = guest()
    made.of(0, "kvm_nested_vmenter")
    made.of(0, "new_pgd", role=NESTED_ROLE)
    made.of(0, "mmu_free_roots", role=NESTED_ROLE, value=1)
    made.load(0, root=2, role=NESTED_ROLE)
    made.fault(0, GFN, 0x500, root=2, role=NESTED_ROLE)
    made.of(0, "kvm_nested_vmexit")
    made.of(0, "new_pgd", role=ROLE)  # found among the previous ones
    made.fault(0, GFN + 8, 0x508)
    made.of(0, "new_pgd", role=NESTED_ROLE)
    made.fault(0, GFN + 1, 0x501, root=2, role=NESTED_ROLE)
    made.of(0, "mmu_unload")
    made.of(0, "mmu_free_roots", root=2, role=NESTED_ROLE, value=15)
    made.put(2, tid=VCPU)
    made.put(2, root=2, role=NESTED_ROLE, tid=VCPU)
    made.load(0, root=2, role=NESTED_ROLE, created=False)
    made.unmap(GFN, PAGES)
    for page in (0, 1):
        made.row("kvm_tdp_mmu_spte_changed", level=1, gfn=GFN + page, old=(0x500 + page) << 12 | LEAF)
    made.put(3, root=2, role=NESTED_ROLE)
    for gfn in sorted(made.leaves):
        made.row("kvm_tdp_mmu_spte_changed", level=1, gfn=gfn, old=made.leaves[gfn])
    made.put(2)
    return made


def a_nested_guest_with_nested_paging() -> KernelRows:
    """L1's tables are shadowed in the vCPU's other context: not compared, while the roots of L1 still are."""
    made = guest()
    made.of(0, "kvm_nested_vmenter")
    made.of(0, "new_pgd", role=SHADOW_ROLE)
    read_only = made.leaves[GFN + 2] & ~(2 | 1 << 10)
    made.row("kvm_tdp_mmu_spte_changed", VCPU, 0, GFN + 2, root=1, level=1, old=made.leaves[GFN + 2], new=read_only)
    made.leaves[GFN + 2] = read_only  # L1's table lies there: its writes are emulated from now on
    made.shadow("kvm_mmu_get_page", GFN + 2, root=2, level=4, table=0x8002, flags=1)
    made.shadow("mmu_load", root=2)
    made.of(0, "kvm_page_fault", role=SHADOW_ROLE, root=2, addr=0x5000, code=4)
    made.shadow("kvm_mmu_spte_requested", 5, root=2, level=1, value=0x501, role=0)
    made.shadow("kvm_mmu_get_page", GFN + 3, level=1, table=0x8003, flags=1, role=SHADOW_ROLE & ~15 | 1)
    made.shadow("kvm_mmu_set_spte", 5, root=2, level=1, new=0x501 << 12 | LEAF, table=0x8003, role=0)
    made.unmap(0x8000, 1, tid=VCPU)
    made.of(0, "kvm_entry", root=2)
    made.of(0, "kvm_nested_vmexit")
    made.of(0, "new_pgd", role=ROLE)
    made.of(0, "kvm_page_fault", role=ROLE, root=1, addr=GFN + 2 << 12, code=7)  # L1 writes to its table
    made.of(0, "kvm_entry", root=1)
    made.fault(0, GFN + 9, 0x509)
    made.of(0, "mmu_unload")
    made.of(0, "mmu_free_roots", root=1, role=ROLE, value=15)
    made.put(2, tid=VCPU)
    made.of(0, "mmu_free_roots", root=2, role=SHADOW_ROLE, value=15)
    made.shadow("root_put", root=2, table=0x8002, refs=1)
    made.shadow("kvm_mmu_prepare_zap_page", GFN + 3, table=0x8003, level=1, role=SHADOW_ROLE & ~15 | 1)
    made.load(0, refs=2, created=False)
    made.unmapped(GFN, PAGES, refs=3)
    return made


def recovery_of_nx_huge_pages() -> KernelRows:
    """nx_huge_pages: huge leaves are not executable; code is in small ones, until a worker takes their table."""
    made = KernelRows()
    made.slot(GFN, PAGES)
    made.load()
    huge, frozen, place = 1 << 63 | 0x800 << 12 | 0xEE7, 0x5A0, {"root": 1, "level": 2, "gfn": GFN}
    made.requested(0, GFN, 0x800, level=2)
    made.tables(0, GFN, level=2)
    table = made.rows[-2].table
    made.of(0, "kvm_tdp_mmu_spte_changed", new=huge, **place)
    made.of(0, "kvm_mmu_set_spte", new=huge, table=table, **place)
    made.of(0, "kvm_entry")
    made.requested(0, GFN + 1, 0x801, code=0x15)  # executes
    made.of(0, "kvm_tdp_mmu_spte_changed", old=huge, new=frozen, **place)
    child = made.table(0, GFN, 1)
    made.link(0, GFN, 1, child)
    made.leaf(0, GFN + 1, 0x801)
    made.of(0, "kvm_entry")
    made.requested(0, GFN + 5, 0x805, level=2)  # the goal is lowered: the guest executes there
    made.leaf(0, GFN + 5, 0x805)
    made.of(0, "kvm_entry")
    worker = 99
    made.row("kvm_tdp_mmu_spte_changed", worker, old=child << 12 | 0x827, **place)
    made.row("kvm_mmu_prepare_zap_page", worker, gfn=GFN, role=ROLE & ~15 | 1, level=1, table=child)
    for gfn in (GFN + 1, GFN + 5):
        old = made.leaves.pop(gfn)
        made.row("kvm_tdp_mmu_spte_changed", worker, gfn=gfn, root=1, level=1, old=old, new=frozen)
    made.row("table_free", 7, gfn=GFN, role=ROLE & ~15 | 1, level=1, table=child)
    made.requested(0, GFN, 0x800, level=2)
    made.of(0, "kvm_tdp_mmu_spte_changed", new=huge, **place)
    made.of(0, "kvm_mmu_set_spte", new=huge, table=table, **place)
    made.of(0, "kvm_entry")
    made.unmap(GFN, PAGES)
    made.row("kvm_tdp_mmu_spte_changed", old=huge, **place)
    made.put(3)
    return made


def a_huge_page_that_a_fetch_splits() -> KernelRows:
    """From 6.3 on in place; of two vCPUs that would, one links its table, and the other's event has an error."""
    made = KernelRows(NEW)
    made.slot(GFN, PAGES)
    made.load()
    made.load(1, refs=3, created=False)
    huge, place = 1 << 63 | 0x800 << 12 | 0xEE7, {"root": 1, "level": 2, "gfn": GFN}
    made.requested(0, GFN, 0x800, level=2)
    made.tables(0, GFN, level=2)
    table = made.rows[-2].table
    made.of(0, "kvm_tdp_mmu_spte_changed", old=made.absent, new=huge, **place)
    made.of(0, "kvm_mmu_set_spte", new=huge, table=table, **place)
    made.of(0, "kvm_entry")
    made.requested(0, GFN + 1, 0x801, code=0x15)
    child = made.table(0, GFN, 1)
    made.requested(1, GFN + 2, 0x802, code=0x15)
    made.table(1, GFN, 1)
    made.link(0, GFN, 1, child, old=huge)
    made.of(0, "kvm_mmu_split_huge_page", GFN, level=2, old=huge)
    made.of(0, "kvm_mmu_set_spte", GFN + 1, root=1, level=1, new=0x801 << 12 | LEAF, table=child)
    made.of(0, "kvm_entry")
    made.of(1, "kvm_mmu_split_huge_page", GFN, level=2, old=huge, ret=-16)
    made.of(1, "kvm_entry")
    made.leaves = {GFN + page: (0x800 + page) << 12 | LEAF for page in range(512)}
    made.unmapped(GFN, PAGES, refs=4)
    return made


def a_huge_page_in_the_place_of_a_table(kernel: str = "6.1.100") -> KernelRows:
    """The host has merged the guest's pages since: the table goes with what is left in it."""
    made = KernelRows(kernel)
    made.slot(GFN, PAGES)
    made.load()
    made.fault(0, GFN + 3, 0x603)
    child = made.rows[-2].table
    made.unmapped(GFN, PAGES, refs=3)
    above = next(row.table for row in made.rows if row.kind == "kvm_mmu_get_page" and row.level == 2)
    huge, frozen = 0x800 << 12 | 0xEE7, 0x5A0 if kernel == "6.1.100" else 1 << 63 | 0x1A0
    changed = {"root": 1, "level": 2, "gfn": GFN, "old": child << 12 | 0x827, "new": huge}
    made.requested(0, GFN, 0x800, level=2)
    if kernel == "6.1.100":
        made.of(0, "kvm_tdp_mmu_spte_changed", **changed)
    made.of(0, "kvm_mmu_prepare_zap_page", GFN, role=ROLE & ~15 | 1, level=1, table=child)
    for page in range(512):
        made.of(0, "kvm_tdp_mmu_spte_changed", GFN + page, root=1, level=1, old=made.absent, new=frozen)
    if kernel != "6.1.100":
        made.of(0, "kvm_tdp_mmu_spte_changed", **changed)
    made.of(0, "kvm_mmu_set_spte", root=1, level=2, gfn=GFN, new=huge, table=above)
    made.of(0, "kvm_entry")
    made.row("table_free", 7, gfn=GFN, role=ROLE & ~15 | 1, level=1, table=child)
    made.unmap(GFN, PAGES)
    made.row("kvm_tdp_mmu_spte_changed", root=1, level=2, gfn=GFN, old=huge, new=made.absent)
    made.put(3)
    return made


def a_huge_page_in_the_place_of_a_table_on_a_newer_kernel() -> KernelRows:
    """The table and its entries show before the entry that pointed to it."""
    return a_huge_page_in_the_place_of_a_table("7.3.4")


def slots_that_take_their_leaves_along() -> KernelRows:
    """KVM_X86_QUIRK_SLOT_ZAP_ALL off: no root goes with a slot that is deleted, or moved."""
    made = guest(NEW)
    made.slot(0x8000, 16, slot=1)
    for pages in (0, 16):
        made.fault(0, 0x8001, 0x901)
        made.memslot(0x8000 + pages, pages, slot=1)
        made.row("kvm_tdp_mmu_spte_changed", level=1, gfn=0x8001, old=made.leaves.pop(0x8001), new=made.absent)
        made.put(3)
        made.done(SET_MEMORY)
        made.memslot(0x8000, 16, slot=1)
        if pages:
            made.put(3)  # moved back: there was nothing to take along
        made.done(SET_MEMORY)
    made.unmapped(GFN, PAGES, refs=3)
    return made


def apicv_that_is_inhibited(kernel: str = "6.1.100") -> KernelRows:
    """The APIC's page goes, from each address space in turn."""
    made = guest(kernel)
    made.of(1, "kvm_smm_transition", flags=1)
    if kernel == NEW:
        made.put(3, tid=VCPU + 1)  # passed over
    made.load(1, root=2, role=0x1003784)
    made.fault(0, 0xFEE00, 0x900)
    for as_id in (0, 1) if kernel != NEW else (0,):
        made.row("zap_leafs", gfn=0xFEE00, value=0xFEE01, as_id=as_id)
        made.put(3, root=2, role=0x1003784)
        if as_id == 0:
            made.row("kvm_tdp_mmu_spte_changed", level=1, gfn=0xFEE00, old=made.leaves.pop(0xFEE00), new=made.absent)
        made.put(3)
    made.of(0, "kvm_page_fault", root=1, role=ROLE, addr=0xFEE00000, code=6)  # emulated, not mapped
    made.of(0, "kvm_entry")
    return made


def apicv_that_is_inhibited_on_a_newer_kernel() -> KernelRows:
    """One call for all address spaces."""
    return apicv_that_is_inhibited(NEW)


SCRIPTS: tuple[Callable[[], KernelRows], ...] = (
    a_notifier_before_the_first_root,
    a_notifier_that_waited_for_a_fault,
    a_notifier_while_a_slot_is_deleted,
    aging,
    a_page_that_another_vcpu_mapped_first,
    a_page_lost_before_the_winner_shows,
    a_table_that_another_vcpu_linked_first,
    a_root_that_another_vcpu_made_during_the_search,
    mmio_while_a_slot_is_moved_back,
    mmio_while_slots_change,
    a_slot_that_could_not_be_set,
    dirty_logging_initially_set,
    dirty_logging_of_a_read_only_slot,
    a_nested_guest_without_nested_paging,
    a_nested_guest_with_nested_paging,
    recovery_of_nx_huge_pages,
    a_huge_page_that_a_fetch_splits,
    a_huge_page_in_the_place_of_a_table,
    a_huge_page_in_the_place_of_a_table_on_a_newer_kernel,
    slots_that_take_their_leaves_along,
    apicv_that_is_inhibited,
    apicv_that_is_inhibited_on_a_newer_kernel,
)
# Columns of which any other value is wrong.
TELLING = {
    "kvm_mmu_get_page": ("role", "gfn", "level"),
    "kvm_mmu_prepare_zap_page": ("role", "gfn", "level", "table"),
    "table_free": ("role", "level", "table"),
    "kvm_tdp_mmu_spte_changed": ("gfn", "level", "as_id", "old"),
    "kvm_mmu_set_spte": ("gfn", "level", "new"),
    "kvm_mmu_spte_requested": ("gfn",),
    "kvm_mmu_split_huge_page": ("gfn", "old", "ret"),
    "fast_page_fault": ("old", "new", "ret"),
    "mark_mmio_spte": ("gfn",),
    "check_mmio_spte": ("old",),
    "handle_mmio_page_fault": ("gfn",),
    "root_get": ("role", "refs"),
    "root_put": ("role", "refs"),
    "mmu_load": ("role",),
}
OTHERWISE = {"old": 0x10000, "new": 0x10000}  # another page frame


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_response_is_predicted(script: Callable[[], KernelRows]) -> None:
    made = script()
    assert made.why() == ""
    check = made.check()
    responses = sum(row.kind in RESPONSES and row.seq not in made.apart for row in made.rows)
    assert sum(check.tallies[kind].matched for kind in RESPONSES if kind in check.tallies) == responses
    assert sum(check.nested.rows.values()) == len(made.apart)


MOST = 16  # rows of a kind that are mutated, spread over the script
# What is another outcome that the kernel might have produced as well.
PERMITTED = {
    a_notifier_while_a_slot_is_deleted: {"without root_put"},  # the slot was gone by then
    aging: {"without kvm_tdp_mmu_spte_changed"},  # the processor had not set the bit
    a_page_that_another_vcpu_mapped_first: {"without kvm_mmu_spte_requested"},  # the loser's: tried again before that
    a_page_lost_before_the_winner_shows: {"without kvm_mmu_spte_requested"},
    a_root_that_another_vcpu_made_during_the_search: {"without root_put"},  # the search began when it was there
    # A grace period may end after the recording.
    recovery_of_nx_huge_pages: {"without table_free"},
    a_huge_page_in_the_place_of_a_table: {"without table_free"},
    a_huge_page_in_the_place_of_a_table_on_a_newer_kernel: {"without table_free"},
    dirty_logging_initially_set: {"twice root_put"},  # 64 pages more, none of which was writable
}


def mutations(made: KernelRows) -> Iterator[tuple[str, RowTuple, list[RowTuple]]]:
    """Each response left out, shown twice, and with each telling column otherwise."""
    places: dict[str, list[int]] = {}
    for at, row in enumerate(made.rows):
        if row.kind in RESPONSES and at not in made.apart:
            places.setdefault(row.kind, []).append(at)
    for kind, all_of_it in places.items():
        for at in all_of_it[:: -(-len(all_of_it) // MOST)]:
            row, before, after = made.rows[at], made.rows[:at], made.rows[at + 1 :]
            yield f"without {kind}", row, before + after
            yield f"twice {kind}", row, [*before, row, row, *after]
            for column in TELLING[kind]:
                value = (getattr(row, column) or 0) ^ OTHERWISE.get(column, 1)
                yield f"{column} of {kind}", row, [*before, row._replace(**{column: value}), *after]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_mutation_is_found(script: Callable[[], KernelRows]) -> None:
    made = script()
    unfound = {what: row for what, row, rows in mutations(made) if not made.why(rows)}
    assert set(unfound) == PERMITTED.get(script, set()), unfound


def test_rows_are_told_apart_by_what_they_are_not_by_what_is_expected() -> None:
    """Before a nested guest was entered nothing is of its paging, whatever a role word says."""
    made = a_nested_guest_with_nested_paging()
    entered = next(at for at, row in enumerate(made.rows) if row.kind == "kvm_nested_vmenter")
    check = made.check([*made.rows[:entered], *made.rows[entered + 1 :]])
    assert not check.nested.rows
    assert check.first is not None
    # A root of L1's that is put while it should not be is compared, though the VM is nested.
    more = made.rows[-1]._replace(kind="root_put", root=1, role=ROLE, refs=7)
    assert made.why([*made.rows, more]) == "root_put recorded, nothing expected of this thread"


def test_the_first_line_names_what_is_not_modelled() -> None:
    nested = VmReport(3, {"root_put": MatchTally(600)}, None, 0, 0, 0, not_modelled={"kvm_mmu_set_spte": 200})
    plain = VmReport(4, {"root_put": MatchTally(400)}, None, 0, 0, 0)
    report = ConformanceReport(Path("a.parquet"), "6.1.100", "preserve", [nested, plain])
    assert headline(report) == (
        "100 % of 1,000 modelled; 200 rows of 1 nested VM not modelled: a.parquet (6.1.100, policy preserve)"
    )
    document = to_dict(report)
    assert document["responses"] == document["matched"] == 1000
    assert document["not_modelled"] == {"responses": 200, "vms": [3], "kinds": {"kvm_mmu_set_spte": 200}}
    nested.tallies["root_put"].mismatched += 1
    assert headline(report).startswith("99.90 % of 1,001 modelled; 200 rows")


def test_a_notifier_booked_to_the_wrong_vm_of_two_is_named() -> None:
    both, none, alone = guest(), guest(), guest()
    for _ in range(2):
        both.unmap(GFN, PAGES)
    alone.unmap(GFN, PAGES)
    (told,) = notifiers_of_others({3: both.rows, 4: none.rows})
    assert told.startswith("VM 3 has 1 notifiers of its process more than once which VM 4 has not: rows of VM 4")
    assert notifiers_of_others({3: both.rows, 4: alone.rows}) == []  # each has it: one was asked twice
    assert notifiers_of_others({3: alone.rows, 4: none.rows}) == []


# What is in none of the sets.


def test_a_fault_that_nobody_beat_maps_its_page() -> None:
    made = guest(vcpus=2)
    made.requested(0, GFN + 8, 0x700)
    made.of(0, "kvm_entry")
    made.unmapped(GFN, PAGES, refs=4)
    assert made.why().startswith("kvm_tdp_mmu_spte_changed root=1 level=1 as_id=0 gfn=4104 old=nothing")


def test_of_two_faults_on_one_page_one_wins() -> None:
    made = guest(vcpus=2)
    made.requested(0, GFN + 8, 0x700)
    made.requested(1, GFN + 8, 0x700)
    made.of(0, "kvm_entry")
    made.of(1, "kvm_entry")
    made.unmapped(GFN, PAGES, refs=4)
    assert "kvm_entry recorded" in made.why()


def test_a_winner_that_was_done_before_excuses_nobody() -> None:
    made = guest(vcpus=2)
    made.fault(1, GFN + 8, 0x700)
    made.unmapped(GFN, PAGES, refs=4)
    made.requested(0, GFN + 8, 0x700)
    made.of(0, "kvm_entry")
    assert "kvm_entry recorded" in made.why()


def test_a_notifier_that_must_find_something_shows_it() -> None:
    made = guest()
    made.unmap(GFN, PAGES)
    made.ioctl(GET_LOG)
    assert made.why().endswith("expected, ioctl recorded")


def test_a_notifier_finds_what_was_there_all_the_time() -> None:
    """A root that comes and goes meanwhile does not excuse one that stays."""
    made = guest(pages=1)
    made.unmap(GFN, PAGES)
    made.load(0, root=2, role=NESTED_ROLE)
    made.ioctl(GET_LOG)
    assert made.why() != ""


def test_mmio_needs_a_gap_between_slots() -> None:
    made = guest()
    made.requested(0, GFN + 8, NO_SLOT)
    assert made.why() == "value a page frame expected, 0x8000000000000000 recorded"
    made = guest()
    made.memslot(0x8000, 16, slot=1)
    made.done(SET_MEMORY)  # from now on it is there
    made.requested(0, 0x8001, NO_SLOT)
    assert made.why() == "value a page frame expected, 0x8000000000000000 recorded"


def test_mmio_is_served_anew_only_while_slots_change() -> None:
    made = mmio_while_slots_change()
    ioctl = next(row.seq for row in made.rows if row.kind == "memslot" and row.slot == 1)
    assert made.why([row for row in made.rows if row.seq not in (ioctl - 1, ioctl)]) == (
        "kvm_mmu_spte_requested recorded, nothing expected of this thread"
    )
    unchanged = [row for row in made.rows if row.kind == "mark_mmio_spte"][1]  # an SPTE of the same generation
    other = [row._replace(value=10) if row is unchanged else row for row in made.rows]
    assert made.why(other) == "value 0x8 expected, 0xa recorded"


def test_after_the_first_slot_that_goes_the_others_go_the_same_way() -> None:
    made = slots_that_take_their_leaves_along()
    gone = [row.seq for row in made.rows if row.kind == "kvm_tdp_mmu_spte_changed" and row.new == made.absent]
    assert "expected" in made.why([row for row in made.rows if row.seq not in (gone[1], gone[1] + 1)])
    made = guest(NEW)
    made.memslot(GFN, 0)
    made.row("kvm_mmu_zap_all_fast")
    made.row("zap_invalidated_begin")
    made.row("zap_invalidated_end")
    made.done(SET_MEMORY)
    made.memslot(GFN, PAGES)
    made.done(SET_MEMORY)
    made.memslot(GFN, 0)
    made.put(3)
    assert made.check().machine.slot_zap is False


def test_dirty_logging_protects_unless_the_vmm_asked_otherwise() -> None:
    made = guest()
    made.slot(GFN, PAGES, LOGGED)
    assert "root_put" in made.why()
    made = guest()
    made.ioctl(ENABLE_CAP)
    made.done(ENABLE_CAP)
    made.slot(GFN, PAGES, LOGGED)
    assert made.why() == ""
    made.memslot(GFN, PAGES)
    made.put(3)
    made.done(SET_MEMORY)
    made.memslot(GFN, PAGES, LOGGED)
    made.put(3)  # what it asked for holds for the VM's life
    made.done(SET_MEMORY)
    assert made.why() == "root_put recorded, nothing expected of this thread"


def test_a_leaf_outside_of_the_log_is_not_protected_by_it() -> None:
    made = guest()
    made.ioctl(ENABLE_CAP)
    made.done(ENABLE_CAP)
    made.slot(0x8000, 64, slot=1)
    made.slot(0x8000, 64, LOGGED, slot=1)
    made.ioctl(CLEAR_LOG)
    made.put(3)
    made.protect(GFN)
    assert made.why() == "kvm_tdp_mmu_spte_changed recorded, nothing more expected of this thread"


@pytest.mark.parametrize("refs", [3, 4])
def test_a_notifier_may_have_a_root_of_which_its_rows_show_nothing_yet(refs: int) -> None:
    """It was preempted between two memslots; what it has then is one reference more, and never two."""
    made = KernelRows()
    made.slot(GFN, PAGES)
    made.slot(GFN + PAGES, PAGES, slot=1)
    made.load()
    made.unmap(GFN, 2 * PAGES)
    made.put(3)
    others = 50
    made.unmap(GFN, PAGES, others)
    made.put(refs, tid=others)
    made.put(3)
    assert not made.why()
    made.unmap(GFN, PAGES, others)
    made.put(3, tid=others)
    assert not made.why()
    assert made.why([*made.rows[:-1], made.rows[-1]._replace(refs=4)]) == "refs 3 expected, 4 recorded"
    at = next(i for i, row in enumerate(made.rows) if row.tid == others and row.kind == "root_put")
    two_more = [*made.rows[:at], made.rows[at]._replace(refs=5), *made.rows[at + 1 :]]
    assert made.why(two_more) == "refs 3 to 4 expected, 5 recorded"
