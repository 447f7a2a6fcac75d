# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Find out why pages of a VM had to be mapped again: which cause removed or protected the earlier mapping.

This takes one pass over the rows. A row shows what its thread begins (`acting_threads`), and the thread's next such row
ends it; what the thread changes in between is attributed to that cause. When a root is lost, the cause is what the vCPU
did since its last exit, or that all roots are invalidated. A page that a fault maps is then compared with what happened
to its last mapping under the same role word (`last_mappings`). All is counted by cause and thread (`removal_totals`).

    row                                               what the thread is doing
    kvm_unmap_hva_range, kvm_set_spte_hva,
    kvm_age_hva, kvm_test_age_hva                     a notifier, until it does something else
    ioctl                                             GET_DIRTY_LOG, CLEAR_DIRTY_LOG, RESET_DIRTY_RINGS, or another
    memslot                                           a memslot, or dirty logging where only that flag changes
    zap_root_begin                                    what that root was lost for
    zap_leafs                                         a range zap, if at nothing else
    zap_all, vm_destroy                               the VM's end
    kvm_page_fault of a vCPU                          its fault: only a huge page that it splits is attributed to it

This is Cython in pure-Python mode, like `timeline`.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from analysis.passes.acting_threads import ActingThreads
from analysis.passes.last_mappings import LastMappings
from analysis.passes.removal_causes import IOCTLS, Why
from analysis.passes.removal_totals import FIELDS, RemovalTotals, plain
from traces.kernels import triggers
from traces.kernels.spte import LARGE, WRITABLE
from traces.schema import BY_NAME

COMPILED: bool = cython.compiled

_LEAVES = cython.declare(cython.Py_ssize_t, FIELDS.index("leaves"))
_TABLES = cython.declare(cython.Py_ssize_t, FIELDS.index("tables"))
_PROTECTED = cython.declare(cython.Py_ssize_t, FIELDS.index("protected"))
_AGED = cython.declare(cython.Py_ssize_t, FIELDS.index("aged"))

_IS_SMI = cython.declare(cython.int, int(Why.SMI))
_IS_RSM = cython.declare(cython.int, int(Why.RSM))
_IS_CR0 = cython.declare(cython.int, int(Why.CR0))
_IS_CR4 = cython.declare(cython.int, int(Why.CR4))
_IS_EFER = cython.declare(cython.int, int(Why.EFER))
_IS_SREGS = cython.declare(cython.int, int(Why.SREGS))
_IS_CPUID = cython.declare(cython.int, int(Why.CPUID))
_IS_MEMSLOT = cython.declare(cython.int, int(Why.MEMSLOT))
_IS_INVALIDATION = cython.declare(cython.int, int(Why.INVALIDATION))
_IS_NOTIFIER = cython.declare(cython.int, int(Why.NOTIFIER))
_IS_CHANGE = cython.declare(cython.int, int(Why.NOTIFIER_CHANGE))
_IS_AGING = cython.declare(cython.int, int(Why.AGING))
_IS_GET = cython.declare(cython.int, int(Why.GET_DIRTY_LOG))
_IS_CLEAR = cython.declare(cython.int, int(Why.CLEAR_DIRTY_LOG))
_IS_RING = cython.declare(cython.int, int(Why.DIRTY_RING))
_IS_BEGIN = cython.declare(cython.int, int(Why.DIRTY_LOG_BEGINS))
_IS_END = cython.declare(cython.int, int(Why.DIRTY_LOG_ENDS))
_IS_NX = cython.declare(cython.int, int(Why.NX_RECOVERY))
_IS_SPLIT = cython.declare(cython.int, int(Why.SPLIT))
_IS_APICV = cython.declare(cython.int, int(Why.APICV))
_IS_RANGE = cython.declare(cython.int, int(Why.RANGE))
_IS_IOCTL = cython.declare(cython.int, int(Why.IOCTL))
_IS_VM_END = cython.declare(cython.int, int(Why.VM_END))
_IS_OTHER = cython.declare(cython.int, int(Why.OTHER))

