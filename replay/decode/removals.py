# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Find out why pages of a VM had to be mapped again: which cause removed or protected the earlier mapping.

This takes one pass over the rows. A thread does one thing at a time: a row begins it (a notifier, an ioctl, a memslot
change, the zap of a root), and the thread's next such row ends it. What the thread changes in between is attributed to
that cause. A root is lost when its last reference is dropped, and the cause is what the vCPU did since its last exit;
or it is lost when all roots are invalidated. With the root, everything that it mapped is lost. A page that a fault maps
is then compared with what happened to its last mapping under the same role word.

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

from enum import IntEnum
from typing import Any

import cython
import numpy as np

from replay.decode.exits import Left, exit_meanings
from traces.kernels import triggers
from traces.kernels.spte import LARGE, WRITABLE
from traces.schema import BY_NAME

COMPILED: bool = cython.compiled


class Why(IntEnum):
    """The cause by which a page was removed or protected; the first three occur for faults only."""

    FIRST = 0  # the page had not been mapped under this role word
    UNSEEN = 1  # no row shows that it was removed
    UNWRITABLE = 2  # its leaf had never had the permission
    SMI = 3
    RSM = 4
    CR0 = 5
    CR4 = 6
    EFER = 7
    SREGS = 8
    CPUID = 9
    EXIT = 10
    MEMSLOT = 11
    INVALIDATION = 12
    NOTIFIER = 13
    NOTIFIER_CHANGE = 14
    AGING = 15
    GET_DIRTY_LOG = 16
    CLEAR_DIRTY_LOG = 17
    DIRTY_RING = 18
    DIRTY_LOG_BEGINS = 19
    DIRTY_LOG_ENDS = 20
    NX_RECOVERY = 21
    SPLIT = 22
    APICV = 23
    RANGE = 24
    IOCTL = 25
    VM_END = 26
    OTHER = 27


# What is counted for each cause and thread. `mapped`: faults that mapped a page whose last mapping was lost for this
# cause; `fixes`: permission faults on a page that was protected for it; `low` and `high`: the range of gfns.
FIELDS = (
    "why", "tid", "operations", "leaves", "tables", "protected", "aged", "ns", "longest", "mapped", "fixes", "low",
    "high", "first", "last",
)  # fmt: skip
_OPERATIONS = cython.declare(cython.Py_ssize_t, FIELDS.index("operations"))
_LEAVES = cython.declare(cython.Py_ssize_t, FIELDS.index("leaves"))
_TABLES = cython.declare(cython.Py_ssize_t, FIELDS.index("tables"))
_PROTECTED = cython.declare(cython.Py_ssize_t, FIELDS.index("protected"))
_AGED = cython.declare(cython.Py_ssize_t, FIELDS.index("aged"))
_NS = cython.declare(cython.Py_ssize_t, FIELDS.index("ns"))
_LONGEST = cython.declare(cython.Py_ssize_t, FIELDS.index("longest"))
_MAPPED = cython.declare(cython.Py_ssize_t, FIELDS.index("mapped"))
_FIXES = cython.declare(cython.Py_ssize_t, FIELDS.index("fixes"))
_LOW = cython.declare(cython.Py_ssize_t, FIELDS.index("low"))
_HIGH = cython.declare(cython.Py_ssize_t, FIELDS.index("high"))
_SINCE = cython.declare(cython.Py_ssize_t, FIELDS.index("first"))
_UNTIL = cython.declare(cython.Py_ssize_t, FIELDS.index("last"))

_IS_FIRST = cython.declare(cython.int, int(Why.FIRST))
_IS_UNSEEN = cython.declare(cython.int, int(Why.UNSEEN))
_IS_UNWRITABLE = cython.declare(cython.int, int(Why.UNWRITABLE))
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
KINDS = (
    "kvm_entry", "kvm_exit", "kvm_smm_transition", "kvm_cr", "kvm_msr", "ioctl", "ioctl_end", "memslot",
    "kvm_page_fault", "kvm_mmu_spte_requested", "kvm_mmu_set_spte", "mark_mmio_spte", "fast_page_fault",
    "kvm_tdp_mmu_spte_changed",
    "kvm_mmu_prepare_zap_page", "kvm_mmu_get_page", "root_get", "mmu_load", "root_put", "table_free",
    "kvm_mmu_zap_all_fast", "zap_root_begin", "zap_leafs", "zap_all", "vm_destroy", "kvm_unmap_hva_range",
    "kvm_set_spte_hva", "kvm_age_hva", "kvm_test_age_hva", "kvm_apicv_inhibit_changed",
)  # fmt: skip
_COUNTED_KINDS = np.zeros(256, np.uint8)
_COUNTED_KINDS[[BY_NAME[name].code for name in KINDS]] = 1
COLUMNS = (
    "time", "vcpu", "tid", "kind", "root", "role", "level", "as_id", "gfn", "old", "new", "addr", "code", "ret", "refs",
    "slot", "flags",
)  # fmt: skip

