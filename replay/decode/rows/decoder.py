# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Decode the rows of one VM, one row at a time, into its inputs: what happened to it that no root policy decides.

Inputs are operations (`simulate.operations`), and triggers, which become operations for a certain kernel version
(`decode.inputs` explains their columns). Each kind of row becomes:

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

Times belong to exits. Each exit of a vCPU that has an input gets a record: the time until then that belongs to no input
(`lead`), and the times of faults, loads and unloads in it. An exit is complete when the next one begins; its inputs are
held back until then, because a later row of the exit may still change the meaning of an input.

This is Cython in pure-Python mode, like `simulate.compiled`. Only rare rows allocate memory here: `run` stops before a
row for which there may be no room, and `vm_inputs` makes room.
"""

from __future__ import annotations

from typing import Any

import cython

from replay.decode.rows.page_installs import PageInstalls
from replay.decode.rows.row_meanings import Meaning, meanings_by_kind
from replay.decode.spans.vcpu_states import NO_SPAN
from replay.simulate.operations import Op
from traces.kernels import triggers
from traces.kernels.spte import LARGE

COMPILED: bool = cython.compiled

_EXIT = cython.declare(cython.int, int(Meaning.EXIT))
_ENTRY = cython.declare(cython.int, int(Meaning.ENTRY))
_FAULT = cython.declare(cython.int, int(Meaning.FAULT))
_REQUESTED = cython.declare(cython.int, int(Meaning.REQUESTED))
_SET = cython.declare(cython.int, int(Meaning.SET))
_MARK = cython.declare(cython.int, int(Meaning.MARK))
_FAST = cython.declare(cython.int, int(Meaning.FAST))
_GET_PAGE = cython.declare(cython.int, int(Meaning.GET_PAGE))
_ROOT_GET = cython.declare(cython.int, int(Meaning.ROOT_GET))
_MMU_LOAD = cython.declare(cython.int, int(Meaning.MMU_LOAD))
_RESET = cython.declare(cython.int, int(Meaning.RESET))
_UNLOAD = cython.declare(cython.int, int(Meaning.UNLOAD))
_SMM_MOVE = cython.declare(cython.int, int(Meaning.SMM_MOVE))
_CR = cython.declare(cython.int, int(Meaning.CR))
_MSR = cython.declare(cython.int, int(Meaning.MSR))
_IOCTL_BEGIN = cython.declare(cython.int, int(Meaning.IOCTL))
_NEW_PGD = cython.declare(cython.int, int(Meaning.NEW_PGD))
_SPLIT_HUGE = cython.declare(cython.int, int(Meaning.SPLIT_HUGE))
_USER_EXIT = cython.declare(cython.int, int(Meaning.USER_EXIT))
_OF_VM = cython.declare(cython.int, int(Meaning.CHANGED))
_CHANGED = cython.declare(cython.int, int(Meaning.CHANGED))
_IOCTL_END = cython.declare(cython.int, int(Meaning.IOCTL_END))
_INVALIDATE = cython.declare(cython.int, int(Meaning.INVALIDATE))
_ZAP_LEAFS = cython.declare(cython.int, int(Meaning.ZAP_LEAFS))
_UNMAP = cython.declare(cython.int, int(Meaning.UNMAP))
_ZAP_ALL = cython.declare(cython.int, int(Meaning.ZAP_ALL))
_MEMSLOT = cython.declare(cython.int, int(Meaning.MEMSLOT))
_DESTROY = cython.declare(cython.int, int(Meaning.DESTROY))
_NESTED = cython.declare(cython.int, int(Meaning.NESTED))
_TABLE_FREE = cython.declare(cython.int, int(Meaning.TABLE_FREE))
_ZAP_ROOT = cython.declare(cython.int, int(Meaning.ZAP_ROOT))
_ZAP_ROOT_END = cython.declare(cython.int, int(Meaning.ZAP_ROOT_END))
_OP_INVALIDATE = cython.declare(cython.uint, int(Op.INVALIDATE))
_ZAP = cython.declare(cython.uint, int(Op.ZAP))
_OP_ZAP_ALL = cython.declare(cython.uint, int(Op.ZAP_ALL))
_END = cython.declare(cython.uint, int(Op.END))
_EFER_MSR = cython.declare(cython.ulonglong, triggers.EFER_MSR)
_KVM_SMI = cython.declare(cython.ulonglong, 0xAEB7)
_LARGE = cython.declare(cython.ulonglong, LARGE)
_NO_SPAN = cython.declare(cython.int, NO_SPAN)


@cython.final
@cython.cclass
class Decoder(PageInstalls):
    """Decodes the rows of one VM into inputs; `vm_inputs.VmInputs` provides the memory and takes the inputs.

    `counts` is the number of triggers of each kind. `nested` is the number of entries of nested guests, `inferred` that
    of inferred removals, and `hidden` that of prefetches. `by_guest` SMIs followed port I/O of the guest, or a KVM_SMI
    ioctl, and `by_clock` SMIs did not. `began` is the time of the VM's first entry, or -1 if it has none.
    """

    ended: cython.bint

    _means: cython.const[cython.uchar][::1]  # Meaning by kind code
    _zap_leafs_once: cython.bint
    _one_function: cython.bint
    _fixed: cython.longlong
    _present: cython.ulonglong  # bits of a fault's code which say that the leaf was present

    def __init__(self, capabilities: Any, vcpus: int, timed: bool, role_words: Any, slots: Any, groups: bool) -> None:
        """Take the same as PageInstalls."""
        super().__init__(capabilities, vcpus, timed, role_words, slots, groups)
        kernel = capabilities.kernel
        self._means = meanings_by_kind()
        self._zap_leafs_once = kernel.zap_leafs_once
        # Before 5.12 the same function empties roots when they are invalidated and when the process ends.
        self._one_function = kernel.zap_all_fast == "empty"
        self._fixed = kernel.ret_pf.fixed
        self._present = kernel.vendor.fault.present
        self.ended = False

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
