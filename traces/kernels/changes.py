# SPDX-License-Identifier: Apache-2.0
"""The dated list of changes: what KVM's MMU did in 5.10, and everything that has changed since. Dated 2026-11.

Adding a kernel is one entry here. Sources: the kernels read in source (5.10.223, 5.15, 6.1.192, 6.12.107, 7.3.4), what
the recordings in traces/corpus show, and for single changes the commit itself; docs/kvm-mmu.md says which. Where the
first release is not known for certain, the entry says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from traces.kernels.kernel import Kernel, ReturnCodes, Version
from traces.kernels.roles import RoleLayout
from traces.kernels.spte import SpteLayout
from traces.kernels.triggers import ALWAYS, Trigger
from traces.kernels.vendors import SVM


@dataclass(frozen=True)
class Change:
    """One change of KVM's MMU, and what it changes in the description of a kernel.

    `fields` are fields of `Kernel` (a dot goes one level deeper) with their new values; the sets `unloads` and `points`
    change by +name and -name. `backports` are the first releases of the stable series that have the change, too.
    """

    since: tuple[int, int]
    what: str
    commits: tuple[str, ...] = ()
    backports: tuple[Version, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    unloads: tuple[str, ...] = ()
    points: tuple[str, ...] = ()

    def holds(self, version: Version) -> bool:
        """Whether a kernel of this version has the change."""
        return version >= (*self.since, 0) or any(
            version[:2] == first[:2] and version >= first for first in self.backports
        )


def _role(*, gpte: str, nx: str, more: tuple[tuple[str, int, int], ...] = ()) -> tuple[tuple[str, int, int], ...]:
    return (
        ("level", 0, 4), (gpte, 4, 1), ("quadrant", 5, 2), ("direct", 7, 1), ("access", 8, 3), ("invalid", 11, 1),
        (nx, 12, 1), ("cr0_wp", 13, 1), ("smep_andnot_wp", 14, 1), ("smap_andnot_wp", 15, 1), ("ad_disabled", 16, 1),
        ("guest_mode", 17, 1), *more, ("smm", 24, 8),
    )  # fmt: skip


_PASSTHROUGH: Final = ("passthrough", 18, 1)
_MIRROR: Final = ("is_mirror", 19, 1)
_WIDE_ROLE: Final = (
    ("level", 0, 4), ("has_4_byte_gpte", 4, 1), ("quadrant", 5, 2), ("direct", 7, 1), ("access", 8, 4),
    ("invalid", 12, 1), ("efer_nx", 13, 1), ("cr0_wp", 14, 1), ("smap_andnot_wp", 15, 1), ("ad_disabled", 16, 1),
    ("guest_mode", 17, 1), _PASSTHROUGH, _MIRROR, ("cr4_smep", 20, 1), ("smm", 24, 8),
)  # fmt: skip

_ABSENT: Final = 1 << 63  # suppresses #VE, so that it is set in every entry that maps nothing

FIRST: Final = Kernel(
    name="5.10",
    version=(5, 10, 0),
    policy="sync",  # faf72962bc4e: kvm_tdp_mmu_free_root under the spinlock
    unloads=ALWAYS | {Trigger.CR0_WP, Trigger.CR4_PGE, Trigger.CR4_PCIDE, Trigger.INVPCID},
    guest_owns_wp=False,
    zap_all_fast="empty",
    request="reload",
    search_puts=False,
    layout=RoleLayout(_role(gpte="gpte_is_8_bytes", nx="nxe"), guest_bits=True),
    flush_per_table=True,
    zap_tables=True,
    slot_zap=False,
    zap_leafs_once=False,
    split_in_place=False,
    eager_split=False,
    recovers=False,
    fast=False,
    spte=SpteLayout(
        present=0,
        type_shift=52,
        nonpresent=0,
        frozen=None,
        host_writable=(1 << 10, 1 << 10),
        mmu_writable=(1 << 11, 1 << 11),
    ),
    ret_pf=ReturnCodes(retry=0, emulate=1, invalid=2, fixed=3, spurious=4),
    passes=(),
    children_first=False,
    zapped_as_frozen=False,
    ends_exclusively=False,
    points=frozenset({
        "kvmmmu:kvm_mmu_get_page", "kvmmmu:kvm_mmu_prepare_zap_page", "kvmmmu:kvm_mmu_sync_page",
        "kvmmmu:kvm_mmu_unsync_page", "kvmmmu:kvm_mmu_spte_requested", "kvmmmu:kvm_mmu_set_spte",
        "kvmmmu:fast_page_fault", "kvmmmu:kvm_mmu_zap_all_fast", "kvmmmu:mark_mmio_spte",
        "kvmmmu:handle_mmio_page_fault", "kvmmmu:check_mmio_spte", "kvmmmu:kvm_mmu_pagetable_walk",
        "kvmmmu:kvm_mmu_paging_element", "kvmmmu:kvm_mmu_set_accessed_bit", "kvmmmu:kvm_mmu_set_dirty_bit",
        "kvmmmu:kvm_mmu_walker_error", "kvm:kvm_page_fault", "kvm:kvm_entry", "kvm:kvm_exit", "kvm:kvm_enter_smm",
        "kvm:kvm_cr", "kvm:kvm_msr", "kvm:kvm_userspace_exit", "kvm:kvm_apicv_update_request", "kvm:kvm_nested_vmrun",
        "kvm:kvm_nested_vmexit", "kvm:kvm_emulate_insn", "kvm:kvm_pio", "kvm:kvm_mmio", "kvm:kvm_fast_mmio",
        "kvm:vcpu_match_mmio", "kvm:kvm_inj_exception",
        "kvm_mmu_load", "kvm_tdp_mmu_get_vcpu_root_hpa", "kvm_mmu_unload", "kvm_mmu_reset_context",
        "kvm_mmu_free_roots", "kvm_mmu_new_pgd", "mmu_free_root_page", "kvm_tdp_mmu_free_root",
        "kvm_tdp_mmu_zap_gfn_range", "kvm_tdp_mmu_zap_all", "kvm_mmu_zap_all", "kvm_arch_init_vm",
        "kvm_arch_destroy_vm", "syscalls:sys_enter_ioctl", "syscalls:sys_exit_ioctl", "sched:sched_switch",
        "sched:sched_wakeup",
    }),
    spte_changed=False,
    root_get_page=False,
    get_page_twice=False,
    child_level=1,  # taken from the entry that points to the child
    set_spte_when_spurious=True,
    # Debian 5.10.262: struct kvm_mmu_page of arch/x86/kvm/mmu/mmu_internal.h, checked in the lab against the role words
    # and table frames that the tracepoints print. There is no module BTF before 5.11.
    page_struct=(
        ("SP_UNSYNC", 48), ("SP_ROLE", 52), ("SP_GFN", 56), ("SP_SPT", 64), ("SP_REFS", 80), ("SP_TDP", 164),
    ),
    loads_share=False,
    faults_share=False,
    aging="locked",
    zap_lock="write",
    zap_counted=False,
    apicv="memslot",
    tdp_pages="list",
    nx_recovery="write",
    old_shadow_mmu=True,
    prefetches_tail=False,
    mmu_seq_int=False,
    pte_list_ext=3,
    vendor=SVM,
)  # fmt: skip

# The stable releases that took edbdb43fc96b; 01b31714bd90 was taken earlier in the same spring.
_STABLE_2023: Final = ((6, 1, 50), (6, 2, 15), (6, 3, 2))

CHANGES: Final = (
    # 5.11
    Change((5, 11), "BTF of modules tells struct kvm_mmu_page", fields={"page_struct": ()}),
    # 5.12
    Change((5, 12), "TDP faults take mmu_lock, now an rwlock, for read", ("a2855afc7ee8",), fields={
        "faults_share": True, "fast": True, "spte.frozen": 0x5A0, "zapped_as_frozen": True,
    }),
    Change((5, 12), "zap_all_fast marks roots invalid, then zaps them, instead of emptying them",
        ("2bdb3d84ce52",), fields={"zap_all_fast": "invalidate"}, points=(
            "+kvm_tdp_mmu_put_root", "+kvm_tdp_mmu_invalidate_all_roots", "+kvm_tdp_mmu_zap_invalidated_roots",
            "-kvm_tdp_mmu_zap_gfn_range", "+__kvm_tdp_mmu_zap_gfn_range",
        )),
    Change((5, 12), "tables of the TDP MMU are freed by RCU", ("7cca2d0b7e7d",),
        points=("+tdp_mmu_free_sp_rcu_callback", "-kvm_tdp_mmu_free_root")),
    Change((5, 12), "an SPTE has a bit for \"present\"; dated by 5.15's source", ("edea7c4fc215",), fields={
        "spte.present": 1 << 11, "spte.host_writable": (1 << 9, 1 << 57), "spte.mmu_writable": (1 << 10, 1 << 58),
    }),
    Change((5, 12), "each change of a TDP SPTE is an event; a table's level is its own; first release inferred",
        fields={"spte_changed": True, "child_level": 0}, points=("+kvmmmu:kvm_tdp_mmu_spte_changed",)),
    Change((5, 12), "CR4.PGE, CR4.PCIDE and INVPCID flush, and unload no more; first release before 5.15 inferred",
        unloads=("-CR4_PGE", "-CR4_PCIDE", "-INVPCID")),
    Change((5, 12), "a shadow lookup zaps unsync pages in its way; first release before 6.1 inferred",
        fields={"old_shadow_mmu": False}),
    # 5.13
    Change((5, 13), "a TDP root's creation is an event, and a table's comes twice",
        fields={"root_get_page": True, "get_page_twice": True}),
    Change((5, 13), "zaps under the read lock", ("6103bc074048",), fields={"zap_lock": "read"}),
    Change((5, 13), "MMU notifiers have events; first release before 6.1 inferred", points=(
        "+kvm:kvm_unmap_hva_range", "+kvm:kvm_age_hva", "+kvm:kvm_test_age_hva", "+kvm:kvm_set_spte_hva",
    )),
    Change((5, 13), "pte_list_desc may hold other than 3 SPTEs: not read until 6.1", fields={"pte_list_ext": 0}),
    # 5.15
    Change((5, 15), "write lock again, with count and sequence; the APIC memslot stays",
        ("5a324c24b638", "edb298c663fc", "36222b117e36"),
        fields={"zap_lock": "write", "zap_counted": True, "apicv": "gfn"}),
    Change((5, 15), "the role's bit of EFER.NX is called efer_nx; first release after 5.10 inferred",
        fields={"layout.fields": _role(gpte="gpte_is_8_bytes", nx="efer_nx")}),
    Change((5, 15), "the shadow MMU prefetches behind the fault, too; first release after 5.10 inferred",
        fields={"prefetches_tail": True}),
    # 5.17
    Change((5, 17), "role bit 4 says that guest entries have 4 bytes, not 8; late 5.15.y has it, too (BTF tells)",
        fields={"layout.fields": _role(gpte="has_4_byte_gpte", nx="efer_nx")}),
    Change((5, 17), "kvm_enter_smm is called kvm_smm_transition",
        points=("-kvm:kvm_enter_smm", "+kvm:kvm_smm_transition")),
    Change((5, 17), "mmu_seq is an int where faults compare it: after 2^31 invalidations every fault looks stale",
        ("a955cad84cda",), fields={"mmu_seq_int": True}),
    # 5.18
    Change((5, 18), "the last put marks the root invalid; a worker zaps and frees it",
        ("22b94c4b63eb", "efd995dae5eb"), fields={"policy": "async"}, points=("+tdp_mmu_zap_root_work",)),
    Change((5, 18), "after an invalidation vCPUs give up invalid roots only", ("527d5cd7eece",),
        fields={"request": "obsolete"}, points=("+kvm_mmu_free_obsolete_roots",)),
    Change((5, 18), "a root is zapped in two passes: 1 GiB entries, then its own", ("1b6043e8e5c2",),
        fields={"passes": (3, 0)}, points=("+__tdp_mmu_zap_root", "+tdp_mmu_zap_root")),
    Change((5, 18), "a range zap removes leaves only, and flushes once", fields={
        "zap_tables": False, "flush_per_table": False,
    }, points=("-__kvm_tdp_mmu_zap_gfn_range", "+kvm_tdp_mmu_zap_leafs")),
    Change((5, 18), "dirty logging splits huge leaves as it begins", ("a3fe5dbda0a4",),
        fields={"eager_split": True}, points=("+kvmmmu:kvm_mmu_split_huge_page",)),
    Change((5, 18), "a table's creation is one event again; first release before 6.1 inferred",
        fields={"get_page_twice": False}),
    Change((5, 18), "RET_PF_CONTINUE comes first and shifts the codes; posted in April 2022, so perhaps 5.19",
        ("5276c616abf1",), fields={
            "ret_pf.retry": 1, "ret_pf.emulate": 2, "ret_pf.invalid": 3, "ret_pf.fixed": 4, "ret_pf.spurious": 5,
        }),
    Change((5, 18), "APICv inhibits have reasons: kvm_apicv_inhibit_changed",
        points=("-kvm:kvm_apicv_update_request", "+kvm:kvm_apicv_inhibit_changed")),
    # 5.19
    Change((5, 19), "CR0.WP and EFER.NX of the guest are no longer in TDP role words; first release inferred",
        fields={"layout.guest_bits": False}),
    # 6.1
    Change((6, 1), "SPTEs of a page in chains of 14, not of 3", fields={"pte_list_ext": 14}),
    Change((6, 1), "role bit 18 is passthrough; first release after 5.18 inferred",
        fields={"layout.fields": _role(gpte="has_4_byte_gpte", nx="efer_nx", more=(_PASSTHROUGH,))}),
    Change((6, 1), "kvm_nested_vmrun is called kvm_nested_vmenter, for both vendors; recorded on 6.1.192",
        points=("-kvm:kvm_nested_vmrun", "+kvm:kvm_nested_vmenter")),
    # 6.2
    Change((6, 2), "tables are counted, not listed", ("d25ceb926436",), fields={"tdp_pages": "counter"}),
    # 6.3
    Change((6, 3), "a small fault below a huge leaf splits it in place", ("c4b33d28ea51",),
        fields={"split_in_place": True}),
    Change((6, 3), "mmu_seq is the unsigned long that it is; a refactoring, and a fix of its own in 6.1.50",
        (), ((6, 1, 50),), fields={"mmu_seq_int": False}),
    # 6.4
    Change((6, 4), "roots stay until they are invalidated", ("edbdb43fc96b",), _STABLE_2023,
        fields={"policy": "preserve-worker"}),
    Change((6, 4), "CR0.WP alone unloads no more (TDP); the stable releases are not pinned", ("01b31714bd90",),
        _STABLE_2023, unloads=("-CR0_WP",)),
    Change((6, 4), "with EPT the guest owns CR0.WP: writes of it cause no exit; of the same series as the one before",
        ("fb509f76acc8",), _STABLE_2023, fields={"guest_owns_wp": True}),
    # 6.6
    Change((6, 6), "the task that invalidates zaps the roots; no worker", ("0df9dab891ff",), ((6, 1, 50),),
        fields={"policy": "preserve"}, points=("-tdp_mmu_zap_root_work",)),
    # 6.9
    Change((6, 9), "roots are loaded, found and put under mmu_lock for read", ("f5238c2a60f1",),
        fields={"loads_share": True, "search_puts": True},
        points=("-kvm_tdp_mmu_get_vcpu_root_hpa", "+kvm_tdp_mmu_alloc_root")),
    Change((6, 9), "a root is zapped in four passes: 4 KiB, 2 MiB, 1 GiB, its own", ("8ca983631f3c",),
        fields={"passes": (1, 2, 3, 0)}),
    Change((6, 9), "an entry that maps nothing has bit 63 set; first release before 6.12 inferred",
        fields={"spte.nonpresent": _ABSENT, "spte.frozen": _ABSENT | 0x5A0}),
    Change((6, 9), "a single entry zapped under the read lock is shown absent; first release before 6.12 inferred",
        fields={"zapped_as_frozen": False}),
    Change((6, 9), "a range zap is one call, and leaves invalid roots alone; first release before 6.12 inferred",
        fields={"zap_leafs_once": True}),
    # 6.10
    Change((6, 10), "the notifier that changes one page is gone; first release before 6.12 inferred",
        points=("-kvm:kvm_set_spte_hva",)),
    # 6.12
    Change((6, 12), "RET_PF_WRITE_PROTECTED shifts the codes after it", ("989a84c93f59",), fields={
        "ret_pf.write_protected": 3, "ret_pf.invalid": 4, "ret_pf.fixed": 5, "ret_pf.spurious": 6,
    }),
    Change((6, 12), "a VMM may have a deleted memslot's leaves zapped alone (KVM_X86_QUIRK_SLOT_ZAP_ALL off)",
        fields={"slot_zap": True}),
    # 6.13
    Change((6, 13), "when dirty logging ends, huge leaves are put back in place of tables", ("13e2e4f62a4b",),
        fields={"recovers": True}),
    # 6.14
    Change((6, 14), "mirror roots (TDX): a role bit, and roots are invalidated by type",
        fields={"layout.fields": _role(gpte="has_4_byte_gpte", nx="efer_nx", more=(_PASSTHROUGH, _MIRROR)),
            "ends_exclusively": True},
        points=("-kvm_tdp_mmu_invalidate_all_roots", "+kvm_tdp_mmu_invalidate_roots")),
    # 6.15
    Change((6, 15), "aging without mmu_lock", ("b146a9b34aed", "af3b6a9eba48"), fields={"aging": "lockless"}),
    # 6.18
    Change((6, 18), "NX huge pages of the TDP MMU are recovered under the read lock", fields={"nx_recovery": "read"}),
    # 7.x
    Change((7, 0), "access of 4 bits in the role, and CR4.SMEP; first release before 7.2 not pinned",
        fields={"layout.fields": _WIDE_ROLE}),
    Change((7, 0), "a removed entry is shown after what was below it; first release after 6.18 not pinned",
        fields={"children_first": True}),
    Change((7, 0), "kvm_mmu_set_spte is silent where the leaf was there; first release after 6.12 not pinned",
        fields={"set_spte_when_spurious": False}),
    Change((7, 3), "SPTE types in bits 61:60, other bits for writable EPT entries; recorded on 7.3-rc7", fields={
        "spte.type_shift": 60, "spte.frozen": _ABSENT | 0x1A0,
        "spte.host_writable": (1 << 9, 1 << 53), "spte.mmu_writable": (1 << 10, 1 << 55),
    }),
)  # fmt: skip