# The number bits of KVM's ioctl commands; variants of an ioctl differ in the other bits.
_SET_MEMORY = cython.declare(cython.ulonglong, 0x46)
_SET_MEMORY2 = cython.declare(cython.ulonglong, 0x49)
_GET_LOG = cython.declare(cython.ulonglong, 0x42)
_CLEAR_LOG = cython.declare(cython.ulonglong, 0xC0)
_RESET_RINGS = cython.declare(cython.ulonglong, 0xC7)
_SET_SREGS = cython.declare(cython.ulonglong, triggers.SET_SREGS[0] & 0xFF)
_SET_SREGS2 = cython.declare(cython.ulonglong, triggers.SET_SREGS[1] & 0xFF)
_SET_CPUID2 = cython.declare(cython.ulonglong, triggers.SET_CPUID2 & 0xFF)
_EFER = cython.declare(cython.ulonglong, triggers.EFER_MSR)
_LARGE = cython.declare(cython.ulonglong, LARGE)
_WRITABLE = cython.declare(cython.ulonglong, WRITABLE)
_PFN = cython.declare(cython.ulonglong, (1 << 52) - (1 << 12))
_MMIO_TYPE = cython.declare(cython.ulonglong, 3)
# In compiled code a literal of more than 31 bits would be a Python integer, which is a hundred times slower.
_GFNS = cython.declare(cython.longlong, (1 << 40) - 1)
_GOLDEN = cython.declare(cython.ulonglong, 0x9E3779B97F4A7C15)
_WHOLE = cython.declare(cython.ulonglong, (1 << 64) - 1)

_MOST = cython.declare(cython.int, 254)  # the most rows of `totals`: three, and one for each pair of cause and thread,
_FURTHER = cython.declare(cython.int, 3)  # of which this one stands for all further pairs
_IS_MAPPED = cython.declare(cython.longlong, 255)
_COUNTED = cython.declare(cython.uchar, 255)  # marks a fault that was counted already
_NO_THREAD = cython.declare(cython.longlong, -(1 << 40))
_SLOTS = cython.declare(cython.Py_ssize_t, 1 << 10)
_WORDS = cython.declare(cython.Py_ssize_t, 1 << 8)
_NO_GFN = cython.declare(cython.longlong, 1 << 52)
_FEW = 16  # threads, vCPUs and rows of `totals` for which there is room at first
_PLACES = 1 << 9  # of the hash table of the rows of `totals`
_AT_ONCE = cython.declare(cython.Py_ssize_t, 4)  # no row of a trace adds more rows to `totals`


def roots_of(count: int, uncreated: Any) -> tuple[Any, Any]:
    """Return, by root id for all VMs of a trace, arrays for the cause of each root's loss and for its role word."""
    lost, words = np.zeros(min(count, 1 << 24) + 2, np.uint8), np.zeros(min(count, 1 << 24) + 2, np.uint32)
    for root in uncreated:
        if root["id"] < len(words) - 1:
            words[root["id"]] = root["role"]
    return lost, words


def causes_of(kernel: Any) -> Any:
    """Return by exit code, for all VMs of a trace, the cause if a vCPU loses a root after such an exit."""
    whys = {Left.CR0_WRITE: Why.CR0, Left.CR4_WRITE: Why.CR4, Left.RSM: Why.RSM}
    return np.array([whys.get(Left(each), Why.EXIT) for each in exit_meanings(kernel.vendor)], np.uint8)


