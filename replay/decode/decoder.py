# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Decode the rows of one VM, one row at a time, into its inputs: what happened to it that no root policy decides.

Inputs are operations (`simulate.operations`), and triggers, which become operations for a certain kernel version
(`inputs` explains their columns). Each kind of row becomes:

    kvm_mmu_set_spte, mark_mmio_spte   the vCPU needed a page: TOUCH; or FIX where the leaf was there already
    fast_page_fault                    FIX, where it was repaired without mmu_lock
    kvm_smm_transition, mmu_reset,
    kvm_cr, exits that write CR0/CR4   a trigger: an unload under some kernels
    root_get or mmu_load               ROLE and ENTER: a root was loaded
    new_pgd                            SWITCH, where a nested guest without nested paging is entered or left
    kvm_entry                          ENTER, where a vCPU may have to load though the recorded one did not
    kvm_mmu_zap_all_fast               INVALIDATE
    zap_leafs, kvm_unmap_hva_range     ZAP of a range
    memslot, kvm_tdp_mmu_spte_changed  SPLIT and COLLAPSE, where dirty logging begins and ends; COLLAPSE also where NX
                                       huge page recovery takes a table; ZAP, where a memslot takes its leaves with it
    kvm_mmu_split_huge_page            FIX, by a fault that needs a part of a huge page executable or writable
    zap_all, vm_destroy                ZAP_ALL, END

The cause of a reset is what the same vCPU did since it last left the guest. Resets come in pairs (entering SMM resets
twice) and from more than one function; the first since the exit, or since the last load, is the one that empties slots.

Times belong to exits. Each exit of a vCPU that has an input gets a record: the time until then that belongs to no input
(`lead`), and the times of faults, loads and unloads in it. An exit is complete when the next one begins; its inputs are
held back until then, because a later row of the exit may still change the meaning of an input.

This is Cython in pure-Python mode, like `simulate.compiled`. Only rare rows allocate memory here: `run` stops before a
row for which there may be no room, and `vm_inputs` makes room.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from replay.decode.exits import CODES, Left, exit_meanings
from replay.decode.inferred import GONE_PAGE, GONE_TABLE, Unseen
from replay.decode.inputs import (
    BUILT_ROOT,
    HAS_ENTER,
    HAS_HIDDEN,
    HAS_ROLE,
    HAS_TOUCH,
    HAS_TRIGGER,
    HIDDEN,
    NO_STATE,
    STATE_SHIFT,
    TRIGGER,
    WAS_STILL,
)
from replay.decode.vcpu_states import INTERRUPT, NO_SPAN, STILL, VcpuState
from replay.simulate.operations import FOR_GOOD, Op
from replay.simulate.pools import as_bytes, as_structures, make_pool
from traces.kernels import roles, triggers
from traces.kernels.spte import LARGE
from traces.kernels.triggers import Trigger
from traces.schema import BY_NAME

COMPILED: bool = cython.compiled

_NONE = cython.declare(cython.longlong, -1)
_PAGE_BITS = cython.declare(cython.int, 9)  # of a table's index

# The meaning of a row by kind, as an index into MEANINGS. From _OF_VM on, rows are about the VM as a whole.
_NOTHING = cython.declare(cython.int, 0)
_EXIT = cython.declare(cython.int, 1)
_ENTRY = cython.declare(cython.int, 2)
_FAULT = cython.declare(cython.int, 3)
_REQUESTED = cython.declare(cython.int, 4)
_SET = cython.declare(cython.int, 5)
_MARK = cython.declare(cython.int, 6)
_FAST = cython.declare(cython.int, 7)
_GET_PAGE = cython.declare(cython.int, 8)
_ROOT_GET = cython.declare(cython.int, 9)
_MMU_LOAD = cython.declare(cython.int, 10)
_RESET = cython.declare(cython.int, 11)
_UNLOAD = cython.declare(cython.int, 12)
_SMM_MOVE = cython.declare(cython.int, 13)
_CR = cython.declare(cython.int, 14)
_MSR = cython.declare(cython.int, 15)
_IOCTL_BEGIN = cython.declare(cython.int, 16)
_NEW_PGD = cython.declare(cython.int, 17)
_SPLIT_HUGE = cython.declare(cython.int, 18)
_USER_EXIT = cython.declare(cython.int, 19)
_OF_VM = cython.declare(cython.int, 20)
_CHANGED = cython.declare(cython.int, 20)
_IOCTL_END = cython.declare(cython.int, 21)
_INVALIDATE = cython.declare(cython.int, 22)
_ZAP_LEAFS = cython.declare(cython.int, 23)
_UNMAP = cython.declare(cython.int, 24)
_ZAP_ALL = cython.declare(cython.int, 25)
_MEMSLOT = cython.declare(cython.int, 26)
_DESTROY = cython.declare(cython.int, 27)
_NESTED = cython.declare(cython.int, 28)
_TABLE_FREE = cython.declare(cython.int, 29)
_ZAP_ROOT = cython.declare(cython.int, 30)
_ZAP_ROOT_END = cython.declare(cython.int, 31)
MEANINGS = (
    "", "kvm_exit", "kvm_entry", "kvm_page_fault", "kvm_mmu_spte_requested", "kvm_mmu_set_spte", "mark_mmio_spte",
    "fast_page_fault", "kvm_mmu_get_page", "root_get", "mmu_load", "mmu_reset", "mmu_unload", "kvm_smm_transition",
    "kvm_cr", "kvm_msr", "ioctl", "new_pgd", "kvm_mmu_split_huge_page", "kvm_userspace_exit",
    "kvm_tdp_mmu_spte_changed", "ioctl_end", "kvm_mmu_zap_all_fast", "zap_leafs", "kvm_unmap_hva_range", "zap_all",
    "memslot", "vm_destroy", "kvm_nested_vmenter", "table_free", "zap_root_begin", "zap_root_end",
)  # fmt: skip

_TOUCH = cython.declare(cython.uint, int(Op.TOUCH))
_FIX = cython.declare(cython.uint, int(Op.FIX))
_ENTER = cython.declare(cython.uint, int(Op.ENTER))
_ROLE = cython.declare(cython.uint, int(Op.ROLE))
_SWITCH = cython.declare(cython.uint, int(Op.SWITCH))
_OP_INVALIDATE = cython.declare(cython.uint, int(Op.INVALIDATE))
_ZAP = cython.declare(cython.uint, int(Op.ZAP))
_OP_ZAP_ALL = cython.declare(cython.uint, int(Op.ZAP_ALL))
_SPLIT = cython.declare(cython.uint, int(Op.SPLIT))
_COLLAPSE = cython.declare(cython.uint, int(Op.COLLAPSE))
_END = cython.declare(cython.uint, int(Op.END))
_TRIGGER = cython.declare(cython.uint, TRIGGER)
_HIDDEN = cython.declare(cython.uint, HIDDEN)
_RESETS = cython.declare(cython.uint, 1 << 13)
_LEVEL_SHIFT = cython.declare(cython.int, 4)
_FIRST_SHIFT = cython.declare(cython.int, 7)
_LAST_SHIFT = cython.declare(cython.int, 10)
_FOR_GOOD = cython.declare(cython.uint, FOR_GOOD)
_VCPU_SHIFT = cython.declare(cython.int, 16)
_STATE_SHIFT = cython.declare(cython.int, STATE_SHIFT)
_NO_STATE = cython.declare(cython.longlong, NO_STATE)
_HAS_TOUCH = cython.declare(cython.longlong, HAS_TOUCH)
_HAS_HIDDEN = cython.declare(cython.longlong, HAS_HIDDEN)
_HAS_ENTER = cython.declare(cython.longlong, HAS_ENTER)
_HAS_ROLE = cython.declare(cython.longlong, HAS_ROLE)
_HAS_TRIGGER = cython.declare(cython.longlong, HAS_TRIGGER)
_WAS_STILL = cython.declare(cython.uchar, WAS_STILL)
_BUILT_ROOT = cython.declare(cython.uchar, BUILT_ROOT)