_ON_ENTRY = cython.declare(cython.int, BY_NAME["kvm_entry"].code)
_ON_EXIT = cython.declare(cython.int, BY_NAME["kvm_exit"].code)
_ON_SMM = cython.declare(cython.int, BY_NAME["kvm_smm_transition"].code)
_ON_CR = cython.declare(cython.int, BY_NAME["kvm_cr"].code)
_ON_MSR = cython.declare(cython.int, BY_NAME["kvm_msr"].code)
_ON_IOCTL = cython.declare(cython.int, BY_NAME["ioctl"].code)
_ON_IOCTL_END = cython.declare(cython.int, BY_NAME["ioctl_end"].code)
_ON_MEMSLOT = cython.declare(cython.int, BY_NAME["memslot"].code)
_ON_FAULT = cython.declare(cython.int, BY_NAME["kvm_page_fault"].code)
_ON_REQUESTED = cython.declare(cython.int, BY_NAME["kvm_mmu_spte_requested"].code)
_ON_SET = cython.declare(cython.int, BY_NAME["kvm_mmu_set_spte"].code)
_ON_MARK = cython.declare(cython.int, BY_NAME["mark_mmio_spte"].code)
_ON_FAST = cython.declare(cython.int, BY_NAME["fast_page_fault"].code)
_ON_CHANGED = cython.declare(cython.int, BY_NAME["kvm_tdp_mmu_spte_changed"].code)
_ON_ZAP_PAGE = cython.declare(cython.int, BY_NAME["kvm_mmu_prepare_zap_page"].code)
_ON_GET_PAGE = cython.declare(cython.int, BY_NAME["kvm_mmu_get_page"].code)
_ON_ROOT_GET = cython.declare(cython.int, BY_NAME["root_get"].code)
_ON_MMU_LOAD = cython.declare(cython.int, BY_NAME["mmu_load"].code)
_ON_PUT = cython.declare(cython.int, BY_NAME["root_put"].code)
_ON_FREE = cython.declare(cython.int, BY_NAME["table_free"].code)
_ON_ZAP_FAST = cython.declare(cython.int, BY_NAME["kvm_mmu_zap_all_fast"].code)
_ON_ZAP_ROOT = cython.declare(cython.int, BY_NAME["zap_root_begin"].code)
_ON_ZAP_LEAFS = cython.declare(cython.int, BY_NAME["zap_leafs"].code)
_ON_ZAP_ALL = cython.declare(cython.int, BY_NAME["zap_all"].code)
_ON_DESTROY = cython.declare(cython.int, BY_NAME["vm_destroy"].code)
_ON_UNMAP = cython.declare(cython.int, BY_NAME["kvm_unmap_hva_range"].code)
_ON_CHANGE_PTE = cython.declare(cython.int, BY_NAME["kvm_set_spte_hva"].code)
_ON_AGE = cython.declare(cython.int, BY_NAME["kvm_age_hva"].code)
_ON_TEST_AGE = cython.declare(cython.int, BY_NAME["kvm_test_age_hva"].code)
_ON_APICV = cython.declare(cython.int, BY_NAME["kvm_apicv_inhibit_changed"].code)
COLUMNS = (
    "time", "vcpu", "tid", "kind", "root", "role", "level", "as_id", "gfn", "old", "new", "addr", "code", "ret", "refs",
    "slot", "flags",
)  # fmt: skip
_COUNTED_KINDS = np.zeros(256, np.uint8)
_COUNTED_KINDS[[
    _ON_ENTRY, _ON_EXIT, _ON_SMM, _ON_CR, _ON_MSR, _ON_IOCTL, _ON_IOCTL_END, _ON_MEMSLOT, _ON_FAULT, _ON_REQUESTED,
    _ON_SET, _ON_MARK, _ON_FAST, _ON_CHANGED, _ON_ZAP_PAGE, _ON_GET_PAGE, _ON_ROOT_GET, _ON_MMU_LOAD, _ON_PUT, _ON_FREE,
    _ON_ZAP_FAST, _ON_ZAP_ROOT, _ON_ZAP_LEAFS, _ON_ZAP_ALL, _ON_DESTROY, _ON_UNMAP, _ON_CHANGE_PTE, _ON_AGE,
    _ON_TEST_AGE, _ON_APICV,
]] = 1  # fmt: skip

_EFER = cython.declare(cython.ulonglong, triggers.EFER_MSR)
_LARGE = cython.declare(cython.ulonglong, LARGE)
_WRITABLE = cython.declare(cython.ulonglong, WRITABLE)
_PFN = cython.declare(cython.ulonglong, (1 << 52) - (1 << 12))
_MMIO_TYPE = cython.declare(cython.ulonglong, 3)
_SLOTS = cython.declare(cython.Py_ssize_t, 1 << 10)
_FEW = 16  # vCPUs for which there is room at first


