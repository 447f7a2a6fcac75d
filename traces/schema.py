# SPDX-License-Identifier: Apache-2.0
"""What an event is: the kinds, the columns each kind fills, and the fixed-size record the probes write.

This table is the single place that binds the BPF programs (which fill the record's four words), the segments (which
store the record as it is) and the Parquet trace (which stores named columns). Adding a kind is one line here and one
probe in `tracer/probing/probes.py`. The written contract is SPEC.md next to this file.

Units: `time` is CLOCK_BOOTTIME in ns, addresses are bytes, `gfn` and `table` are page frame numbers, SPTEs are raw
words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FORMAT_MAJOR: Final = 1
FORMAT_MINOR: Final = 4

# Every row carries these; a kind adds the ones it names in the table below.
COMMON_COLUMNS: Final = ("seq", "time", "vm", "vcpu", "cpu", "tid", "kind")


@dataclass(frozen=True)
class Kind:
    """One kind of event: `words` names the columns its four 64-bit words hold, `count` the column of its 32-bit count.

    `fixed` lists which of the record's own small fields (root, role, level, as_id) the kind fills; `flags` says what
    the bits of the flags column mean, lowest first.
    """

    code: int
    name: str
    meaning: str
    words: tuple[str, ...] = ()
    count: str = ""
    fixed: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns beyond the common ones that this kind fills."""
        return (*self.fixed, *self.words, *((self.count,) if self.count else ()), *(("flags",) if self.flags else ()))


