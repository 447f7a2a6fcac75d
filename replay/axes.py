"""The axes on which root policies differ, and the named points that kernels took on them.

Source: the kernels named at each point, as read in the reference of this project; `kernels` says which kernel is where.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal


@dataclass(frozen=True)
class Axes:
    """One root policy as a point. The defaults are today's kernel (6.6 and later)."""

    name: str
    mmu: Literal["tdp", "shadow"] = "tdp"
    # True: the VM itself holds one reference on each valid root, so that only invalidation ends it (edbdb43fc96b, 6.4).
    own_reference: bool = True
    # Who zaps a root that dies: its last putter with mmu_lock held, a worker, or the task that invalidated it.
    teardown: Literal["inline", "worker", "invalidator"] = "invalidator"
    # kvm_mmu_zap_all_fast marks roots invalid ("retire"), or empties them and leaves them valid ("empty", 5.10).
    invalidate: Literal["retire", "empty"] = "retire"
    # What a vCPU gives up after it: slots with invalid roots (5.18, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS), or all of them.
    request: Literal["obsolete", "reload"] = "obsolete"
    # A removed table is flushed from remote TLBs one by one (to 5.17).
    flush_per_table: bool = False
    # A range zap removes tables that lie wholly in the range, not leaves only (to 5.17).
    zap_tables: bool = False
    # A small fault below a huge leaf splits it in place (6.3), or zaps it.
    split_in_place: bool = True
    # Entries of an aligned group that a fault fills when host memory is there; 1: just its own. Shadow MMU only.
    prefetch: int = 1
    # Loads and unloads take mmu_lock for read (6.9), or for write. Virtual time alone asks.
    loads_share: bool = True
    # Faults take mmu_lock for read (TDP from 5.12 on: a2855afc7ee8), or one at a time (5.10's spinlock, shadow MMU).
    # Virtual time alone asks.
    faults_share: bool = True
    # An assumption, not a policy: a root built anew gets all at once what the recorded kernel still had mapped.
    revive: bool = False


@dataclass(frozen=True)
class Designs:
    """Where a kernel stands on the questions beside the root policy (`designs`). The defaults are today's kernel."""

    # kvm_age_hva and kvm_test_age_hva hold mmu_lock for write, or walk under RCU (shadow MMU: the rmap's own bit).
    aging: Literal["locked", "lockless"] = "lockless"
    # kvm_zap_gfn_range holds mmu_lock for read or for write; `counted`: it moves the notifier's count and sequence,
    # so that a fault that began before it tries again.
    zap_lock: Literal["read", "write"] = "write"
    counted: bool = True
    # An APICv inhibit deletes the APIC page's memslot, which invalidates every root, or zaps that one gfn. AMD's AVIC.
    apicv: Literal["memslot", "gfn"] = "gfn"
    # Tables of the TDP MMU are in a list under tdp_mmu_pages_lock, or only counted.
    tdp_pages: Literal["list", "counter"] = "counter"
    # SPTEs that one pte_list_desc of the shadow MMU's reverse maps holds; 0: not known of that version.
    pte_list_ext: int = 14


PRESERVE: Final = Axes("preserve")
PRESERVE_WORKER: Final = Axes("preserve-worker", teardown="worker", loads_share=False)
ASYNC: Final = Axes("async", own_reference=False, teardown="worker", split_in_place=False, loads_share=False)
SYNC_RW: Final = Axes(
    "sync",
    own_reference=False,
    teardown="inline",
    request="reload",
    flush_per_table=True,
    zap_tables=True,
    split_in_place=False,
    loads_share=False,
)
SYNC: Final = replace(SYNC_RW, invalidate="empty", faults_share=False)
SHADOW: Final = Axes(
    "shadow",
    mmu="shadow",
    teardown="invalidator",
    split_in_place=False,
    prefetch=8,
    loads_share=False,
    faults_share=False,
)

NAMED: Final = {axes.name: axes for axes in (SYNC, ASYNC, PRESERVE_WORKER, PRESERVE, SHADOW)}