@cython.final
@cython.cclass
class Removals:
    """The removals of one VM, counted in `totals`."""

    totals: RemovalTotals
    _threads: ActingThreads
    _pages: LastMappings
    _counted: cython.uchar[::1]
    _context: cython.uchar[::1]  # by vCPU: the cause (Why) if it loses a root now
    _marked: cython.longlong[::1]  # by vCPU: the gfn of its last MMIO SPTE, which some kernels also show as a leaf
    _slot_flags: cython.uchar[::1]
    _shows: cython.bint
    _spte: cython.ulonglong
    _type: cython.int
    _fixed: cython.int
    _there: cython.ulonglong
    _odd: cython.ulonglong
    _accessed: cython.ulonglong
    _meaning: cython.uchar[::1]
    _ioctls: cython.uchar[::1]

    def __init__(self, kernel: Any, causes: Any, roots: Any, slots: Any, recovery: Any, shows: bool) -> None:
        """`causes` and `roots` are results of `causes_of` and `roots_of`.

        `slots` has (id, flags) of slots before the first row.

        `recovery` are the tids of NX huge page recovery. `shows` says that the kernel shows changes of SPTEs.
        """
        self.totals = RemovalTotals()
        self._threads = ActingThreads(self.totals, recovery)
        self._pages = LastMappings(kernel, roots, self.totals)
        self._make_vcpus(_FEW)
        self._pages.make_room(_FEW)
        self._counted, self._ioctls = plain(_COUNTED_KINDS), plain(IOCTLS)
        self._slot_flags = plain(np.zeros(int(_SLOTS), np.uint8))
        for slot, flags in slots:
            if 0 <= slot < _SLOTS:
                self._slot_flags[slot] = 1 | (flags & 1) << 1
        self._shows, self._fixed = shows, kernel.ret_pf.fixed
        self._spte, self._type = kernel.spte.present, kernel.spte.type_shift
        fault = kernel.vendor.fault
        self._there, self._odd, self._accessed = fault.present, fault.reserved, kernel.vendor.accessed
        self._meaning = plain(causes)

    def feed(self, rows: Any) -> None:
        """Take in rows, as columns by name (COLUMNS); `vcpu` and `gfn` are -1 where there is none."""
        done: cython.Py_ssize_t = 0
        while done < len(rows.kind):
            done = self._feed(
                done, rows.time, rows.vcpu, rows.tid, rows.kind, rows.root, rows.role, rows.level, rows.as_id,
                rows.gfn, rows.old, rows.new, rows.addr, rows.code, rows.ret, rows.refs, rows.slot, rows.flags,
            )  # fmt: skip
            if done < len(rows.kind):
                self._make_room(int(rows.vcpu[done]))

    def _make_vcpus(self, room: int) -> None:
        self._context = plain(np.full(room, _IS_OTHER, np.uint8))
        self._marked = plain(np.full(room, -1, np.int64))

    def _make_room(self, vcpu: int) -> None:
        """Make more room for pages, totals, threads or the number of a vCPU, whichever has run out."""
        room: int = len(self._context)
        if vcpu >= room:
            vcpus: list[Any] = [self._context, self._marked]
            self._make_vcpus(max(2 * room, vcpu + 1))
            larger: list[Any] = [self._context, self._marked]
            for to, values in zip(map(np.asarray, larger), vcpus, strict=True):
                to[:room] = values
        self._pages.make_room(len(self._context))
        self.totals.make_room()
        self._threads.make_room()

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _feed(
        self,
        start: cython.Py_ssize_t,
        time: cython.const[cython.longlong][::1],
        vcpu: cython.const[cython.short][::1],
        tid: cython.const[cython.int][::1],
        kind: cython.const[cython.uchar][::1],
        root: cython.const[cython.int][::1],
        role: cython.const[cython.uint][::1],
        level: cython.const[cython.schar][::1],
        as_id: cython.const[cython.schar][::1],
        gfn: cython.const[cython.longlong][::1],
        old: cython.const[cython.ulonglong][::1],
        new: cython.const[cython.ulonglong][::1],
        addr: cython.const[cython.ulonglong][::1],
        code: cython.const[cython.ulonglong][::1],
        ret: cython.const[cython.int][::1],
        refs: cython.const[cython.int][::1],
        slot: cython.const[cython.int][::1],
        flags: cython.const[cython.uchar][::1],
    ) -> cython.Py_ssize_t:
        """Process rows from `start` on; return the row for which a table has to grow, or the number of rows."""
        i: cython.Py_ssize_t
        k: cython.int
        t: cython.Py_ssize_t = -1
        last: cython.int = 0
        v: cython.int
        r: cython.longlong
        why: cython.int
        rows: cython.Py_ssize_t = len(kind)
        vcpus: cython.Py_ssize_t = len(self._context)
        pages_room: cython.Py_ssize_t = self._pages._room()
        totals_room: cython.Py_ssize_t = self.totals._room()
        was: cython.bint
        is_: cython.bint
        j: cython.Py_ssize_t
        if not cython.compiled:
            time, vcpu, tid, kind, root, role = map(memoryview, (time, vcpu, tid, kind, root, role))  # type: ignore[arg-type]
            level, as_id, gfn, old, new, addr = map(memoryview, (level, as_id, gfn, old, new, addr))  # type: ignore[arg-type]
            code, ret, refs, slot, flags = map(memoryview, (code, ret, refs, slot, flags))  # type: ignore[arg-type]
        for i in range(start, rows):
            k = kind[i]
            if not self._counted[k]:
                continue
            if self._pages.held >= pages_room or self.totals.count > totals_room:
                return i
            v = vcpu[i]
            r = min(root[i], self._pages.beyond)
            if t < 0 or tid[i] != last:  # most rows are of the same thread as the row before
                last = tid[i]
                t = self._threads._place(last)
            if t < 0 or v >= vcpus:
                return i
            if k == _ON_CHANGED:
                if not r:  # not every recorder and kernel shows the root
                    r = self._threads.zaps[t]
                was = self._maps(old[i])
                is_ = self._maps(new[i])
                if not was and not is_:
                    continue
                was = was and (level[i] == 1 or old[i] & _LARGE != 0)
                is_ = is_ and (level[i] == 1 or new[i] & _LARGE != 0)
                if was and is_:
                    if (old[i] ^ new[i]) & _PFN:
                        continue
                    if old[i] & ~new[i] & _WRITABLE:
                        j = self._threads._acts(t, tid[i], time[i])
                        self.totals._count_page(j, _PROTECTED, gfn[i])
                        self._pages._change(r, as_id[i], level[i], gfn[i], j, False)
                    elif new[i] & ~old[i] & _WRITABLE:
                        self._pages._mend(v)
                    elif old[i] & ~new[i] & self._accessed:
                        j = self._threads._acts(t, tid[i], time[i])
                        self.totals._count_page(j, _AGED, gfn[i])
                elif was:
                    j = self._threads._acts(t, tid[i], time[i])
                    if not self._maps(new[i]):
                        self.totals._count_page(j, _LEAVES, gfn[i])
                    else:
                        self._pages._split_in_place(v)
                    self._pages._change(r, as_id[i], level[i], gfn[i], j, True)
                elif is_ and r:
                    self._pages._map(r, level[i], gfn[i], v)
                elif is_:
                    self._pages._split(as_id[i], level[i], gfn[i])
            elif k == _ON_EXIT:
                if v >= 0:
                    self._pages.fixing[v] = 0
                    self._context[v] = self._meaning[code[i]] if code[i] < 2048 else self._meaning[0]
                self._threads.at[t] = -1
            elif k == _ON_ENTRY:
                self._threads.at[t] = -1
            elif k == _ON_FAULT:
                if v >= 0:
                    self._threads._may_change(t, _IS_SPLIT, time[i])
                    if code[i] & self._there and not code[i] & self._odd:
                        self._pages._lacks_permission(v, r, cython.cast(cython.longlong, addr[i] >> 12))
            elif k == _ON_REQUESTED:
                if v >= 0:
                    self._threads._may_change(t, _IS_SPLIT, time[i])
            elif k == _ON_SET:
                if (
                    not self._shows
                    and not self._pages._mend(v)
                    and (v < 0 or self._marked[v] != gfn[i] or not self._pages._mapped(r, level[i], gfn[i]))
                ):
                    self._pages._map(r, level[i], gfn[i], v)
            elif k == _ON_MARK:
                if v >= 0:
                    self._marked[v] = gfn[i]
                if not self._pages._mapped(r, 1, gfn[i]):
                    self._pages._map(r, 1, gfn[i], v)
            elif k == _ON_FAST:
                if ret[i] == self._fixed:
                    self._pages._mend(v)
            elif k in (_ON_GET_PAGE, _ON_ROOT_GET, _ON_MMU_LOAD):
                if r > 0 and role[i]:
                    self._pages._name(r, role[i])
            elif k == _ON_SMM:
                if v >= 0:
                    self._context[v] = _IS_SMI if flags[i] & 1 else _IS_RSM
            elif k == _ON_CR:
                if v >= 0 and flags[i] & 1 and code[i] in (0, 4):
                    self._context[v] = _IS_CR0 if code[i] == 0 else _IS_CR4
            elif k == _ON_MSR:
                if v >= 0 and flags[i] & 1 and code[i] == _EFER:
                    self._context[v] = _IS_EFER
            elif k == _ON_IOCTL:
                why = self._ioctls[code[i] & 0xFF]
                if why in (_IS_GET, _IS_CLEAR, _IS_RING):
                    self._threads._begin(t, why, tid[i], time[i])
                else:
                    if v >= 0:
                        self._context[v] = why if why in (_IS_SREGS, _IS_CPUID) else _IS_OTHER
                    if why != _IS_MEMSLOT:
                        self._threads._may_change(t, _IS_IOCTL, time[i])
            elif k == _ON_IOCTL_END:
                self._threads.at[t] = -1
            elif k == _ON_MEMSLOT:
                why = _IS_MEMSLOT
                if 0 <= slot[i] < _SLOTS:
                    if self._slot_flags[slot[i]] & 1 and (self._slot_flags[slot[i]] >> 1 ^ code[i]) & 1:
                        why = _IS_BEGIN if code[i] & 1 else _IS_END
                    self._slot_flags[slot[i]] = cython.cast(cython.uchar, 1 | (code[i] & 1) << 1)
                self._threads._begin(t, why, tid[i], time[i])
            elif k in (_ON_UNMAP, _ON_CHANGE_PTE):
                why = _IS_NOTIFIER if k == _ON_UNMAP else _IS_CHANGE
                self._threads._begin(t, why, tid[i], time[i])
            elif k in (_ON_AGE, _ON_TEST_AGE):
                self._threads._begin(t, _IS_AGING, tid[i], time[i])
            elif k == _ON_APICV:
                self._threads._begin(t, _IS_APICV, tid[i], time[i])
            elif k == _ON_PUT:
                if r > 0 and r < self._pages.beyond and refs[i] == 1 and not self._pages._cause(r):
                    if v >= 0:
                        self._threads._begin(t, self._context[v], tid[i], time[i])
                        self._pages._lose(r, self._threads.at[t])
                        self._threads.at[t] = -1
                    elif not self._threads.ended and self._threads._row(t) >= 0:
                        self._pages._lose(r, self._threads._row(t))
                    else:
                        self._pages._lose(r, self.totals._find(self._threads._unknown(), tid[i]))
            elif k == _ON_FREE:
                if r > 0 and r < self._pages.beyond and not self._pages._cause(r):
                    self._pages._lose(r, self.totals._find(self._threads._unknown(), tid[i]))
            elif k == _ON_ZAP_FAST:
                if self._threads.at[t] < 0 or not self._threads.did[t]:
                    self._threads._begin(t, _IS_INVALIDATION, tid[i], time[i])
                self._pages._invalidate(self._threads.at[t])
            elif k == _ON_ZAP_ROOT:
                self._threads.zaps[t] = r
                j = self._pages._cause(r) if r > 0 else 0
                if j:
                    self._threads._goes_on(t, j, time[i])
                elif self._threads.at[t] < 0:
                    self._threads._begin(t, self._threads._unknown(), tid[i], time[i])
            elif k == _ON_ZAP_LEAFS:
                if self._threads.at[t] < 0 or not self._threads.did[t]:
                    self._threads._begin(t, _IS_RANGE, tid[i], time[i])
            elif k in (_ON_ZAP_ALL, _ON_DESTROY):
                if k == _ON_DESTROY or not (
                    self._threads._row(t) >= 0 and self.totals._cells[self._threads.at[t], 0] == _IS_MEMSLOT
                ):
                    if not self._threads.ended:
                        self._threads._begin(t, _IS_VM_END, tid[i], time[i])
                    self._threads.ended = True
            elif k == _ON_ZAP_PAGE:
                if self._threads._recovers(tid[i]):
                    self._threads._begin(t, _IS_NX, tid[i], time[i])
                self.totals._count(self._threads._acts(t, tid[i], time[i]), _TABLES)
        return rows

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _maps(self, spte: cython.ulonglong) -> cython.bint:
        """Return whether an entry maps something; an MMIO SPTE does not."""
        if self._spte:
            return spte & self._spte != 0
        return spte != 0 and spte >> self._type & 3 != _MMIO_TYPE