_SMI = cython.declare(cython.longlong, int(Trigger.SMI))
_RSM = cython.declare(cython.longlong, int(Trigger.RSM))
_CR0_WP = cython.declare(cython.longlong, int(Trigger.CR0_WP))
_CR0 = cython.declare(cython.longlong, int(Trigger.CR0))
_CR4 = cython.declare(cython.longlong, int(Trigger.CR4))
_CR4_PGE = cython.declare(cython.longlong, int(Trigger.CR4_PGE))
_CR4_PCIDE = cython.declare(cython.longlong, int(Trigger.CR4_PCIDE))
_EFER = cython.declare(cython.longlong, int(Trigger.EFER))
_SREGS = cython.declare(cython.longlong, int(Trigger.SREGS))
_CPUID = cython.declare(cython.longlong, int(Trigger.CPUID))
_INVPCID = cython.declare(cython.longlong, int(Trigger.INVPCID))
_BY_EXIT = cython.declare(cython.longlong, int(Trigger.EXIT))
_OTHER = cython.declare(cython.longlong, int(Trigger.OTHER))
_CR0_SILENT = cython.declare(cython.longlong, int(Trigger.CR0_SILENT))
_CR4_SILENT = cython.declare(cython.longlong, int(Trigger.CR4_SILENT))
_CR0_RESET = cython.declare(cython.longlong, int(Trigger.CR0_RESET))
_CR4_RESET = cython.declare(cython.longlong, int(Trigger.CR4_RESET))
_NOT_SEEN = cython.declare(cython.longlong, int(Trigger.UNSEEN))

_IN_SMM = cython.declare(cython.longlong, roles.SMM)
_WP = cython.declare(cython.longlong, roles.WP)
_NX = cython.declare(cython.longlong, roles.NX)
_MAYBE_WP = cython.declare(cython.longlong, roles.MAYBE_WP)
_USUAL = cython.declare(cython.longlong, roles.USUAL)

_CR0_PG_BIT = cython.declare(cython.longlong, triggers.CR0_PG)
_CR0_WP_BIT = cython.declare(cython.longlong, triggers.CR0_WP)
_CR4_ROLE_BITS = cython.declare(cython.longlong, triggers.CR4_ROLE)
_CR4_PGE_BIT = cython.declare(cython.longlong, triggers.CR4_PGE)
_CR4_PCIDE_BIT = cython.declare(cython.longlong, triggers.CR4_PCIDE)
_EFER_MSR = cython.declare(cython.ulonglong, triggers.EFER_MSR)
_EFER_NX = cython.declare(cython.longlong, triggers.EFER_NX)
_EFER_ROLE = cython.declare(cython.longlong, triggers.EFER_ROLE)
_SET_SREGS = cython.declare(cython.longlong, triggers.SET_SREGS[0])
_SET_SREGS2 = cython.declare(cython.longlong, triggers.SET_SREGS[1])
_SET_CPUID2 = cython.declare(cython.longlong, triggers.SET_CPUID2)
_CODES = cython.declare(cython.ulonglong, CODES)
_BY_NOTHING = cython.declare(cython.longlong, int(Left.NEVER))
_BY_OTHER = cython.declare(cython.longlong, int(Left.OTHER_EXIT))
_BY_IO = cython.declare(cython.longlong, int(Left.IO))
_BY_CR0 = cython.declare(cython.longlong, int(Left.CR0_WRITE))
_BY_CR4 = cython.declare(cython.longlong, int(Left.CR4_WRITE))
_BY_MSR_WRITE = cython.declare(cython.longlong, int(Left.MSR_WRITE))
_BY_RSM = cython.declare(cython.longlong, int(Left.RSM))
_BY_UD = cython.declare(cython.longlong, int(Left.UNDEFINED))
_BY_INVPCID = cython.declare(cython.longlong, int(Left.INVPCID))
_BY_CR = cython.declare(cython.longlong, int(Left.CR))
_BY_MSR = cython.declare(cython.longlong, int(Left.MSR))
_TO_SREGS = cython.declare(cython.longlong, int(Left.SET_SREGS))
_TO_CPUID = cython.declare(cython.longlong, int(Left.SET_CPUID))
_TO_OTHER = cython.declare(cython.longlong, int(Left.OTHER_IOCTL))
_KVM_SMI = cython.declare(cython.ulonglong, 0xAEB7)
_LARGE = cython.declare(cython.ulonglong, LARGE)
_LEVEL5 = cython.declare(cython.longlong, roles.LEVEL5)
_NESTED_GUEST = cython.declare(cython.longlong, roles.GUEST)
_GUEST_MODE = cython.declare(cython.uint, 1 << 17)
_DIRECT = cython.declare(cython.uint, 1 << 7)
_GONE_PAGE = cython.declare(cython.int, GONE_PAGE)
_GONE_TABLE = cython.declare(cython.int, GONE_TABLE)

_NO_SPAN = cython.declare(cython.int, NO_SPAN)
_STILL = cython.declare(cython.int, STILL)
_INTERRUPT = cython.declare(cython.int, INTERRUPT)
_IS_GUEST = cython.declare(cython.int, int(VcpuState.GUEST))
_IS_FAULT = cython.declare(cython.int, int(VcpuState.FAULT))
_IS_LOAD = cython.declare(cython.int, int(VcpuState.LOAD))
_IS_UNLOAD = cython.declare(cython.int, int(VcpuState.UNLOAD))
_IS_ZAP = cython.declare(cython.int, int(VcpuState.ZAP))
_IS_PREFETCH = cython.declare(cython.int, int(VcpuState.PREFETCH))
_IS_OTHER = cython.declare(cython.int, int(VcpuState.OTHER))
_IS_SMM = cython.declare(cython.int, int(VcpuState.SMM))
_IS_USER = cython.declare(cython.int, int(VcpuState.USER))
_IS_IDLE = cython.declare(cython.int, int(VcpuState.IDLE))

Vcpu = cython.struct(  # the state of a vCPU after its last row; rows are given by their seq, -1 for none
    opened=cython.longlong,  # row of the last exit or ioctl
    why=cython.longlong,  # meaning of that exit or ioctl (`exits.Left`)
    loaded=cython.longlong,  # row of the last load of a root
    state=cython.longlong,  # state (`roles`) in the role word of the loaded root
    smm=cython.longlong,  # row of the last SMM transition
    reset=cython.longlong,  # row of the last reset or unload
    unloaded=cython.longlong,  # row of the last trigger that unloads
    cr0_reset=cython.longlong,  # row of the last reset for a write of CR0 of unknown value
    cr0_input=cython.longlong,  # number of the input made of it
    entered=cython.longlong,  # row of the last entry
    root=cython.longlong,  # root at the last entry
    dirty=cython.longlong,  # the vCPU may have to load at its next entry
    invalidated=cython.longlong,  # number of invalidations that the vCPU has served
    started=cython.longlong,  # a root of the vCPU is known
    touch=cython.longlong,  # row of the last touch
    touch_input=cython.longlong,  # number of the input made of it
    requested=cython.longlong,  # gfn that the fault under way is about to map
    requested_level=cython.longlong,  # level at which it will be mapped
    split=cython.longlong,  # row of the last fault that split a huge leaf in place
    marked=cython.longlong,  # gfn of the MMIO SPTE that the fault under way has made; -1: none
    present=cython.longlong,  # the last fault was on a leaf that was present
    faulted=cython.longlong,  # row of the last fault
    built=cython.longlong,  # row at which the vCPU last built a table
    built_at=cython.longlong,  # gfn of that table
    wp_flips=cython.longlong,  # parity of writes that changed CR0.WP, where the role word does not have the bit
    maybe_flips=cython.longlong,  # parity of writes of CR0 of unknown value
    efer=cython.longlong,  # last value written to EFER; -1: none
    cr0=cython.longlong,  # last value written to CR0; -1: none
    cr4=cython.longlong,  # last value written to CR4; -1: none
    wrote=cython.longlong,  # row of the last write of CR0 or CR4 of known value
    wrote_trigger=cython.longlong,  # trigger of that write; -1: none
    left=cython.longlong,  # row of the last exit
    left_by_io=cython.longlong,  # that exit was for port I/O
    asked_smi=cython.longlong,  # row of the last KVM_SMI ioctl by the vCPU's thread
    # The exit under way
    record=cython.longlong,  # number of its record; -1: it has no input yet
    first=cython.longlong,  # number of its first input
    has=cython.longlong,  # which inputs it has (`inputs.HAS_*`)
    ns=cython.longlong[12],  # times by VcpuState
    tables=cython.longlong,
    built_root=cython.longlong,
    still=cython.longlong,
    interrupt=cython.longlong,
    # Time after the last exit with an input: ns in all, in the guest, and halted
    lead=cython.longlong,
    lead_guest=cython.longlong,
    lead_idle=cython.longlong,
    # Sums
    zapped=cython.longlong,  # ns of inline zaps; they depend on the policy
    prefetched=cython.longlong,  # ns of prefetches; they depend on the policy
    rows=cython.longlong,  # number of rows of the vCPU's thread
    fault_rows=cython.longlong,
    faults=cython.longlong,
    interrupts=cython.longlong,  # number of exits for interrupts of the host
    interrupted=cython.longlong,  # ns that those exits took
    nesting=cython.longlong,  # a nested guest was entered, and no root of it was seen yet
)