def _kinds() -> tuple[Kind, ...]:
    page = ("root", "role", "level")
    function = ("root", "role")
    return (
        # The recorder's own
        Kind(0, "gap", "events were lost on this CPU since `addr`", ("value", "code", "addr")),
        # kvmmmu:* tracepoints
        Kind(
            1,
            "kvm_mmu_get_page",
            "a table page was created or found",
            ("gfn", "table"),
            "refs",
            page,
            ("created", "unsync"),
        ),
        Kind(
            2,
            "kvm_mmu_prepare_zap_page",
            "a table page is being removed",
            ("gfn", "table"),
            "refs",
            page,
            ("", "unsync"),
        ),
        Kind(
            3,
            "kvm_mmu_sync_page",
            "an unsync shadow page is being synced",
            ("gfn", "table"),
            "refs",
            page,
            ("", "unsync"),
        ),
        Kind(
            4, "kvm_mmu_unsync_page", "a shadow page goes out of sync", ("gfn", "table"), "refs", page, ("", "unsync")
        ),
        Kind(
            5,
            "kvm_mmu_spte_requested",
            "a fault is about to map `value` (pfn)",
            ("gfn", "value"),
            "",
            ("root", "level"),
        ),
        Kind(6, "kvm_mmu_set_spte", "a leaf SPTE was installed", ("gfn", "new", "table"), "", ("root", "level")),
        Kind(
            7, "kvm_tdp_mmu_spte_changed", "a TDP SPTE changed", ("gfn", "old", "new"), "", ("root", "level", "as_id")
        ),
        Kind(
            8, "fast_page_fault", "a fault was tried without mmu_lock", ("addr", "code", "old", "new"), "ret", ("root",)
        ),
        Kind(
            9,
            "kvm_mmu_zap_all_fast",
            "all roots are being invalidated; `value` is shadow pages in use",
            ("value",),
            "",
            (),
            ("generation",),
        ),
        Kind(10, "kvm_mmu_split_huge_page", "a huge SPTE was split", ("gfn", "old"), "ret", ("level",)),
        Kind(
            11,
            "mark_mmio_spte",
            "an MMIO SPTE was cached; `value` is its generation",
            ("gfn", "code", "value"),
            "",
            ("root",),
        ),
        Kind(12, "handle_mmio_page_fault", "a fault hit a cached MMIO SPTE", ("addr", "gfn", "code"), "", ("root",)),
        Kind(
            13, "check_mmio_spte", "an MMIO SPTE's generation (`code`) met the VM's (`value`)", ("old", "value", "code")
        ),
        Kind(14, "kvm_mmu_pagetable_walk", "the guest's page tables are being walked", ("addr", "code")),
        Kind(15, "kvm_mmu_paging_element", "one guest page-table entry was read", ("value",), "", ("level",)),
        Kind(16, "kvm_mmu_set_accessed_bit", "a guest accessed bit was set", ("addr",)),
        Kind(17, "kvm_mmu_set_dirty_bit", "a guest dirty bit was set", ("addr",)),
        Kind(18, "kvm_mmu_walker_error", "a guest page-table walk failed", ("code",)),
        # kvm:* tracepoints
        Kind(
            19,
            "kvm_page_fault",
            "the guest faulted in the second-level or shadow tables",
            ("addr", "code", "rip"),
            "",
            function,
        ),
        Kind(20, "kvm_entry", "the vCPU enters the guest", ("rip",), "", ("root",), ("immediate_exit",)),
        Kind(
            21,
            "kvm_exit",
            "the vCPU left the guest: reason, RIP, exit info 1 and 2",
            ("code", "rip", "value", "addr"),
        ),
        Kind(22, "kvm_smm_transition", "SMM entered or left; `addr` is SMBASE", ("addr",), "", (), ("entering",)),
        Kind(23, "kvm_cr", "a control register access exited", ("code", "value"), "", (), ("write",)),
        Kind(24, "kvm_msr", "an MSR access exited", ("code", "value"), "", (), ("write", "exception")),
        Kind(25, "kvm_userspace_exit", "KVM_RUN returns to userspace", ("code",), "ret"),
        Kind(26, "kvm_unmap_hva_range", "an MMU notifier unmaps host addresses [addr, value)", ("addr", "value")),
        Kind(27, "kvm_age_hva", "an MMU notifier ages host addresses [addr, value)", ("addr", "value")),
        Kind(28, "kvm_test_age_hva", "an MMU notifier asks whether `addr` was accessed", ("addr",)),
        Kind(
            29, "kvm_apicv_inhibit_changed", "an APICv inhibit was set or cleared", ("code", "value"), "", (), ("set",)
        ),
        Kind(30, "kvm_nested_vmenter", "a nested guest is entered", ("rip", "addr", "value")),
        Kind(31, "kvm_nested_vmexit", "a nested guest exits", ("code", "rip", "value", "addr")),
        Kind(32, "kvm_emulate_insn", "KVM emulates an instruction", ("rip",), "", (), ("failed",)),
        Kind(33, "kvm_pio", "port I/O: port, value", ("code", "value"), "", (), ("write",)),
        Kind(34, "kvm_mmio", "emulated MMIO: length in `code`", ("addr", "value", "code"), "", (), ("unsatisfied",)),
        Kind(35, "kvm_fast_mmio", "an MMIO eventfd was hit without emulation", ("addr",)),
        Kind(36, "vcpu_match_mmio", "the vCPU's MMIO cache was hit", ("addr",), "", (), ("write",)),
        Kind(37, "kvm_set_spte_hva", "an MMU notifier changes the page behind `addr`", ("addr",)),
        Kind(
            38,
            "kvm_inj_exception",
            "an exception is injected: vector, error code",
            ("code", "value"),
            "",
            (),
            ("has_error",),
        ),
        Kind(39, "other", "of an import: an event that no kind is for, in the column `text`"),
        # Functions of the root's life, by meaning; the probe table says which function each kernel has.
        Kind(40, "mmu_load", "the vCPU loaded a root (at return)", (), "ret", function),
        Kind(41, "mmu_unload", "the vCPU empties all its root slots", (), "", function),
        Kind(42, "mmu_reset", "the vCPU's MMU context is reset", (), "", function),
        Kind(43, "mmu_free_roots", "root slots in the mask `value` are emptied", ("value",), "", function),
        Kind(44, "mmu_free_obsolete_roots", "slots holding invalid roots are emptied", (), "", function),
        Kind(45, "root_get", "a root was found or created for the vCPU (at return)", (), "refs", function),
        Kind(46, "root_put", "a reference on a root is dropped; `refs` before the put", ("table",), "refs", function),
        Kind(
            47,
            "table_free",
            "a table page (a root where `root` is set) returns to the allocator",
            ("gfn", "table"),
            "refs",
            page,
        ),
        Kind(48, "roots_invalidate", "every valid root of the VM is marked invalid", ("value",)),
        Kind(
            49,
            "zap_root_begin",
            "one root's tree is being zapped, in the pass for `level`",
            (),
            "refs",
            page,
            ("shared",),
        ),
        Kind(50, "zap_root_end", "that zap is done", (), "", ("root",)),
        Kind(51, "zap_invalidated_begin", "the invalidating task zaps the invalid roots", (), "", ()),
        Kind(52, "zap_invalidated_end", "that zap is done", (), "", ()),
        Kind(53, "zap_leafs", "leaves in [gfn, value) are zapped in every root", ("gfn", "value"), "", ("as_id",)),
        Kind(54, "zap_all", "every root is emptied (exit of the VM's process, or 5.10 invalidation)"),
        Kind(55, "vm_destroy", "the VM is being destroyed"),
        Kind(56, "vm_create", "first ioctl on a new VM's descriptor"),
        Kind(57, "ioctl", "a KVM ioctl other than KVM_RUN: command, argument", ("code", "value")),
        Kind(58, "ioctl_end", "that ioctl returned", ("code",), "ret"),
        Kind(
            59,
            "memslot",
            "KVM_SET_USER_MEMORY_REGION: first gfn, hva, pages, flags",
            ("gfn", "addr", "value", "code"),
            "slot",
            ("as_id",),
        ),
        Kind(60, "new_pgd", "a new guest page-table root is selected", ("value",), "", function),
        # Host time that vCPUs did not get
        Kind(
            61,
            "sched_in",
            "the vCPU's thread runs again, off its CPU since `addr`; `value`: ns of it that it waited for a CPU",
            ("addr", "value", "code"),
            "",
            (),
            ("preempted",),
        ),
        Kind(62, "host_suspend", "between `addr` and `time` the host slept, `value` ns", ("addr", "value")),
        Kind(63, "left_out", "from `addr` on kinds of `value` are not recorded; 0: all are", ("addr", "value", "code")),
    )