@cython.final
@cython.cclass
class Removals:
    """The removals of one VM. `totals` has rows of FIELDS, of which `count` are in use."""

    totals = cython.declare(object, visibility="public")
    count = cython.declare(cython.int, visibility="public")
    _totals: cython.longlong[:, ::1]
    _rows: cython.uchar[::1]  # the hash table by cause and thread of its rows; 0: none
    _counted: cython.uchar[::1]
    _lost: cython.uchar[::1]
    _words: cython.uint[::1]
    _keys: cython.longlong[::1]
    _values: cython.longlong[::1]
    _held: cython.Py_ssize_t
    # By place of a thread: its tid, what it is doing (a row of `totals`, -1: nothing), since when, until when so far
    _tid: cython.longlong[::1]
    _threads: cython.Py_ssize_t
    _at: cython.longlong[::1]
    _since: cython.longlong[::1]
    _done: cython.longlong[::1]
    _did: cython.uchar[::1]
    _zaps: cython.longlong[::1]  # the root that the thread is zapping; 0: none
    _context: cython.uchar[::1]  # by vCPU: the cause (Why) if it loses a root now
    _fixing: cython.uchar[::1]  # by vCPU: the row of `totals` that counts its fault under way if it is a fix; 0: none
    _marked: cython.longlong[::1]  # by vCPU: the gfn of its last MMIO SPTE, which some kernels also show as a leaf
    _slot_flags: cython.uchar[::1]
    _own: cython.uint[::1]  # the role words of this VM
    _own_count: cython.Py_ssize_t
    _nx: cython.longlong[::1]
    _shows: cython.bint
    _ended: cython.bint
    _newest: cython.longlong
    _invalid: cython.longlong  # roots up to this one were invalidated, for the cause in row `_invalid_by`
    _invalid_by: cython.int
    _spte: cython.ulonglong
    _type: cython.int
    _fixed: cython.int
    _smm: cython.uint
    _there: cython.ulonglong
    _odd: cython.ulonglong
    _accessed: cython.ulonglong
    _meaning: cython.uchar[::1]

    def __init__(self, kernel: Any, causes: Any, roots: Any, slots: Any, recovery: Any, shows: bool) -> None:
        """`causes` and `roots` are results of `causes_of` and `roots_of`.

        `slots` has (id, flags) of slots before the first row.

        `recovery` are the tids of NX huge page recovery. `shows` says that the kernel shows changes of SPTEs.
        """
        self._make_totals(_FEW)
        self.totals[: int(_FURTHER) + 1, 0] = (0, 1, 2, _IS_OTHER)
        self._rows, self.count = _plain(np.zeros(_PLACES, np.uint8)), int(_FURTHER) + 1
        self._counted = _plain(_COUNTED_KINDS)
        self._lost, self._words = _plain(roots[0]), _plain(roots[1])
        self._keys, self._values = _plain(np.full(1 << 10, -1, np.int64)), _plain(np.zeros(1 << 10, np.int64))
        self._held = 0
        self._make_threads(_FEW)
        self._make_vcpus(_FEW)
        self._slot_flags = _plain(np.zeros(int(_SLOTS), np.uint8))
        for slot, flags in slots:
            if 0 <= slot < _SLOTS:
                self._slot_flags[slot] = 1 | (flags & 1) << 1
        self._own, self._own_count = _plain(np.zeros(int(_WORDS), np.uint32)), 0
        self._nx = _plain(np.array(sorted(recovery), np.int64))
        self._shows, self._ended = shows, False
        self._newest, self._invalid, self._invalid_by = 0, 0, 0
        self._fixed, self._smm = kernel.ret_pf.fixed, kernel.layout.smm
        self._spte, self._type = kernel.spte.present, kernel.spte.type_shift
        fault = kernel.vendor.fault
        self._there, self._odd, self._accessed = fault.present, fault.reserved, kernel.vendor.accessed
        self._meaning = _plain(causes)

    def feed(self, rows: Any) -> None:
        """Take in rows, as columns by name (COLUMNS); `vcpu` and `gfn` are -1 where there is none."""
        done: cython.Py_ssize_t = 0
        while done < len(rows.kind):
            done = self._feed(
                done, rows.time, rows.vcpu, rows.tid, rows.kind, rows.root, rows.role, rows.level, rows.as_id,
                rows.gfn, rows.old, rows.new, rows.addr, rows.code, rows.ret, rows.refs, rows.slot, rows.flags,
            )  # fmt: skip
            if done < len(rows.kind):
                self._grow(int(rows.vcpu[done]))

    def _make_totals(self, room: int) -> None:
        self.totals = np.zeros((room, len(FIELDS)), np.int64)
        self.totals[:, _LOW] = _NO_GFN
        self.totals[:, _HIGH] = self.totals[:, 1] = -1
        self._totals = _plain(self.totals)

    def _make_threads(self, room: int) -> None:
        self._tid, self._threads = _plain(np.full(room, _NO_THREAD, np.int64)), 0
        self._at = _plain(np.full(room, -1, np.int64))
        self._since, self._done = _plain(np.zeros(room, np.int64)), _plain(np.zeros(room, np.int64))
        self._did = _plain(np.zeros(room, np.uint8))
        self._zaps = _plain(np.zeros(room, np.int64))

    def _make_vcpus(self, room: int) -> None:
        self._context = _plain(np.full(room, _IS_OTHER, np.uint8))
        self._fixing = _plain(np.zeros(room, np.uint8))
        self._marked = _plain(np.full(room, -1, np.int64))

    def _grow(self, vcpu: int) -> None:
        """Make more room for pages, totals, threads or the number of a vCPU, whichever has run out."""
        if self._held >= len(self._keys) // 4 * 3:
            self._grow_pages()
        if self.count > self._room_in_totals():
            totals = self.totals
            self._make_totals(min(2 * len(totals), int(_MOST)))
            self.totals[: len(totals)] = totals
        if 2 * self._threads >= len(self._tid):
            before: list[Any] = [self._tid, self._at, self._since, self._done, self._did, self._zaps]
            self._make_threads(2 * len(self._tid))
            for tid, *state in zip(*map(np.asarray, before), strict=True):
                if tid != _NO_THREAD:
                    t = self._thread(tid)
                    self._at[t], self._since[t], self._done[t], self._did[t], self._zaps[t] = map(int, state)
        if vcpu >= (room := len(self._context)):
            vcpus: list[Any] = [self._context, self._fixing, self._marked]
            self._make_vcpus(max(2 * room, vcpu + 1))
            larger: list[Any] = [self._context, self._fixing, self._marked]
            for to, values in zip(map(np.asarray, larger), vcpus, strict=True):
                to[:room] = values

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _room_in_totals(self) -> cython.Py_ssize_t:
        """Return the most rows that `totals` may have in use before another row of the trace is processed."""
        return len(self._totals) if len(self._totals) == _MOST else len(self._totals) - _AT_ONCE

    def _grow_pages(self) -> None:
        keys: cython.longlong[::1] = self._keys
        values: cython.longlong[::1] = self._values
        i: cython.Py_ssize_t
        at: cython.Py_ssize_t
        room: cython.Py_ssize_t = 2 * len(keys)
        self._keys, self._values = _plain(np.full(room, -1, np.int64)), _plain(np.zeros(room, np.int64))
        for i in range(len(keys)):
            if keys[i] >= 0:
                at = self._place(keys[i])
                self._keys[at] = keys[i]
                self._values[at] = values[i]

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
        t: cython.Py_ssize_t
        v: cython.int
        r: cython.longlong
        nr: cython.ulonglong
        why: cython.int
        rows: cython.Py_ssize_t = len(kind)
        room: cython.Py_ssize_t = len(self._keys) // 4 * 3
        vcpus: cython.Py_ssize_t = len(self._context)
        totals: cython.Py_ssize_t = self._room_in_totals()
        most: cython.longlong = len(self._lost) - 1
        page: cython.longlong
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
            if self._held >= room or self.count > totals:
                return i
            v = vcpu[i]
            r = root[i] if root[i] < most else most
            t = self._thread(tid[i])
            if t < 0 or v >= vcpus:
                return i
            if k == _ON_CHANGED:
                if not r:  # not every recorder and kernel shows the root
                    r = self._zaps[t]
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
                        j = self._acts(t, tid[i], v, time[i])
                        self._totals[j, _PROTECTED] += 1
                        self._pages(j, gfn[i])
                        self._of_page(r, as_id[i], level[i], gfn[i], j, False)
                    elif new[i] & ~old[i] & _WRITABLE:
                        self._mend(v)
                    elif old[i] & ~new[i] & self._accessed:
                        j = self._acts(t, tid[i], v, time[i])
                        self._totals[j, _AGED] += 1
                        self._pages(j, gfn[i])
                elif was:
                    j = self._acts(t, tid[i], v, time[i])
                    if not self._maps(new[i]):
                        self._totals[j, _LEAVES] += 1
                        self._pages(j, gfn[i])
                    elif self._mend(v):  # split in place (from 6.3 on); 7.3 installs no leaf after that
                        self._fixing[v] = _COUNTED
                    self._of_page(r, as_id[i], level[i], gfn[i], j, True)
                elif is_ and r:
                    self._map(self._key(self._words[r], level[i], gfn[i]), r, v)
                elif is_:
                    self._split(as_id[i], level[i], gfn[i])
            elif k == _ON_EXIT:
                if v >= 0:
                    self._fixing[v] = 0
                    self._context[v] = self._meaning[code[i]] if code[i] < 2048 else self._meaning[0]
                self._at[t] = -1
            elif k == _ON_ENTRY:
                self._at[t] = -1
            elif k == _ON_FAULT:
                if v >= 0:
                    self._begin(t, _IS_SPLIT, tid[i], time[i], False)
                    if code[i] & self._there and not code[i] & self._odd:
                        page = cython.cast(cython.longlong, addr[i] >> 12)
                        self._fixing[v] = self._fix(self._words[r], page)
            elif k == _ON_REQUESTED:
                if v >= 0:
                    self._begin(t, _IS_SPLIT, tid[i], time[i], False)
            elif k == _ON_SET:
                if (
                    not self._shows
                    and not self._mend(v)
                    and (
                        v < 0
                        or self._marked[v] != gfn[i]
                        or not self._mapped(self._key(self._words[r], level[i], gfn[i]), r)
                    )
                ):
                    page = self._key(self._words[r], level[i], gfn[i])
                    self._map(page, r, v)
            elif k == _ON_MARK:
                if v >= 0:
                    self._marked[v] = gfn[i]
                page = self._key(self._words[r], 1, gfn[i])
                if not self._mapped(page, r):
                    self._map(page, r, v)
            elif k == _ON_FAST:
                if ret[i] == self._fixed:
                    self._mend(v)
            elif k in (_ON_GET_PAGE, _ON_ROOT_GET, _ON_MMU_LOAD):
                if r > 0 and role[i]:
                    self._words[r] = role[i]
                    self._newest = max(self._newest, r)
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
                nr = code[i] & 0xFF
                why = _IS_IOCTL
                if nr == _GET_LOG:
                    why = _IS_GET
                elif nr == _CLEAR_LOG:
                    why = _IS_CLEAR
                elif nr == _RESET_RINGS:
                    why = _IS_RING
                elif v >= 0:
                    self._context[v] = (
                        _IS_SREGS if nr in (_SET_SREGS, _SET_SREGS2) else _IS_CPUID if nr == _SET_CPUID2
                        else _IS_OTHER
                    )  # fmt: skip
                if nr not in (_SET_MEMORY, _SET_MEMORY2):
                    self._begin(t, why, tid[i], time[i], why != _IS_IOCTL)
            elif k == _ON_IOCTL_END:
                self._at[t] = -1
            elif k == _ON_MEMSLOT:
                why = _IS_MEMSLOT
                if 0 <= slot[i] < _SLOTS:
                    if self._slot_flags[slot[i]] & 1 and (self._slot_flags[slot[i]] >> 1 ^ code[i]) & 1:
                        why = _IS_BEGIN if code[i] & 1 else _IS_END
                    self._slot_flags[slot[i]] = cython.cast(cython.uchar, 1 | (code[i] & 1) << 1)
                self._begin(t, why, tid[i], time[i], True)
            elif k in (_ON_UNMAP, _ON_CHANGE_PTE):
                why = _IS_NOTIFIER if k == _ON_UNMAP else _IS_CHANGE
                self._begin(t, why, tid[i], time[i], True)
            elif k in (_ON_AGE, _ON_TEST_AGE):
                self._begin(t, _IS_AGING, tid[i], time[i], True)
            elif k == _ON_APICV:
                self._begin(t, _IS_APICV, tid[i], time[i], True)
            elif k == _ON_PUT:
                if r > 0 and r < most and refs[i] == 1 and not self._cause(r):
                    if v >= 0:
                        self._begin(t, self._context[v], tid[i], time[i], True)
                        self._lost[r] = cython.cast(cython.uchar, self._at[t])
                        self._at[t] = -1
                    elif not self._ended and 0 <= self._at[t] < _MOST:
                        self._lost[r] = cython.cast(cython.uchar, self._at[t])
                    else:
                        self._lost[r] = self._find(_IS_VM_END if self._ended else _IS_OTHER, tid[i])
            elif k == _ON_FREE:
                if r > 0 and r < most and not self._cause(r):
                    self._lost[r] = self._find(_IS_VM_END if self._ended else _IS_OTHER, tid[i])
            elif k == _ON_ZAP_FAST:
                if self._at[t] < 0 or not self._did[t]:
                    self._begin(t, _IS_INVALIDATION, tid[i], time[i], True)
                self._invalid = self._newest
                self._invalid_by = cython.cast(cython.int, self._at[t])
            elif k == _ON_ZAP_ROOT:
                j = self._cause(r) if r > 0 else 0
                self._zaps[t] = r
                if j:
                    self._at[t] = j
                    self._since[t] = self._done[t] = time[i]
                    self._did[t] = 1
                elif self._at[t] < 0:
                    why = _IS_VM_END if self._ended else _IS_OTHER
                    self._begin(t, why, tid[i], time[i], True)
            elif k == _ON_ZAP_LEAFS:
                if self._at[t] < 0 or not self._did[t]:
                    self._begin(t, _IS_RANGE, tid[i], time[i], True)
            elif k in (_ON_ZAP_ALL, _ON_DESTROY):
                if k == _ON_DESTROY or not (0 <= self._at[t] < _MOST and self._totals[self._at[t], 0] == _IS_MEMSLOT):
                    if not self._ended:
                        self._begin(t, _IS_VM_END, tid[i], time[i], True)
                    self._ended = True
            elif k == _ON_ZAP_PAGE:
                for j in range(len(self._nx)):
                    if self._nx[j] == tid[i]:
                        self._begin(t, _IS_NX, tid[i], time[i], True)
                j = self._acts(t, tid[i], v, time[i])
                self._totals[j, _TABLES] += 1
        return rows

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _thread(self, tid: cython.longlong) -> cython.Py_ssize_t:
        """Return a thread's place, or -1 if there is no room for a new thread."""
        mask: cython.Py_ssize_t = len(self._tid) - 1
        # Not the tid itself: those of many vCPUs follow one another, so that a second run of them would collide with
        # all of the first.
        mixed: cython.ulonglong = cython.cast(cython.ulonglong, tid) * _GOLDEN & _WHOLE
        t: cython.Py_ssize_t = cython.cast(cython.Py_ssize_t, mixed >> 32) & mask
        while self._tid[t] != tid:
            if self._tid[t] == _NO_THREAD:
                if 2 * self._threads > mask:
                    return -1
                self._threads += 1
                self._tid[t] = tid
                return t
            t = t + 1 & mask
        return t

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _maps(self, spte: cython.ulonglong) -> cython.bint:
        """Return whether an entry maps something; an MMIO SPTE does not."""
        if self._spte:
            return spte & self._spte != 0
        return spte != 0 and spte >> self._type & 3 != _MMIO_TYPE

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _key(self, word: cython.uint, level: cython.longlong, gfn: cython.longlong) -> cython.longlong:
        """Return the key of a page under a role word."""
        at: cython.Py_ssize_t = 0
        while at < self._own_count and self._own[at] != word:
            at += 1
        if at == self._own_count and at < _WORDS - 1:
            self._own[at] = word
            self._own_count += 1
        if level < 1 or level > 5:
            level = 1
        gfn = max(gfn, 0) >> (level - 1) * 9 << (level - 1) * 9
        return at << 44 | level << 40 | gfn & _GFNS

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _cause(self, root: cython.longlong) -> cython.Py_ssize_t:
        """Return the row of `totals` for the cause by which a root was lost, or 0 if it was not lost."""
        if self._lost[root]:
            return self._lost[root]
        return self._invalid_by if root <= self._invalid else 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _find(self, why: cython.int, tid: cython.longlong) -> cython.int:
        """Return the row of `totals` for a cause and a thread."""
        mask: cython.Py_ssize_t = len(self._rows) - 1
        mixed: cython.ulonglong = cython.cast(cython.ulonglong, tid << 5 | why) * _GOLDEN & _WHOLE
        place: cython.Py_ssize_t = cython.cast(cython.Py_ssize_t, mixed >> 32) & mask
        at: cython.int
        while self._rows[place]:
            at = self._rows[place]
            if self._totals[at, 0] == why and self._totals[at, 1] == tid:
                return at
            place = place + 1 & mask
        if self.count == _MOST:
            return _FURTHER
        at = self.count
        self.count += 1
        self._totals[at, 0] = why
        self._totals[at, 1] = tid
        self._rows[place] = cython.cast(cython.uchar, at)
        return at

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _begin(
        self,
        t: cython.Py_ssize_t,
        why: cython.int,
        tid: cython.longlong,
        time: cython.longlong,
        counts: cython.bint,
    ) -> cython.void:
        """The thread begins something; without `counts` it is counted as an operation only if it changes something."""
        self._since[t] = self._done[t] = time
        self._did[t] = counts
        if not counts:
            self._at[t] = _MOST + why
            return
        self._at[t] = self._find(why, tid)
        self._operation(self._at[t], time)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _operation(self, at: cython.Py_ssize_t, time: cython.longlong) -> cython.void:
        if not self._totals[at, _OPERATIONS]:
            self._totals[at, _SINCE] = time
        self._totals[at, _OPERATIONS] += 1
        self._totals[at, _UNTIL] = max(self._totals[at, _UNTIL], time)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _acts(
        self,
        t: cython.Py_ssize_t,
        tid: cython.longlong,
        v: cython.int,
        time: cython.longlong,
    ) -> cython.Py_ssize_t:
        """The thread changes something: return the row of `totals` in which
        that is counted, and extend its time until now.
        """
        j: cython.Py_ssize_t
        why: cython.int
        if self._at[t] < 0:
            why = _IS_VM_END if self._ended else _IS_OTHER
            for j in range(len(self._nx)):
                if self._nx[j] == tid:
                    why = _IS_NX
            self._begin(t, why, tid, time, True)
        elif self._at[t] >= _MOST:
            self._at[t] = self._find(cython.cast(cython.int, self._at[t] - _MOST), tid)
            self._operation(self._at[t], self._since[t])
            self._did[t] = True
        j = self._at[t]
        self._totals[j, _NS] += max(time - self._done[t], 0)
        self._done[t] = max(time, self._done[t])
        self._totals[j, _LONGEST] = max(self._totals[j, _LONGEST], self._done[t] - self._since[t])
        self._totals[j, _UNTIL] = max(self._totals[j, _UNTIL], time)
        return j

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _pages(self, at: cython.Py_ssize_t, gfn: cython.longlong) -> cython.void:
        self._totals[at, _LOW] = min(self._totals[at, _LOW], gfn)
        self._totals[at, _HIGH] = max(self._totals[at, _HIGH], gfn)

    # A page's value has three parts: the root that mapped it last, the row of the cause that protected it (0: none),
    # and the row of the cause that removed it (_IS_MAPPED: it is mapped).

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _put(
        self,
        key: cython.longlong,
        root: cython.longlong,
        protect: cython.longlong,
        removed: cython.longlong,
    ) -> cython.void:
        at: cython.Py_ssize_t = self._place(key)
        if self._keys[at] < 0:
            self._keys[at] = key
            self._held += 1
        self._values[at] = root << 16 | protect << 8 | removed

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _mapped(
        self,
        key: cython.longlong,
        root: cython.longlong,
    ) -> cython.bint:
        at: cython.Py_ssize_t = self._place(key)
        return self._keys[at] >= 0 and self._values[at] & 255 == _IS_MAPPED and self._values[at] >> 16 == root

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _of_page(
        self,
        root: cython.longlong,
        as_id: cython.int,
        level: cython.longlong,
        gfn: cython.longlong,
        by: cython.longlong,
        goes: cython.bint,
    ) -> cython.void:
        """A root's leaf is removed or protected; if another root has mapped the page since, nothing changes.

        If the root is not known, every role word of the address space under which the page is mapped is taken.
        """
        w: cython.Py_ssize_t
        at: cython.Py_ssize_t
        key: cython.longlong
        if root:
            key = self._key(self._words[root], level, gfn)
            at = self._place(key)
            if self._keys[at] < 0 or self._values[at] >> 16 == root:
                self._put(key, root, 0 if goes else by, by if goes else _IS_MAPPED)
            return
        for w in range(self._own_count):
            if (self._own[w] & self._smm != 0) == (as_id == 1):
                key = self._key(self._own[w], level, gfn)
                at = self._place(key)
                if self._keys[at] >= 0 and self._values[at] & 255 == _IS_MAPPED:
                    self._values[at] = self._values[at] >> 16 << 16 | (by if goes else by << 8 | _IS_MAPPED)
                    continue
                at = self._place(self._key(self._own[w], level + 1, gfn))
                if self._keys[at] >= 0:  # a part of a huge page whose split no row shows
                    self._put(key, self._values[at] >> 16, 0 if goes else by, by if goes else _IS_MAPPED)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _split(
        self,
        as_id: cython.int,
        level: cython.longlong,
        gfn: cython.longlong,
    ) -> cython.void:
        """A leaf of an unknown root is installed: it is a part of a split
        huge page, or a huge page put together again.
        """
        w: cython.Py_ssize_t
        at: cython.Py_ssize_t
        for w in range(self._own_count):
            if (self._own[w] & self._smm != 0) == (as_id == 1):
                at = self._place(self._key(self._own[w], level + 1, gfn))
                if self._keys[at] < 0:
                    at = self._place(self._key(self._own[w], level, gfn))
                if self._keys[at] >= 0:
                    self._put(self._key(self._own[w], level, gfn), self._values[at] >> 16, 0, _IS_MAPPED)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _map(
        self,
        key: cython.longlong,
        root: cython.longlong,
        v: cython.int,
    ) -> cython.void:
        """A leaf is installed: count it for the cause by which the page's last mapping was lost."""
        at: cython.Py_ssize_t = self._place(key)
        why: cython.Py_ssize_t
        if self._keys[at] < 0:
            why = _IS_FIRST
        else:
            why = self._values[at] & 255
            if self._values[at] >> 16 != root and self._cause(self._values[at] >> 16):
                why = self._cause(self._values[at] >> 16)
            if why == _IS_MAPPED:
                why = _IS_UNSEEN
        if v >= 0:
            if self._fixing[v] != _COUNTED:
                self._totals[why, _MAPPED] += 1
            self._fixing[v] = 0
        self._put(key, root, 0, _IS_MAPPED)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _mend(self, v: cython.int) -> cython.bint:
        """Count a vCPU's fault under way as a fix, if it is one, and return whether it is."""
        if v < 0 or not 0 < self._fixing[v] < _MOST:
            return False
        self._totals[self._fixing[v], _FIXES] += 1
        self._fixing[v] = 0
        return True

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _fix(
        self,
        word: cython.uint,
        gfn: cython.longlong,
    ) -> cython.uchar:
        """Return the row of the cause that took a permission from the faulting page.

        It is counted when the fault restores it.
        """
        level: cython.longlong
        at: cython.Py_ssize_t
        why: cython.longlong = 0
        for level in range(1, 4):
            at = self._place(self._key(word, level, gfn))
            if self._keys[at] >= 0 and self._values[at] & 255 == _IS_MAPPED:
                why = self._values[at] >> 8 & 255
                self._values[at] = self._values[at] & ~cython.cast(cython.longlong, 255 << 8)
                break
        return cython.cast(cython.uchar, why if why else _IS_UNWRITABLE)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _place(self, key: cython.longlong) -> cython.Py_ssize_t:
        """Return the place of a key, or where it has to be put."""
        mask: cython.Py_ssize_t = len(self._keys) - 1
        mixed: cython.ulonglong = cython.cast(cython.ulonglong, key)
        at: cython.Py_ssize_t
        mixed = (mixed ^ mixed >> 29) * _GOLDEN & _WHOLE
        at = cython.cast(cython.Py_ssize_t, mixed >> 20) & mask
        while self._keys[at] != key and self._keys[at] != -1:
            at = at + 1 & mask
        return at


def _plain(array: Any) -> Any:
    """Return an array in the form that loops access: uncompiled, a memoryview,
    whose items are Python's numbers, not numpy's.
    """
    return array if cython.compiled else memoryview(array)