@cython.final
@cython.cclass
class Decoder:
    """Decodes the rows of one VM into inputs; `vm_inputs.VmInputs` provides the memory and takes the inputs.

    `counts` is the number of triggers of each kind. `nested` is the number of entries of nested guests, `inferred` that
    of inferred removals, and `hidden` that of prefetches. `by_guest` SMIs followed port I/O of the guest, or a KVM_SMI
    ioctl, and `by_clock` SMIs did not. `began` is the time of the VM's first entry, or -1 if it has none.
    """

    vcpus = cython.declare(object, visibility="public")  # rows of Vcpu
    counts = cython.declare(object, visibility="public")
    ended = cython.declare(cython.bint, visibility="public")
    nested = cython.declare(cython.longlong, visibility="public")
    inferred = cython.declare(cython.longlong, visibility="public")
    hidden = cython.declare(cython.longlong, visibility="public")
    by_guest = cython.declare(cython.longlong, visibility="public")
    by_clock = cython.declare(cython.longlong, visibility="public")
    began = cython.declare(cython.longlong, visibility="public")
    # Numbers of inputs, of records of exits and of ranges that are held
    inputs = cython.declare(cython.longlong, visibility="public")
    records = cython.declare(cython.longlong, visibility="public")
    ranges = cython.declare(cython.longlong, visibility="public")

    _room: cython.longlong
    _op: cython.uint[::1]
    _gfn: cython.longlong[::1]
    _time: cython.longlong[::1]
    _seq: cython.longlong[::1]
    _exit: cython.int[::1]
    _start: cython.longlong[::1]
    _end: cython.longlong[::1]
    _lead: cython.longlong[::1]
    _guest: cython.longlong[::1]
    _idle: cython.longlong[::1]
    _fault: cython.longlong[::1]
    _load: cython.longlong[::1]
    _unload: cython.longlong[::1]
    _tables: cython.uchar[::1]
    _has: cython.uint[::1]
    _flags: cython.uchar[::1]

    _vcpu: cython.pointer[Vcpu]
    _count: cython.longlong[::1]
    _count_vcpus: cython.Py_ssize_t
    _means: cython.uchar[::1]
    _unloads: cython.uchar[::1]
    _roles: cython.uint[::1]  # role words by root id; the last place stays 0, and serves all larger ids
    _slots: Any
    _unseen: Any
    _collapsing: set  # type: ignore[type-arg]  # threads in an ioctl that ends dirty logging
    _invalidating: set  # type: ignore[type-arg]  # threads in kvm_mmu_zap_all_fast
    _zapping: set  # type: ignore[type-arg]  # threads that zap a root
    _deleting: dict  # type: ignore[type-arg]  # by thread, the address space and frames of the slot it removes
    _now: cython.longlong  # time of the row under way
    _at: cython.longlong  # seq of the row under way
    _loads_by: cython.int  # the meaning of rows from which loads are taken
    _open_resets: cython.bint  # resets are not recorded
    _invalidations: cython.longlong  # number of invalidations
    _invalidated: cython.longlong  # row of the last invalidation
    _newest_root: cython.longlong
    _starting: cython.longlong  # vCPUs that have not loaded a root yet
    _timed: cython.bint
    _groups: cython.bint
    _collapses: cython.bint
    _deletes: cython.bint
    _slot_zap: cython.bint  # removing a slot without an invalidation zaps the slot's leaves
    _zap_leafs_once: cython.bint
    _recovers: cython.bint  # a table that is removed by itself shows NX huge page recovery
    # The memory slots as they are from `_slots_since` on and before `_slots_until`
    _slots_since: cython.longlong
    _slots_until: cython.longlong
    _slot_count: cython.Py_ssize_t
    _most_slots: cython.Py_ssize_t
    _slot_key: cython.const[cython.longlong][::1]
    _slot_gfn: cython.const[cython.longlong][::1]
    _slot_pages: cython.const[cython.longlong][::1]
    _slot_hva: cython.const[cython.ulonglong][::1]
    _slot_space: cython.const[cython.longlong][::1]
    # The recorded kernel
    _meaning: cython.uchar[::1]  # meanings of exit codes (`exits`)
    _shadow: cython.bint
    _infers: cython.bint
    _valued: cython.bint  # writes of control registers are recorded with their values
    _msr_valued: cython.bint  # writes of EFER are recorded with their values
    _guest_bits: cython.bint
    _one_function: cython.bint
    _fixed: cython.longlong
    _wp: cython.longlong
    _nx: cython.longlong
    _spte_present: cython.ulonglong
    _present: cython.ulonglong  # bits of a fault's code which say that the leaf was present

    def __init__(self, capabilities: Any, vcpus: int, slots: Any, role_words: Any, groups: bool, timed: bool) -> None:
        """`role_words` has the role words of roots that are known beforehand, by root id.

        `groups` says to find out what the shadow MMU may prefetch around each touch; `timed` that spans of time come
        with the rows.
        """
        kernel, kinds = capabilities.kernel, capabilities.trace.metadata.kinds
        vcpus = max(vcpus, 1)
        self.vcpus = make_pool(vcpus, VCPU)
        for name in NEVER:
            self.vcpus[name] = -1
        self.vcpus["state"] = roles.USUAL
        self.vcpus["root"] = 0
        if cython.compiled:
            view: cython.uchar[::1] = as_bytes(self.vcpus)
            self._vcpu = cython.cast(cython.pointer[Vcpu], cython.address(view[0]))
        else:
            self._vcpu = as_structures(self.vcpus)
        self.counts = np.zeros(len(Trigger), np.int64)
        self._count = self.counts
        self._count_vcpus = self._starting = vcpus
        self._means = np.zeros(256, np.uint8)
        for meaning, name in enumerate(MEANINGS):
            if name:
                self._means[BY_NAME[name].code] = meaning
        self._unloads = np.array([trigger in kernel.unloads for trigger in Trigger], np.uint8)
        self._roles = role_words
        self._slots, self._slots_since, self._slots_until = slots, 0, 0
        self._slot_count, self._most_slots = 0, len(slots)
        self._unseen = Unseen() if capabilities.infers else None
        self._collapsing, self._invalidating, self._zapping = set(), set(), set()
        self._deleting = {}
        self._collapses = self._deletes = False
        self._slot_zap = kernel.slot_zap and bool(capabilities.has("kvm_mmu_zap_all_fast"))
        self._zap_leafs_once = kernel.zap_leafs_once
        # Up to 5.17 a notifier takes tables as well.
        self._recovers = kernel.spte_changed and not kernel.zap_tables and bool(kinds.get("zap_root_begin"))
        self._loads_by = _ROOT_GET if kinds.get("root_get") else _MMU_LOAD if kinds.get("mmu_load") else _ENTRY
        self._open_resets = bool(capabilities.open_resets)
        self._invalidations, self._invalidated, self._newest_root = 0, -1, 0
        self._timed, self._groups = timed, groups
        self._shadow, self._infers = capabilities.shadow, capabilities.infers
        self._meaning = exit_meanings(kernel.vendor)
        self._valued = bool(kinds.get("kvm_cr"))
        self._msr_valued = bool(kinds.get("kvm_msr"))
        self._guest_bits = kernel.layout.guest_bits
        # Before 5.12 the same function empties roots when they are invalidated and when the process ends.
        self._one_function = kernel.zap_all_fast == "empty"
        self._fixed, self._wp, self._nx = kernel.ret_pf.fixed, kernel.layout.wp, kernel.layout.nx
        self._spte_present = kernel.spte.present
        self._present = kernel.vendor.fault.present
        self.ended = False
        self.nested = self.inferred = self.hidden = self.by_guest = self.by_clock = 0
        self.began = -1
        self.inputs = self.records = self.ranges = 0

    def attach(self, held: Any) -> None:
        """Write inputs, records and ranges into these arrays
        (`vm_inputs._Held`), which contain what there is so far.
        """
        self._op, self._gfn, self._time, self._seq, self._exit = held.op, held.gfn, held.time, held.seq, held.exit
        self._lead, self._guest, self._idle, self._fault = held.lead, held.guest, held.idle, held.fault
        self._load, self._unload, self._tables = held.load, held.unload, held.tables
        self._has, self._flags = held.has, held.flags
        self._start, self._end = held.start, held.end
        self._room = len(held.op)

    def run(self, batch: Any, start: int, state: Any, ns: Any, mark: Any) -> int:
        """Take in rows from `start` on; return the first row not done, for lack of room, or the number of rows.

        `state`, `ns` and `mark` are the spans that end with each row (`Timeline.feed`).
        """
        done: cython.longlong = self._run(
            batch.seq, batch.time, batch.vcpu, batch.tid, batch.kind, batch.root, batch.role, batch.level, batch.as_id,
            batch.gfn, batch.old, batch.new, batch.table, batch.addr, batch.code, batch.value, batch.ret, batch.slot,
            batch.flags, start, state, ns, mark,
        )  # fmt: skip
        if self._unseen is not None:
            self._unseen.forget()
        return done

    def settle(self, since: int) -> int:
        """Return how many inputs no later row can change any more.

        All inputs held before (the first `since`) are settled now.

        An exit under way gives its record the times that it has so far; its later time belongs to the next input.
        """
        v: cython.Py_ssize_t
        settled: cython.longlong = self.inputs
        vcpu: cython.pointer[Vcpu] = self._vcpu
        for v in range(self._count_vcpus):
            if vcpu[v].record >= 0:
                if vcpu[v].first < since:
                    self._close(v)
                else:
                    settled = min(settled, vcpu[v].first)
            if vcpu[v].touch_input >= since and vcpu[v].touch > max(
                vcpu[v].opened, vcpu[v].entered, vcpu[v].reset, vcpu[v].loaded
            ):
                settled = min(settled, vcpu[v].touch_input)
            if vcpu[v].cr0_input >= since and vcpu[v].cr0_reset > vcpu[v].loaded:
                settled = min(settled, vcpu[v].cr0_input)
        return settled

    def finish(self) -> None:
        """Complete every exit after the last row."""
        v: cython.Py_ssize_t
        for v in range(self._count_vcpus):
            self._close(v)

    def drop(self, inputs: int, records: int, ranges: int) -> None:
        """Forget the first inputs, records and ranges: the others were moved to the front."""
        v: cython.Py_ssize_t
        vcpu: cython.pointer[Vcpu] = self._vcpu
        self.inputs -= inputs
        self.records -= records
        self.ranges -= ranges
        for v in range(self._count_vcpus):
            vcpu[v].first -= inputs
            vcpu[v].touch_input = max(vcpu[v].touch_input - inputs, -1)
            vcpu[v].cr0_input = max(vcpu[v].cr0_input - inputs, -1)
            if vcpu[v].record >= 0:
                vcpu[v].record -= records

    def _run(
        self,
        seq: cython.const[cython.longlong][::1],
        time: cython.const[cython.longlong][::1],
        vcpu_of: cython.const[cython.int][::1],
        tid: cython.const[cython.int][::1],
        kind: cython.const[cython.uchar][::1],
        root: cython.const[cython.int][::1],
        role: cython.const[cython.uint][::1],
        level: cython.const[cython.schar][::1],
        as_id: cython.const[cython.schar][::1],
        gfn: cython.const[cython.longlong][::1],
        old: cython.const[cython.ulonglong][::1],
        new: cython.const[cython.ulonglong][::1],
        table: cython.const[cython.longlong][::1],
        addr: cython.const[cython.ulonglong][::1],
        code: cython.const[cython.ulonglong][::1],
        value: cython.const[cython.ulonglong][::1],
        ret: cython.const[cython.int][::1],
        slot: cython.const[cython.int][::1],
        flags: cython.const[cython.uchar][::1],
        start: cython.longlong,
        state: cython.const[cython.uchar][::1],
        ns: cython.const[cython.longlong][::1],
        mark: cython.const[cython.uchar][::1],
    ) -> cython.longlong:
        i: cython.Py_ssize_t = start
        rows: cython.Py_ssize_t = kind.shape[0]
        v: cython.Py_ssize_t
        means: cython.int
        vcpu: cython.pointer[Vcpu] = self._vcpu
        last: cython.longlong = self._room - self._most_slots - 8  # with more inputs there may be no room for a row's
        if not cython.compiled:
            seq, time, vcpu_of, tid, kind = map(memoryview, (seq, time, vcpu_of, tid, kind))  # type: ignore[arg-type]
            root, role, level, as_id = map(memoryview, (root, role, level, as_id))  # type: ignore[arg-type]
            gfn, old, new, table, addr = map(memoryview, (gfn, old, new, table, addr))  # type: ignore[arg-type]
            code, value, ret, slot = map(memoryview, (code, value, ret, slot))  # type: ignore[arg-type]
            flags, state, ns, mark = map(memoryview, (flags, state, ns, mark))  # type: ignore[arg-type]
        with cython.nogil:
            while i < rows and not self.ended:
                if self.inputs > last:
                    break
                v = vcpu_of[i]
                means = self._means[kind[i]]
                self._at = seq[i]
                self._now = time[i]
                if self._timed and state[i] != _NO_SPAN:
                    self._spend(v, means, state[i], ns[i], mark[i], root[i])
                if means >= _OF_VM:
                    if means == _CHANGED:
                        if self._deletes:
                            self._end_slot(tid[i], True)
                        if level[i] > 1 and (self._collapses or (self._recovers and v < 0)):
                            self._collapse(v, tid[i], level[i], as_id[i], gfn[i], old[i], new[i])
                    elif means == _INVALIDATE:
                        if self._deletes:
                            self._end_slot(tid[i], False)
                        self._put(_OP_INVALIDATE, 0)
                        self._invalidations += 1
                        self._invalidated = seq[i]
                        if self._one_function:
                            self._is_empty(tid[i], False)
                        if self._infers:
                            self._forget(0)
                    elif means == _ZAP_LEAFS:
                        self._put_range(_ZAP, as_id[i], gfn[i], cython.cast(cython.longlong, value[i]))
                        if self._zap_leafs_once:
                            self._put_range(_ZAP, 1, gfn[i], cython.cast(cython.longlong, value[i]))
                    elif means == _UNMAP:
                        self._unmap(addr[i], value[i])
                    elif means == _ZAP_ALL:
                        if not self._one_function or self._is_empty(tid[i], True):
                            self._put(_OP_ZAP_ALL, 0)
                    elif means == _MEMSLOT:
                        self._change_slot(tid[i], slot[i] & 0xFFFF, as_id[i])
                    elif means == _IOCTL_END:
                        if self._deletes:
                            self._end_slot(tid[i], True)
                        if self._collapses:
                            self._end_collapse(tid[i])
                    elif means in (_ZAP_ROOT, _ZAP_ROOT_END):
                        if self._recovers:
                            self._zaps_root(tid[i], means == _ZAP_ROOT)
                    elif means == _TABLE_FREE:
                        if self._infers and root[i] > 0:
                            self._forget(root[i])
                    elif means == _NESTED:
                        self.nested += 1
                        if v >= 0:
                            vcpu[v].nesting = True
                    elif means == _DESTROY:
                        self._put(_END, 0)
                        self.ended = True
                elif v >= 0:
                    if means in (_SET, _MARK):
                        # A fault of a nested guest, in KVM's shadow of L1's tables, is not counted.
                        if not self._shadows(self._role_of(root[i])):
                            self._leaf(v, means == _MARK, level[i], gfn[i], root[i], table[i])
                    elif means == _FAULT:
                        vcpu[v].present = code[i] & self._present != 0
                        vcpu[v].faulted = seq[i]
                        vcpu[v].marked = -1
                    elif means == _REQUESTED:
                        vcpu[v].marked = -1
                        vcpu[v].requested = gfn[i]
                        vcpu[v].requested_level = level[i]
                    elif means == _EXIT:
                        self._exits(v, code[i], value[i])
                    elif means == _ENTRY:
                        self._enters(v, root[i], role[i])
                    elif means in (_ROOT_GET, _MMU_LOAD):
                        if root[i] > 0:
                            self._name(root[i], role[i])
                            if means == self._loads_by and ret[i] >= 0:
                                self._load_root(v, root[i], role[i])
                    elif means == _GET_PAGE:
                        if root[i] > 0:
                            self._name(root[i], role[i])
                        elif flags[i] & 1 and root[i] == 0:
                            vcpu[v].built = seq[i]
                            vcpu[v].built_at = gfn[i]
                    elif means == _NEW_PGD:
                        self._switches(v, role[i])
                    elif means in (_RESET, _UNLOAD):
                        self._resets(v, means == _UNLOAD, role[i] >> 24 != 0)
                    elif means == _SMM_MOVE:
                        self._moves(v, flags[i] & 1 != 0)
                    elif means == _CR:
                        if flags[i] & 1:
                            self._writes(v, code[i], cython.cast(cython.longlong, value[i]))
                    elif means == _MSR:
                        if flags[i] & 1 and code[i] == _EFER_MSR:
                            if self._open_resets:
                                self._writes_efer(v, cython.cast(cython.longlong, value[i]))
                            vcpu[v].efer = cython.cast(cython.longlong, value[i])
                    elif means == _FAST:
                        if ret[i] == self._fixed and not self._shadows(self._role_of(root[i])):
                            self._repaired(v, addr[i], (old[i] | new[i]) & _LARGE != 0)
                    elif means == _USER_EXIT:
                        if self._open_resets:
                            self._not_seen(v)
                    elif means == _IOCTL_BEGIN:
                        vcpu[v].opened = seq[i]
                        vcpu[v].why = self._asked(cython.cast(cython.longlong, code[i] & 0xFFFF))
                        if code[i] == _KVM_SMI:
                            vcpu[v].asked_smi = seq[i]
                    elif means == _SPLIT_HUGE and vcpu[v].faulted > max(vcpu[v].opened, vcpu[v].split):
                        self._splits(v, vcpu[v].requested, vcpu[v].requested_level)
                elif means in (_ROOT_GET, _MMU_LOAD, _GET_PAGE) and root[i] > 0:
                    self._name(root[i], role[i])
                i += 1
        return i

    # Inputs

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _put(self, op: cython.uint, gfn: cython.longlong) -> cython.void:
        """Add an input of this row that belongs to no vCPU."""
        n: cython.Py_ssize_t = self.inputs
        self._op[n] = op
        self._gfn[n] = gfn
        self._time[n] = self._now
        self._seq[n] = self._at
        self._exit[n] = -1
        self.inputs = n + 1

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _put_of(self, v: cython.Py_ssize_t, op: cython.uint, gfn: cython.longlong, has: cython.longlong) -> cython.void:
        """Add an input of this row that belongs to a vCPU and to its exit."""
        n: cython.Py_ssize_t = self.inputs
        self._put(op | cython.cast(cython.uint, v << _VCPU_SHIFT), gfn)
        if self._timed:
            if self._vcpu[v].record < 0:
                self._vcpu[v].record = self.records
                self._vcpu[v].first = n
                self._vcpu[v].has = 0
                self.records += 1
            self._vcpu[v].has |= has
            self._exit[n] = cython.cast(cython.int, self._vcpu[v].record)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _put_range(
        self, op: cython.uint, space: cython.longlong, start: cython.longlong, end: cython.longlong
    ) -> cython.void:
        """Add an operation on [start, end) of one address space."""
        self._start[self.ranges] = start
        self._end[self.ranges] = end
        self._put(op | cython.cast(cython.uint, (space & 7) << _LEVEL_SHIFT), self.ranges)
        self.ranges += 1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _pull(self, v: cython.Py_ssize_t, trigger: cython.longlong, state: cython.longlong) -> cython.void:
        """Add a trigger, with the state that it puts the vCPU in."""
        has: cython.longlong = _HAS_TRIGGER << trigger
        if state != _NO_STATE:
            has |= _HAS_ROLE
        self._count[trigger] += 1
        if self._unloads[trigger]:
            self._vcpu[v].unloaded = self._at
        self._put_of(v, _TRIGGER, trigger | state << _STATE_SHIFT, has)

    # Time

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _spend(
        self,
        v: cython.Py_ssize_t,
        means: cython.int,
        state: cython.int,
        ns: cython.longlong,
        mark: cython.int,
        root: cython.longlong,
    ) -> cython.void:
        """Add the span that ends with this row to the vCPU's exit; a kvm_exit begins the next exit."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        if means == _EXIT:
            self._close(v)
            vcpu[v].tables = vcpu[v].built_root = 0
            vcpu[v].still = mark & _STILL
            vcpu[v].interrupt = mark & _INTERRUPT
        vcpu[v].rows += 1
        vcpu[v].ns[state] += ns
        if state == _IS_FAULT:
            vcpu[v].fault_rows += 1
            vcpu[v].faults += means == _FAULT
            vcpu[v].tables += means == _GET_PAGE
        if root > self._newest_root and means in (_ROOT_GET, _MMU_LOAD, _GET_PAGE):
            self._newest_root = root
            vcpu[v].built_root = True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _close(self, v: cython.Py_ssize_t) -> cython.void:
        """Complete the vCPU's exit: its time goes to its record or, if it has none, to the next exit's lead."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        r: cython.Py_ssize_t = vcpu[v].record
        i: cython.int
        guest: cython.longlong = vcpu[v].ns[_IS_GUEST]
        idle: cython.longlong = vcpu[v].ns[_IS_IDLE]
        fault: cython.longlong = vcpu[v].ns[_IS_FAULT]
        load: cython.longlong = vcpu[v].ns[_IS_LOAD]
        unload: cython.longlong = vcpu[v].ns[_IS_UNLOAD]
        rest: cython.longlong = vcpu[v].ns[_IS_SMM] + vcpu[v].ns[_IS_USER] + vcpu[v].ns[_IS_OTHER] + idle
        if r >= 0:
            self._lead[r] = vcpu[v].lead + guest + rest
            self._guest[r] = vcpu[v].lead_guest + guest
            self._idle[r] = vcpu[v].lead_idle + idle
            self._fault[r] = fault
            self._load[r] = load
            self._unload[r] = unload
            self._tables[r] = cython.cast(cython.uchar, min(vcpu[v].tables, 255))
            self._has[r] = cython.cast(cython.uint, vcpu[v].has)
            self._flags[r] = (_WAS_STILL if vcpu[v].still else 0) | (_BUILT_ROOT if vcpu[v].built_root else 0)
            vcpu[v].lead = vcpu[v].lead_guest = vcpu[v].lead_idle = 0
        else:
            vcpu[v].lead += guest + rest + fault + load + unload
            vcpu[v].lead_guest += guest
            vcpu[v].lead_idle += idle
        if vcpu[v].interrupt:
            vcpu[v].interrupts += 1
            vcpu[v].interrupted += vcpu[v].ns[_IS_OTHER]
        vcpu[v].zapped += vcpu[v].ns[_IS_ZAP]
        vcpu[v].prefetched += vcpu[v].ns[_IS_PREFETCH]
        vcpu[v].record = -1
        vcpu[v].interrupt = 0
        for i in range(12):
            vcpu[v].ns[i] = 0

    # Touches

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _leaf(
        self,
        v: cython.Py_ssize_t,
        mmio: cython.bint,
        level: cython.longlong,
        gfn: cython.longlong,
        root: cython.longlong,
        table: cython.longlong,
    ) -> cython.void:
        """A leaf was installed: the vCPU needed it, or the shadow MMU prefetched it."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        space: cython.longlong
        op: cython.uint
        asked: cython.longlong
        has: cython.longlong = _HAS_TOUCH
        marked: cython.longlong = vcpu[v].marked
        if mmio:
            level = 1
        if level < 1 or level > 5:
            level = 1
        gfn &= -(cython.cast(cython.longlong, 1) << _PAGE_BITS * (level - 1))
        # The TDP MMU of 5.10 reports an MMIO SPTE by both events.
        vcpu[v].marked = gfn if mmio else -1
        if not mmio and marked == gfn:
            return
        # An access to MMIO exits whether its SPTE is present or not, and is then emulated.
        op = _FIX if mmio or vcpu[v].present else _TOUCH
        if vcpu[v].split > vcpu[v].faulted:
            return  # counted where the huge leaf was split
        asked = vcpu[v].requested & -(cython.cast(cython.longlong, 1) << _PAGE_BITS * (level - 1))
        if self._shadow and not mmio and asked != gfn:
            op |= _HIDDEN
            has = _HAS_HIDDEN
            self.hidden += 1
        space = 1 if self._role_of(root) >> 24 else 0
        op |= cython.cast(cython.uint, level << _LEVEL_SHIFT)
        if self._groups:
            op |= self._group(space, gfn)
        if self._infers:
            self._infer(v, root, gfn, level, space, table, not vcpu[v].present and has == _HAS_TOUCH)
        vcpu[v].touch = self._at
        vcpu[v].touch_input = self.inputs
        self._put_of(v, op, gfn, has)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _repaired(self, v: cython.Py_ssize_t, addr: cython.ulonglong, huge: cython.bint) -> cython.void:
        """A fault was repaired without mmu_lock."""
        level: cython.longlong = 2 if huge else 1
        gfn: cython.longlong = cython.cast(cython.longlong, addr >> 12) & -(
            cython.cast(cython.longlong, 1) << _PAGE_BITS * (level - 1)
        )
        own: cython.longlong = gfn & 7
        op: cython.longlong = level << _LEVEL_SHIFT | own << _FIRST_SHIFT | own << _LAST_SHIFT
        self._vcpu[v].touch = self._at
        self._vcpu[v].touch_input = self.inputs
        self._put_of(v, _FIX | cython.cast(cython.uint, op), gfn, _HAS_TOUCH)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _splits(self, v: cython.Py_ssize_t, gfn: cython.longlong, level: cython.longlong) -> cython.void:
        """A fault splits a huge leaf that grants too little; the split alone may grant what the fault needs."""
        op: cython.longlong = max(level, 1) << _LEVEL_SHIFT | (gfn & 7) << _FIRST_SHIFT | (gfn & 7) << _LAST_SHIFT
        self._vcpu[v].split = self._vcpu[v].touch = self._at
        self._vcpu[v].touch_input = self.inputs
        self._put_of(v, _FIX | cython.cast(cython.uint, op), gfn, _HAS_TOUCH)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _infer(
        self,
        v: cython.Py_ssize_t,
        root: cython.longlong,
        gfn: cython.longlong,
        level: cython.longlong,
        space: cython.longlong,
        table: cython.longlong,
        asks: cython.bint,
    ) -> cython.void:
        """Infer, where removals are not recorded, that a page which its root had
        mapped was removed before it is installed again.
        """
        vcpu: cython.pointer[Vcpu] = self._vcpu
        region: cython.longlong = gfn & -512
        rebuilt: cython.bint = vcpu[v].built > vcpu[v].faulted and vcpu[v].built_at == region
        gone: cython.int
        with cython.gil:
            gone = self._unseen.find(
                root, gfn, level, table, self._at, vcpu[v].faulted, asks, rebuilt, self._invalidated
            )
        if gone & _GONE_PAGE:
            self.inferred += 1
            self._put_range(_ZAP, space, gfn, gfn + (cython.cast(cython.longlong, 1) << _PAGE_BITS * (level - 1)))
        if gone & _GONE_TABLE:
            self.inferred += 1
            self._put_range(_ZAP, space, region, region + 512)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _forget(self, root: cython.longlong) -> cython.void:
        """Forget what a root had mapped, since it has ended."""
        if root:
            with cython.gil:
                self._unseen.end(root)

    # Loads and unloads of vCPUs

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _exits(self, v: cython.Py_ssize_t, code: cython.ulonglong, value: cython.ulonglong) -> cython.void:
        vcpu: cython.pointer[Vcpu] = self._vcpu
        why: cython.longlong = _BY_OTHER
        told: cython.bint
        if code & 0xFFFF < _CODES:
            why = self._meaning[code & 0xFFFF]
        if why == _BY_CR:
            why = _BY_CR0 if value & 0xF == 0 else _BY_CR4 if value & 0xF == 4 else _BY_OTHER
        elif why == _BY_MSR:
            why = _BY_MSR_WRITE if value & 0xF == 1 else _BY_OTHER
        vcpu[v].opened = vcpu[v].left = self._at
        vcpu[v].why = why
        vcpu[v].left_by_io = 1 if why == _BY_IO else 0
        if self._open_resets:
            told = self._msr_valued if why == _BY_MSR_WRITE else self._valued
            if why == _BY_INVPCID or (why in (_BY_MSR_WRITE, _BY_CR0, _BY_CR4) and not told):
                self._not_seen(v)
        if self._valued:
            return
        # If the kernel unloads for the usual writes, the absence of a reset means that there was no such write.
        if why == _BY_CR0 and not self._unloads[_CR0_WP]:
            self._silent(v, _CR0_SILENT)
        elif why == _BY_CR4 and not self._unloads[_CR4_PGE]:
            self._silent(v, _CR4_SILENT)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _asked(self, ioctl: cython.longlong) -> cython.longlong:
        if ioctl in (_SET_SREGS, _SET_SREGS2):
            return _TO_SREGS
        return _TO_CPUID if ioctl == _SET_CPUID2 else _TO_OTHER

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _writes(self, v: cython.Py_ssize_t, register: cython.ulonglong, value: cython.longlong) -> cython.void:
        """A write of CR0 or CR4 of known value."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        trigger: cython.longlong = _NONE
        changed: cython.longlong
        first: cython.bint = (vcpu[v].cr0 if register == 0 else vcpu[v].cr4) == _NONE
        if register == 0:
            changed = value ^ vcpu[v].cr0
            if vcpu[v].cr0 == _NONE:
                # It is not known what the first write changed. If it changed a bit for which the kernel unloads, a
                # reset shows it.
                trigger = _NONE if self._unloads[_CR0_WP] and not self._open_resets else _CR0_SILENT
            elif changed & _CR0_PG_BIT:
                trigger = _CR0
            elif changed & _CR0_WP_BIT:
                trigger = _CR0_WP
            vcpu[v].cr0 = value
        elif register == 4:
            changed = value ^ vcpu[v].cr4
            if vcpu[v].cr4 == _NONE:
                trigger = _NONE if self._unloads[_CR4_PGE] and not self._open_resets else _CR4_SILENT
            elif changed & _CR4_ROLE_BITS:
                trigger = _CR4
            elif changed & _CR4_PGE_BIT:
                trigger = _CR4_PGE
            elif changed & _CR4_PCIDE_BIT and not value & _CR4_PCIDE_BIT:
                trigger = _CR4_PCIDE
            vcpu[v].cr4 = value
        else:
            return
        vcpu[v].wrote = self._at
        vcpu[v].wrote_trigger = trigger
        if first and self._open_resets:
            self._not_seen(v)
        if trigger != _NONE and (self._open_resets or not self._unloads[trigger]):
            self._silent(v, trigger)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _writes_efer(self, v: cython.Py_ssize_t, value: cython.longlong) -> cython.void:
        """A write of EFER, where resets are not recorded: only the values show whether it changed a bit of the role."""
        if self._vcpu[v].efer == _NONE:
            self._not_seen(v)
        elif (value ^ self._vcpu[v].efer) & _EFER_ROLE:
            self._pull(v, _EFER, _NO_STATE)
            self._vcpu[v].dirty = True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _not_seen(self, v: cython.Py_ssize_t) -> cython.void:
        """The vCPU's MMU context may have been reset here, which no row would show."""
        if self._vcpu[v].started:
            self._pull(v, _NOT_SEEN, _NO_STATE)
            self._vcpu[v].dirty = True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _silent(self, v: cython.Py_ssize_t, trigger: cython.longlong) -> cython.void:
        """A write for which the recorded kernel does not unload.

        Another kernel may, so there may be a load at the next entry.
        """
        if trigger == _CR0_WP:
            self._vcpu[v].wp_flips ^= 1
        elif trigger == _CR0_SILENT:
            self._vcpu[v].maybe_flips ^= 1
        if trigger in (_CR0_WP, _CR0_SILENT):
            self._pull(v, trigger, self._with_registers(v, self._vcpu[v].state))
        else:
            self._pull(v, trigger, _NO_STATE)
        self._vcpu[v].dirty = True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _moves(self, v: cython.Py_ssize_t, entering: cython.bint) -> cython.void:
        """The vCPU enters or leaves SMM."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        state: cython.longlong = self._with_registers(v, vcpu[v].state)
        by_io: cython.bint
        if entering:
            by_io = vcpu[v].left > vcpu[v].entered and vcpu[v].left_by_io
            if by_io or vcpu[v].asked_smi > vcpu[v].entered:
                self.by_guest += 1
            else:
                self.by_clock += 1
            self._pull(v, _SMI, state | _IN_SMM)
        else:
            self._pull(v, _RSM, state & ~_IN_SMM)
        vcpu[v].smm = self._at
        if self._loads_by == _ENTRY:
            vcpu[v].dirty = True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _resets(self, v: cython.Py_ssize_t, unload: cython.bint, in_smm: cython.bint) -> cython.void:
        """The vCPU's MMU context is reset, or its roots are unloaded."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        trigger: cython.longlong
        told: cython.bint
        base: cython.longlong = max(vcpu[v].opened, vcpu[v].loaded)
        former: cython.longlong = vcpu[v].reset
        vcpu[v].reset = self._at
        if former >= 0 and former >= base:
            return
        if vcpu[v].smm > base:
            return
        # After an invalidation, an unload without a reset serves that invalidation's request (5.10 to 5.17).
        if unload and self._invalidated > vcpu[v].loaded:
            return
        trigger = self._cause(vcpu[v].why, in_smm)
        # For a first write, whose change is not known, the reset shows that it changed a bit of the role.
        told = vcpu[v].wrote_trigger >= 0 and vcpu[v].wrote_trigger not in (_CR0_SILENT, _CR4_SILENT)
        if self._valued and vcpu[v].wrote > base and told:
            trigger = vcpu[v].wrote_trigger
        if trigger == _BY_EXIT and vcpu[v].touch > base:
            if vcpu[v].touch_input >= 0:
                self._op[vcpu[v].touch_input] |= _RESETS
            return
        if trigger == _CR0_RESET:
            vcpu[v].cr0_reset = self._at
            vcpu[v].cr0_input = self.inputs
        self._pull(v, trigger, _NO_STATE)
        if self._loads_by == _ENTRY:
            vcpu[v].dirty = True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _cause(self, why: cython.longlong, in_smm: cython.bint) -> cython.longlong:
        """Return a reset's trigger, which follows from the vCPU's last exit or ioctl."""
        if why == _TO_SREGS:
            return _SREGS
        if why == _TO_CPUID:
            return _CPUID
        if why in (_BY_NOTHING, _TO_OTHER):
            return _OTHER
        if why == _BY_RSM or (why == _BY_UD and in_smm):
            return _RSM
        if why == _BY_CR0:
            return _CR0_RESET if self._unloads[_CR0_WP] else _CR0
        if why == _BY_CR4:
            return _CR4_RESET if self._unloads[_CR4_PGE] else _CR4
        if why == _BY_MSR_WRITE:
            return _EFER
        return _INVPCID if why == _BY_INVPCID else _BY_EXIT

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _load_root(self, v: cython.Py_ssize_t, root: cython.longlong, role: cython.uint) -> cython.void:
        """The vCPU loads a root."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        state: cython.longlong = self._state(role if role else self._role_of(root))
        cr0: cython.longlong
        if self._shadows(role if role else self._role_of(root)):
            return
        if self._guest_bits and vcpu[v].cr0_reset > vcpu[v].loaded and vcpu[v].cr0_input >= 0:
            # The reset for a write of CR0 was for WP alone if, and only if, the next role word differs in WP.
            cr0 = _CR0_WP if (vcpu[v].state ^ state) & _WP else _CR0
            self._gfn[vcpu[v].cr0_input] = self._gfn[vcpu[v].cr0_input] >> _STATE_SHIFT << _STATE_SHIFT | cr0
            vcpu[v].has = vcpu[v].has & ~(_HAS_TRIGGER << _CR0_RESET) | _HAS_TRIGGER << cr0
        vcpu[v].state = state
        self._arrive(v, self._with_registers(v, state))
        vcpu[v].loaded = self._at

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _switches(self, v: cython.Py_ssize_t, role: cython.uint) -> cython.void:
        """Follow kvm_mmu_new_pgd: slots are kept if a guest and its nested guest both have roots of the TDP MMU."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        state: cython.longlong = self._state(role)
        if not role & _DIRECT or not vcpu[v].started:
            return
        if vcpu[v].nesting and role & _GUEST_MODE:
            self.nested -= 1
        vcpu[v].nesting = False
        if (state ^ vcpu[v].state) & _NESTED_GUEST:
            vcpu[v].state = state
            self._put_of(v, _SWITCH, self._with_registers(v, state), 0)

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _shadows(self, role: cython.uint) -> cython.bint:
        """Return whether a role word is that of a root which shadows L1's nested page tables."""
        return role & _GUEST_MODE != 0 and role & _DIRECT == 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _arrive(self, v: cython.Py_ssize_t, state: cython.longlong) -> cython.void:
        self._vcpu[v].started = True
        self._put_of(v, _ROLE, state, _HAS_ROLE)
        self._put_of(v, _ENTER, 0, _HAS_ENTER)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _enters(self, v: cython.Py_ssize_t, root: cython.longlong, role: cython.uint) -> cython.void:
        """The vCPU enters the guest."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        word: cython.uint
        pending: cython.bint = vcpu[v].invalidated != self._invalidations
        if self.began < 0:
            self.began = self._now
        if self._loads_by == _ENTRY and root > 0 and root != vcpu[v].root:
            if self._open_resets and vcpu[v].root > 0 and vcpu[v].unloaded < vcpu[v].entered and not pending:
                self._pull(v, _OTHER, _NO_STATE)  # it gave up its root for a reason that is not recorded
            self._load_root(v, root, role)
        vcpu[v].root = root
        if not vcpu[v].started:  # it ran before the recording began: its root is the one at its first entry
            word = self._role_of(root)
            vcpu[v].state = self._state(word) if word else _USUAL
            self._arrive(v, vcpu[v].state)
        if vcpu[v].dirty or pending:
            self._put_of(v, _ENTER, 0, _HAS_ENTER)
            vcpu[v].dirty = False
            vcpu[v].invalidated = self._invalidations
        vcpu[v].entered = self._at

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _name(self, root: cython.longlong, role: cython.uint) -> cython.void:
        """Remember a root's role word."""
        if root < self._roles.shape[0] - 1:
            self._roles[root] = role

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _role_of(self, root: cython.longlong) -> cython.uint:
        if root < 0:
            root = 0
        return self._roles[min(root, self._roles.shape[0] - 1)]

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _state(self, word: cython.uint) -> cython.longlong:
        """Return the state in a role word (`roles`); if role words have no guest bits, WP and NX count as set."""
        state: cython.longlong = _USUAL
        if self._guest_bits:
            state = (_WP if word & self._wp else 0) | (_NX if word & self._nx else 0)
        if word & 0xF == 5:
            state |= _LEVEL5
        if word >> 24:
            state |= _IN_SMM
        if word & _GUEST_MODE:
            state |= _NESTED_GUEST
        return state

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _with_registers(self, v: cython.Py_ssize_t, state: cython.longlong) -> cython.longlong:
        """Return a state with WP and NX as register writes left them; unchanged if role words have these bits."""
        vcpu: cython.pointer[Vcpu] = self._vcpu
        if self._guest_bits:
            return state
        if vcpu[v].wp_flips:
            state ^= _WP
        if vcpu[v].maybe_flips:
            state |= _MAYBE_WP
        # SMM begins with EFER 0.
        if vcpu[v].efer != _NONE and (not vcpu[v].efer & _EFER_NX or state & _IN_SMM):
            state &= ~_NX
        return state

    # Events of the VM as a whole

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _is_empty(self, tid: cython.int, all_roots: cython.bint) -> cython.bint:
        """Return whether a zap_all empties every root for good: before 5.12 an invalidation calls the same function."""
        empties: cython.bint
        with cython.gil:
            empties = all_roots and tid not in self._invalidating
            if not all_roots:
                self._invalidating.add(tid)
            elif not empties:
                self._invalidating.discard(tid)
        return empties

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _change_slot(self, tid: cython.int, slot: cython.int, space: cython.int) -> cython.void:
        """A memslot changes.

        If dirty logging begins, huge leaves are split; if it ends, tables of huge memory are removed.

        If the slot is deleted or moved, all roots are invalidated or, if the VMM has chosen that, only its leaves are
        zapped.
        """
        with cython.gil:
            if self._slot_zap:
                start, end = self._slots.gone(self._now, slot, space)
                if start < end:
                    self._deleting[tid] = (space, start, end)
                    self._deletes = True
            change, start, end = self._slots.logging_change(self._now, slot, space)
            if change > 0:
                self._put_range(_SPLIT, space, start, end)
            elif change < 0:
                self._collapsing.add(tid)
                self._collapses = True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _end_slot(self, tid: cython.int, zaps: cython.bint) -> cython.void:
        """The thread that removes a slot zaps the slot's leaves or ends (`zaps`), or invalidates all roots."""
        with cython.gil:
            gone = self._deleting.pop(tid, None)
            self._deletes = bool(self._deleting)
            if gone is not None and zaps:
                self._put_range(_ZAP, gone[0], gone[1], gone[2])

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _zaps_root(self, tid: cython.int, begins: cython.bint) -> cython.void:
        with cython.gil:
            if begins:
                self._zapping.add(tid)
            else:
                self._zapping.discard(tid)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _end_collapse(self, tid: cython.int) -> cython.void:
        with cython.gil:
            self._collapsing.discard(tid)
            self._collapses = bool(self._collapsing)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _collapse(
        self,
        v: cython.Py_ssize_t,
        tid: cython.int,
        level: cython.int,
        space: cython.int,
        gfn: cython.longlong,
        old: cython.ulonglong,
        new: cython.ulonglong,
    ) -> cython.void:
        """A table is removed by the thread whose ioctl ends dirty logging, or by the worker of NX huge page recovery.

        The worker is a thread without a vCPU that is not zapping a root.
        """
        op: cython.uint
        mine: cython.bint
        worker: cython.bint
        was_table: cython.bint = old & self._spte_present != 0 and old & _LARGE == 0
        is_table: cython.bint = new & self._spte_present != 0 and new & _LARGE == 0
        if not was_table or is_table:
            return
        with cython.gil:
            mine = tid in self._collapsing
            worker = not mine and v < 0 and self._recovers and tid not in self._zapping
        if mine or worker:
            op = _COLLAPSE | cython.cast(cython.uint, level << _LEVEL_SHIFT)
            op |= cython.cast(cython.uint, space << _VCPU_SHIFT)
            self._put(op | _FOR_GOOD if worker else op, gfn)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _look_up_slots(self) -> cython.void:
        """Load the memory slots as they are at the time of this row. Times may go back a little between CPUs."""
        if self._slots_since <= self._now < self._slots_until:
            return
        with cython.gil:
            table = self._slots.at(self._now)
            self._slots_since, self._slots_until = table.since, table.until
            self._slot_count = len(table.key)
            self._slot_key, self._slot_gfn, self._slot_pages = table.key, table.gfn, table.pages
            self._slot_hva, self._slot_space = table.hva, table.as_id

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _group(self, space: cython.longlong, gfn: cython.longlong) -> cython.uint:
        """Return, as bits of an operation, the first and last entry of a page's aligned group of 8 that its slot has.

        Without a slot both are the page's own entry.
        """
        own: cython.longlong = gfn & 7
        base: cython.longlong = gfn - own
        first: cython.longlong = own
        last: cython.longlong = own
        low: cython.Py_ssize_t = 0
        high: cython.Py_ssize_t
        middle: cython.Py_ssize_t
        key: cython.longlong = space << 52 | gfn
        self._look_up_slots()
        high = self._slot_count
        while low < high:
            middle = (low + high) // 2
            if self._slot_key[middle] <= key:
                low = middle + 1
            else:
                high = middle
        low -= 1
        if low >= 0 and self._slot_space[low] == space and gfn < self._slot_gfn[low] + self._slot_pages[low]:
            first = max(self._slot_gfn[low] - base, 0)
            last = min(self._slot_gfn[low] + self._slot_pages[low] - base, 8) - 1
        return cython.cast(cython.uint, first << _FIRST_SHIFT | last << _LAST_SHIFT)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _unmap(self, start: cython.ulonglong, end: cython.ulonglong) -> cython.void:
        """An MMU notifier unmaps host addresses: zap the guest frames behind them in each slot that has some."""
        s: cython.Py_ssize_t
        low: cython.ulonglong
        high: cython.ulonglong
        top: cython.ulonglong
        first: cython.longlong
        past: cython.longlong
        self._look_up_slots()
        for s in range(self._slot_count):
            top = self._slot_hva[s] + (cython.cast(cython.ulonglong, self._slot_pages[s]) << 12)
            low = max(start, self._slot_hva[s])
            high = min(end, top)
            if low < high:
                first = self._slot_gfn[s] + cython.cast(cython.longlong, (low - self._slot_hva[s]) >> 12)
                past = self._slot_gfn[s] + cython.cast(cython.longlong, (high - self._slot_hva[s] + 4095) >> 12)
                self._put_range(_ZAP, self._slot_space[s], first, past)


# The fields of Vcpu as numpy has them, and those that are -1 at first.
VCPU = [(name, "i8", (len(VcpuState),)) if name == "ns" else (name, "i8") for name in (
    "opened", "why", "loaded", "state", "smm", "reset", "unloaded", "cr0_reset", "cr0_input", "entered", "root",
    "dirty", "invalidated", "started", "touch", "touch_input", "requested", "requested_level", "split", "marked",
    "present", "faulted", "built", "built_at", "wp_flips", "maybe_flips", "efer", "cr0", "cr4", "wrote",
    "wrote_trigger", "left", "left_by_io", "asked_smi", "record", "first", "has", "ns", "tables", "built_root",
    "still", "interrupt", "lead", "lead_guest", "lead_idle", "zapped", "prefetched", "rows", "fault_rows", "faults",
    "interrupts", "interrupted", "nesting",
)]  # fmt: skip
NEVER = (
    "opened", "loaded", "smm", "reset", "unloaded", "cr0_reset", "cr0_input", "entered", "touch", "touch_input",
    "requested", "split", "marked", "faulted", "built", "built_at", "efer", "cr0", "cr4", "wrote", "wrote_trigger",
    "left", "asked_smi", "record",
)  # fmt: skip