KINDS: Final = _kinds()
BY_NAME: Final = {kind.name: kind for kind in KINDS}
BY_CODE: Final = {kind.code: kind for kind in KINDS}
# Kinds that no probe writes, but the recorder itself, or an import.
OWN_KINDS: Final = ("gap", "host_suspend", "left_out", "other")

# The record as the probes write it: (field, numpy type). 80 bytes, naturally aligned, no padding.
RECORD_FIELDS: Final = (
    ("time", "u8"),
    ("kvm", "u8"),  # struct kvm pointer, 0 where the probe could not know it
    ("root", "u8"),  # table frame of the root concerned, 0 where unknown or none
    ("w0", "u8"),
    ("w1", "u8"),
    ("w2", "u8"),
    ("w3", "u8"),
    ("tid", "u4"),
    ("tgid", "u4"),
    ("role", "u4"),
    ("n", "i4"),
    ("cpu", "u2"),
    ("vcpu", "i2"),  # -1: not a vCPU's thread
    ("kind", "u1"),
    ("level", "u1"),
    ("flags", "u1"),
    ("as_id", "u1"),
)
RECORD_SIZE: Final = 80

# Rows of a kind that the recording's own version did not know; `code` then holds the kind's number.
UNKNOWN: Final = "unknown"

# The named columns of a trace and their Parquet types; `kind` is a dictionary of names.
COLUMN_TYPES: Final = {
    "seq": "int64",
    "time": "int64",
    "vm": "int32",
    "vcpu": "int16",
    "cpu": "int16",
    "tid": "int32",
    "kind": "kind",
    "root": "int32",
    "role": "uint32",
    "level": "int8",
    "as_id": "int8",
    "gfn": "int64",
    "old": "uint64",
    "new": "uint64",
    "table": "int64",
    "addr": "uint64",
    "code": "uint64",
    "value": "uint64",
    "rip": "uint64",
    "refs": "int32",
    "ret": "int32",
    "slot": "int32",
    "flags": "uint8",
}

# Null where the row's kind does not fill the column, or where it is not known; every other column is then 0, which is
# no id, no frame and no role. Here 0 is a real place.
NULLABLE: Final = ("vm", "vcpu", "gfn")
