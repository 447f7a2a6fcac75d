# SPDX-License-Identifier: Apache-2.0
"""One kernel: all that is known of what its KVM does with roots and of how that shows, as one frozen object."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from traces.errors import Problem
from traces.kernels.policies import POLICIES, PolicyParameters
from traces.kernels.roles import RoleLayout
from traces.kernels.spte import SpteLayout
from traces.kernels.triggers import Trigger
from traces.kernels.vendors import Vendor

Version = tuple[int, int, int]


@dataclass(frozen=True)
class ReturnCodes:
    """What a page fault handler returns (the values of RET_PF_*); None where the kernel has no such code."""

    retry: int
    emulate: int
    invalid: int
    fixed: int
    spurious: int
    write_protected: int | None = None


@dataclass(frozen=True)
class Kernel:
    """A version, and everything that depends on it, on the processor's vendor, and on what was detected.

    `name` is the version as people write it. A patch level of a million stands for the last of a stable series.
    """

    name: str
    version: Version

    # Roots
    policy: str  # with nested paging and the TDP MMU on; `unknown` if the recorder could not tell
    unloads: frozenset[Trigger]  # what makes a vCPU give up its roots
    guest_owns_wp: bool  # with EPT the guest writes CR0.WP without an exit: no recording shows that it does
    zap_all_fast: Literal["invalidate", "empty"]
    request: Literal["obsolete", "reload"]
    search_puts: bool  # a load takes and puts references on the roots that it passes; else it holds mmu_lock for write
    layout: RoleLayout

    # Tables and leaves
    flush_per_table: bool
    zap_tables: bool
    slot_zap: bool  # KVM_X86_QUIRK_SLOT_ZAP_ALL can be off: deleting a memslot then zaps its leaves, and roots stay
    zap_leafs_once: bool  # a range zap is one call for all address spaces and valid roots; else one for each, all roots
    split_in_place: bool
    eager_split: bool  # dirty logging splits huge leaves when it begins
    recovers: bool  # when dirty logging ends, a huge leaf takes the place of a table; else nothing does
    fast: bool  # fast_page_fault works on TDP roots
    spte: SpteLayout
    ret_pf: ReturnCodes

    # Order of zaps: the levels that a root's zap goes through, a pass each (0: the root's own; none: one pass over all)
    passes: tuple[int, ...]
    children_first: bool  # a removed entry is shown after what was below it
    zapped_as_frozen: bool  # a single entry zapped under mmu_lock for read is shown as frozen, not as absent
    ends_exclusively: bool  # at the VM's end roots are zapped under mmu_lock for write

    # What events show
    points: frozenset[str]  # tracepoints (group:name) and functions of the recorder's table that this kernel has
    spte_changed: bool  # kvm_tdp_mmu_spte_changed, and kvm_mmu_prepare_zap_page for tables of the TDP MMU
    root_get_page: bool  # a TDP root's creation is a kvm_mmu_get_page
    get_page_twice: bool  # a table's kvm_mmu_get_page fires before the link and once more after it
    child_level: int  # by how much a table's recorded level is too high
    set_spte_when_spurious: bool  # kvm_mmu_set_spte fires for a fault that found its leaf already there
    page_struct: tuple[
        tuple[str, int], ...
    ]  # offsets in struct kvm_mmu_page where BTF cannot tell (see tracer.probing.offsets)

    # Locks and accounting
    loads_share: bool  # loads and unloads take mmu_lock for read
    faults_share: bool  # faults in the TDP MMU take mmu_lock for read
    aging: Literal["locked", "lockless"]  # kvm_age_hva holds mmu_lock for write, or walks under RCU
    zap_lock: Literal["read", "write"]  # how kvm_zap_gfn_range holds mmu_lock
    zap_counted: bool  # kvm_zap_gfn_range moves the notifier's count and sequence: faults begun before it try again
    apicv: Literal["memslot", "gfn"]  # an APICv inhibit deletes the APIC page's memslot, or zaps that one gfn
    tdp_pages: Literal["list", "counter"]  # tables of the TDP MMU: in a list under tdp_mmu_pages_lock, or counted
    nx_recovery: Literal["write", "read"]  # how NX huge page recovery holds mmu_lock in the TDP MMU

    # Shadow MMU
    old_shadow_mmu: bool  # a lookup syncs unsync pages in its way; kvm_mmu_spte_requested has guest-virtual frames
    prefetches_tail: bool  # a fault prefetches behind its entry, too, not only before it
    # mmu_seq is an int where faults compare it: after 2^31 invalidations every fault looks stale, for ever.
    mmu_seq_int: bool
    pte_list_ext: int  # SPTEs that one pte_list_desc of the reverse maps holds; 0: not known

    vendor: Vendor

    def parameters(self, name: str = "") -> PolicyParameters:
        """Return a policy (empty: this kernel's own) as this kernel would have it. Raises Problem for a wrong name.

        The policy is what is chosen; how huge leaves come and go, what a range zap removes and flushes, and who shares
        mmu_lock are properties of the kernel. So is, with `sync`, what zap_all_fast does. The other policies give up
        roots by marking them invalid, as 5.18 does; an older kernel gets that along with the policy.
        """
        name = name or self.policy
        if name not in POLICIES:
            raise Problem(f"--policy {name}: neither a policy ({', '.join(POLICIES)}), nor a file, nor an entry point")
        chosen = POLICIES[name]
        if chosen.mmu == "shadow":
            return replace(chosen, request=self.request)
        if name == "sync":
            chosen = replace(chosen, zap_all_fast=self.zap_all_fast, request=self.request)
        return replace(
            chosen,
            flush_per_table=self.flush_per_table,
            zap_tables=self.zap_tables,
            split_in_place=self.split_in_place,
            recovers=self.recovers,
            loads_share=self.loads_share,
            faults_share=self.faults_share,
        )
