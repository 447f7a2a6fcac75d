# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Find each vCPU's longest run of exits at one RIP without progress, row by row, with counts that show the reason.

A run shows progress if its addresses move on, if the guest halts, if ports or eventfds are written, or if the guest
runs most of the time. A loop that moves on and then stays at one page has a run of its own from there on; one that
stays and then moves on has ended its run. Exits that the guest did not cause (interrupts) do not end a run. Neither do
a few exits elsewhere from which the vCPU comes back, since the guest's own interrupt handlers exit, too. This is Cython
in pure-Python mode, like `timeline`.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from replay.decode.exits import (
    CODES,
    EAGAIN,
    EINTR,
    USER_FAIL_ENTRY,
    USER_HLT,
    USER_INTERNAL_ERROR,
    USER_MMIO,
    USER_SHUTDOWN,
    idle_exits,
)
from replay.simulate.pools import as_bytes, as_structures, make_pool
from traces.kernels.vendors import SVM, Vendor
from traces.schema import BY_NAME

COMPILED: bool = cython.compiled

_EXIT = cython.declare(cython.int, BY_NAME["kvm_exit"].code)
_ENTRY = cython.declare(cython.int, BY_NAME["kvm_entry"].code)
_FAULT = cython.declare(cython.int, BY_NAME["kvm_page_fault"].code)
_SET = cython.declare(cython.int, BY_NAME["kvm_mmu_set_spte"].code)
_REQUESTED = cython.declare(cython.int, BY_NAME["kvm_mmu_spte_requested"].code)
_FAST = cython.declare(cython.int, BY_NAME["fast_page_fault"].code)
_MARK = cython.declare(cython.int, BY_NAME["mark_mmio_spte"].code)
_HANDLE = cython.declare(cython.int, BY_NAME["handle_mmio_page_fault"].code)
_MMIO = cython.declare(cython.int, BY_NAME["kvm_mmio"].code)
_FAST_MMIO = cython.declare(cython.int, BY_NAME["kvm_fast_mmio"].code)
_MMU_LOAD = cython.declare(cython.int, BY_NAME["mmu_load"].code)
_USER_EXIT = cython.declare(cython.int, BY_NAME["kvm_userspace_exit"].code)
_INJECT = cython.declare(cython.int, BY_NAME["kvm_inj_exception"].code)
_UNMAP = cython.declare(cython.int, BY_NAME["kvm_unmap_hva_range"].code)
KINDS = (
    "kvm_exit", "kvm_entry", "kvm_page_fault", "kvm_mmu_set_spte", "kvm_mmu_spte_requested", "fast_page_fault",
    "mark_mmio_spte", "handle_mmio_page_fault", "kvm_mmio", "kvm_fast_mmio", "mmu_load", "kvm_userspace_exit",
    "kvm_inj_exception", "kvm_unmap_hva_range",
)  # fmt: skip
_UD = cython.declare(cython.ulonglong, 6)  # the vector of #UD
_CODES = cython.declare(cython.ulonglong, CODES)
_HLT = cython.declare(cython.ulonglong, USER_HLT)
_USER_MMIO = cython.declare(cython.ulonglong, USER_MMIO)
_SHUTDOWN = cython.declare(cython.ulonglong, USER_SHUTDOWN)
_FAIL_ENTRY = cython.declare(cython.ulonglong, USER_FAIL_ENTRY)
_INTERNAL = cython.declare(cython.ulonglong, USER_INTERNAL_ERROR)
_EINTR = cython.declare(cython.int, -EINTR)
_EAGAIN = cython.declare(cython.int, -EAGAIN)
_VECTORING = cython.declare(cython.ulonglong, 1 << 31)  # IDT-vectoring information is valid
_HALTS = cython.declare(cython.int, 1)  # this and the next three are meanings of exit codes (`_meaning`)
_IO = cython.declare(cython.int, 2)
_ASYNCHRONOUS = cython.declare(cython.int, 3)
_NESTED = cython.declare(cython.int, 4)
_FEW = cython.declare(cython.longlong, 100)  # at most one in this many exits may be at a new address without progress
_AWAY = cython.declare(cython.longlong, 64)  # the most exits elsewhere that count as the guest's interrupt handler

RipRun = cython.struct(  # consecutive exits of a vCPU at one RIP, with counts of the rows among them
    rip=cython.ulonglong,
    since=cython.longlong,
    until=cython.longlong,
    seq=cython.longlong,
    exits=cython.longlong,
    still=cython.longlong,  # exits at the RIP with which the vCPU had entered
    guest=cython.longlong,  # ns in the guest
    faults=cython.longlong,
    requested=cython.longlong,
    installed=cython.longlong,
    fixed=cython.longlong,  # faults repaired by fast_page_fault
    marked=cython.longlong,  # MMIO SPTEs made
    mmio=cython.longlong,  # exits to userspace for MMIO
    loads=cython.longlong,
    moves=cython.longlong,  # faults on another page than the one before
    fresh=cython.longlong,  # accesses below or above all earlier addresses of the run
    halts=cython.longlong,  # exits for HLT, and exits to userspace for it
    ports=cython.longlong,  # exits for port I/O, and MMIO writes to an eventfd
    unasked=cython.longlong,  # exits that the guest did not cause; they are not in `exits`
    nested=cython.longlong,  # exits for faults in the second-level tables
    vectoring=cython.longlong,  # those of them while an event was being delivered (VMX)
    errors=cython.longlong,  # KVM_RUNs that failed
    error=cython.longlong,  # errno of the last of them
    internal=cython.longlong,  # exits to userspace with KVM_EXIT_INTERNAL_ERROR
    shutdowns=cython.longlong,  # exits to userspace with KVM_EXIT_SHUTDOWN
    failed=cython.longlong,  # exits to userspace with KVM_EXIT_FAIL_ENTRY
    undefined=cython.longlong,  # #UDs injected
    reserved=cython.longlong,  # faults with a reserved bit set
    writes=cython.longlong,  # faults by writes
    present=cython.longlong,  # faults on a leaf that was present
    addr=cython.ulonglong,  # address of the last access
    notified=cython.longlong,  # MMU notifiers of the VM during the run
    before=cython.longlong,  # row of the last exit but one
    last=cython.longlong,  # row of the last exit
)
RIP_RUN = [("rip", "u8")] + [
    (name, "u8" if name == "addr" else "i8")
    for name in (
        "since", "until", "seq", "exits", "still", "guest", "faults", "requested", "installed", "fixed", "marked",
        "mmio", "loads", "moves", "fresh", "halts", "ports", "unasked", "nested", "vectoring",
        "errors", "error", "internal", "shutdowns", "failed",
        "undefined", "reserved", "writes", "present", "addr", "notified", "before", "last",
    )
]  # fmt: skip

Follow = cython.struct(  # the state of a vCPU after its last row
    rip=cython.ulonglong,  # RIP at the last entry
    entered=cython.longlong,  # time of the last entry; -1: it has exited since, or none was seen
    page=cython.longlong,  # page of the last fault; -1: none
    home=cython.longlong,  # page of the run's first fault; -1: none
    moved=cython.longlong,  # number of the run's exits when its address last moved on
    low=cython.ulonglong,  # least address of the run
    high=cython.ulonglong,  # greatest address of the run
    notified=cython.longlong,  # number of MMU notifiers when the run began
    ended=cython.longlong,  # row of the last exit to userspace; -1: none, or the vCPU has entered since
    reason=cython.longlong,  # KVM_EXIT_* of that exit
    error=cython.longlong,  # error of that KVM_RUN, negative; else 0
    time=cython.longlong,  # time of that exit
    shutdowns=cython.longlong,  # number of exits to userspace with KVM_EXIT_SHUTDOWN
    exit=cython.longlong,  # row of the last exit
    at=cython.ulonglong,  # RIP of the last exit
    away=cython.longlong,  # exits elsewhere since the run's last exit, while the vCPU may come back
    back=cython.longlong,  # the run's `still` when the vCPU last came back
)
FOLLOW = [
    (name, "u8" if name in ("rip", "low", "high", "at") else "i8")
    for name in (
        "rip", "entered", "page", "home", "moved", "low", "high", "notified", "ended", "reason", "error", "time",
        "shutdowns", "exit", "at", "away", "back",
    )
]  # fmt: skip


@cython.final
@cython.cclass
class RipRuns:
    """The runs of one VM. After `finish`, `longest` has a row of RipRun for each vCPU, with 0 exits if it had no run.

    `ends` has a row of Follow for each vCPU, which says why it last went to userspace if it has not entered since.
    """

    longest = cython.declare(object, visibility="public")
    ends = cython.declare(object, visibility="public")
    _pool: Any
    _going: cython.pointer[RipRun]
    _longest: cython.pointer[RipRun]
    _vcpu: cython.pointer[Follow]
    _notified: cython.longlong
    _told: cython.uchar[::1]  # by kind: whether its rows say anything of a run
    _meaning: cython.uchar[::1]
    _write: cython.ulonglong  # bits of a fault's code; likewise the next two
    _reserved: cython.ulonglong
    _present: cython.ulonglong
    _fixed: cython.int
    _tells: cython.bint  # `addr` of an exit for a fault is the address (SVM), not the event being delivered (VMX)

    def __init__(self, vcpus: int, vendor: Vendor = SVM, fixed: int = -1) -> None:
        """`vendor` gives the meaning of exit codes and fault codes.

        `fixed` is RET_PF_FIXED, which fast_page_fault returns.
        """
        self._pool, self.longest = (make_pool(max(vcpus, 1), RIP_RUN) for _ in range(2))
        self.ends = make_pool(max(vcpus, 1), FOLLOW)
        for name in ("entered", "page", "home", "ended", "exit"):
            self.ends[name] = -1
        self._notified = 0
        self._told = np.zeros(256, np.uint8)
        for name in KINDS:
            self._told[BY_NAME[name].code] = 1
        meaning = np.zeros(CODES, np.uint8)
        meaning[idle_exits(vendor) != 0] = 1
        meaning[list(vendor.io)] = 2
        meaning[list(vendor.asynchronous)] = 3
        meaning[[*vendor.nested_fault, *vendor.mmio]] = 4
        self._meaning = meaning
        self._write, self._reserved, self._present = vendor.fault.write, vendor.fault.reserved, vendor.fault.present
        self._fixed, self._tells = fixed, vendor.name == SVM.name
        if cython.compiled:
            going: cython.uchar[::1] = as_bytes(self._pool)
            longest: cython.uchar[::1] = as_bytes(self.longest)
            vcpu: cython.uchar[::1] = as_bytes(self.ends)
            self._going = cython.cast(cython.pointer[RipRun], cython.address(going[0]))
            self._longest = cython.cast(cython.pointer[RipRun], cython.address(longest[0]))
            self._vcpu = cython.cast(cython.pointer[Follow], cython.address(vcpu[0]))
        else:
            self._going, self._longest = as_structures(self._pool), as_structures(self.longest)
            self._vcpu = as_structures(self.ends)

    def feed(self, batch: Any) -> None:
        """Take in a batch: its columns `seq`, `time`, `vcpu` (dense, -1 for
        none), `kind`, `rip`, `addr`, `code` and `ret`.
        """
        self._feed(batch.seq, batch.time, batch.vcpu, batch.kind, batch.rip, batch.addr, batch.code, batch.ret)

    def finish(self) -> None:
        """End all runs after the last row."""
        v: cython.Py_ssize_t
        for v in range(len(self._pool)):
            self._end_run(v)

    def _feed(
        self,
        seq: cython.const[cython.longlong][::1],
        time: cython.const[cython.longlong][::1],
        vcpu: cython.const[cython.int][::1],
        kind: cython.const[cython.uchar][::1],
        rip: cython.const[cython.ulonglong][::1],
        addr: cython.const[cython.ulonglong][::1],
        code: cython.const[cython.ulonglong][::1],
        ret: cython.const[cython.int][::1],
    ) -> None:
        i: cython.Py_ssize_t
        told: cython.uchar[::1] = self._told
        if not cython.compiled:
            seq, time, vcpu, kind, rip, addr = map(memoryview, (seq, time, vcpu, kind, rip, addr))  # type: ignore[arg-type]
            code, ret = map(memoryview, (code, ret))  # type: ignore[arg-type]
        with cython.nogil:
            for i in range(kind.shape[0]):
                if not told[kind[i]]:
                    continue
                if kind[i] == _UNMAP:
                    self._notified += 1
                elif vcpu[i] >= 0:
                    self._follow(vcpu[i], kind[i], seq[i], time[i], rip[i], addr[i], code[i], ret[i])

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _follow(
        self,
        v: cython.Py_ssize_t,
        k: cython.int,
        seq: cython.longlong,
        time: cython.longlong,
        rip: cython.ulonglong,
        addr: cython.ulonglong,
        code: cython.ulonglong,
        ret: cython.int,
    ) -> cython.void:
        """Continue the vCPU's run of exits at one RIP, or begin another."""
        run: cython.pointer[RipRun] = self._going
        page: cython.longlong
        if k == _EXIT:
            self._exits(v, seq, time, rip, addr, code)
        elif k == _ENTRY:
            self._vcpu[v].rip = rip
            self._vcpu[v].entered = time
            self._vcpu[v].ended = -1
        elif k == _USER_EXIT:
            self._goes_out(v, seq, time, code, ret)
        elif self._vcpu[v].away:
            pass  # what the guest's interrupt handler does is not part of the run
        elif k == _FAULT:
            page = cython.cast(cython.longlong, addr >> 12)
            if page != self._vcpu[v].page and page != self._vcpu[v].home and self._vcpu[v].page >= 0:
                self._moves_on(v, run[v].moves)
                run[v].moves += run[v].exits > 1
            self._vcpu[v].page = page
            if self._vcpu[v].home < 0:
                self._vcpu[v].home = page
            run[v].faults += 1
            run[v].writes += code & self._write != 0
            run[v].reserved += code & self._reserved != 0
            run[v].present += code & self._present != 0
            self._accesses(v, addr)
        elif k == _SET:
            run[v].installed += 1
        elif k == _REQUESTED:
            run[v].requested += 1
        elif k == _FAST:
            run[v].fixed += ret == self._fixed
        elif k == _MARK:
            run[v].marked += 1
        elif k in (_HANDLE, _MMIO):
            self._accesses(v, addr)
        elif k == _FAST_MMIO:
            run[v].ports += 1
        elif k == _INJECT:
            run[v].undefined += code == _UD
        elif k == _MMU_LOAD:
            run[v].loads += 1

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _exits(
        self,
        v: cython.Py_ssize_t,
        seq: cython.longlong,
        time: cython.longlong,
        rip: cython.ulonglong,
        addr: cython.ulonglong,
        code: cython.ulonglong,
    ) -> cython.void:
        run: cython.pointer[RipRun] = self._going
        meaning: cython.int = self._meaning[code] if code < _CODES else 0
        ran: cython.longlong = time - self._vcpu[v].entered if self._vcpu[v].entered >= 0 else 0
        self._vcpu[v].exit = seq
        self._vcpu[v].at = rip
        if meaning == _ASYNCHRONOUS:
            run[v].unasked += 1
            run[v].guest += ran
            self._vcpu[v].entered = -1
            return
        if run[v].exits and run[v].rip != rip and self._may_come_back(v, rip):
            self._vcpu[v].away += 1
            run[v].guest += ran
            self._vcpu[v].entered = -1
            return
        if self._vcpu[v].away and run[v].rip == rip:
            self._vcpu[v].back = run[v].still
        self._vcpu[v].away = 0
        if not run[v].exits or run[v].rip != rip:
            self._end_run(v)
            self._begin_run(v, seq, time, rip)
        run[v].exits += 1
        run[v].until = time
        run[v].before = run[v].last
        run[v].last = seq
        run[v].halts += meaning == _HALTS
        run[v].ports += meaning == _IO
        if self._vcpu[v].entered >= 0:
            run[v].still += self._vcpu[v].rip == rip
            if run[v].exits > 1:  # before the first exit the guest was elsewhere
                run[v].guest += ran
        self._vcpu[v].entered = -1
        if meaning == _NESTED:
            if not self._tells:
                run[v].vectoring += addr & _VECTORING != 0
            elif addr:
                self._accesses(v, addr)
            run[v].nested += 1

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _may_come_back(self, v: cython.Py_ssize_t, rip: cython.ulonglong) -> cython.bint:
        """Return, at an exit elsewhere, whether an interrupt took the vCPU away from its run, rather than progress.

        It did if the vCPU had last entered at the run's RIP, exits there mostly without completing an instruction, and
        has done so again since it last came back.
        """
        run: cython.pointer[RipRun] = self._going
        if self._vcpu[v].away:  # it may, unless it makes no progress there either
            return self._vcpu[v].away < _AWAY and (self._vcpu[v].entered < 0 or self._vcpu[v].rip != rip)
        if self._vcpu[v].entered < 0 or self._vcpu[v].rip != run[v].rip or self._goes_on(v):
            return False
        return run[v].still > self._vcpu[v].back and run[v].still * 2 >= run[v].exits

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _begin_run(
        self, v: cython.Py_ssize_t, seq: cython.longlong, time: cython.longlong, rip: cython.ulonglong
    ) -> cython.void:
        run: cython.pointer[RipRun] = self._going
        run[v].rip = rip
        run[v].since = time
        run[v].seq = run[v].last = seq
        run[v].exits = run[v].still = run[v].guest = run[v].faults = run[v].requested = run[v].installed = 0
        run[v].fixed = run[v].marked = run[v].mmio = run[v].loads = run[v].moves = run[v].fresh = run[v].halts = 0
        run[v].ports = run[v].unasked = run[v].nested = run[v].vectoring = 0
        run[v].errors = run[v].error = run[v].internal = run[v].shutdowns = run[v].failed = 0
        run[v].undefined = run[v].reserved = run[v].writes = run[v].present = 0
        run[v].addr = 0
        self._vcpu[v].home = -1
        self._vcpu[v].moved = 0
        self._vcpu[v].away = self._vcpu[v].back = 0
        self._vcpu[v].low = 0xFFFFFFFFFFFFFFFF
        self._vcpu[v].high = 0
        self._vcpu[v].notified = self._notified

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _accesses(self, v: cython.Py_ssize_t, addr: cython.ulonglong) -> cython.void:
        run: cython.pointer[RipRun] = self._going
        run[v].addr = addr
        if addr < self._vcpu[v].low or addr > self._vcpu[v].high:
            self._moves_on(v, run[v].fresh - 1)
            run[v].fresh += 1
            self._vcpu[v].low = min(self._vcpu[v].low, addr)
            self._vcpu[v].high = max(self._vcpu[v].high, addr)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _moves_on(self, v: cython.Py_ssize_t, before: cython.longlong) -> cython.void:
        """The run's address moves on: unless that is rare, or happens for the
        first time, another run begins with this exit.
        """
        run: cython.pointer[RipRun] = self._going
        if before > 0 and run[v].exits - self._vcpu[v].moved < _FEW:
            self._end_run(v)
            self._begin_run(v, run[v].last, run[v].until, run[v].rip)
            run[v].exits = 1
            run[v].until = run[v].since
        self._vcpu[v].moved = run[v].exits

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _goes_out(
        self,
        v: cython.Py_ssize_t,
        seq: cython.longlong,
        time: cython.longlong,
        reason: cython.ulonglong,
        error: cython.int,
    ) -> cython.void:
        """KVM_RUN returns to userspace. A write that spans two accesses returns twice."""
        run: cython.pointer[RipRun] = self._going
        again: cython.bint = self._vcpu[v].ended >= 0
        self._vcpu[v].ended = seq
        self._vcpu[v].reason = cython.cast(cython.longlong, reason)
        self._vcpu[v].error = error
        self._vcpu[v].time = time
        if error >= 0 and reason == _SHUTDOWN and not again:
            self._vcpu[v].shutdowns += 1
        if again or self._vcpu[v].away:
            return
        if error < 0:
            if error != _EINTR and error != _EAGAIN:
                run[v].errors += 1
                run[v].error = -error
        elif reason == _HLT:
            run[v].halts += 1
        elif reason == _USER_MMIO:
            run[v].mmio += 1
        elif reason == _INTERNAL:
            run[v].internal += 1
        elif reason == _SHUTDOWN:
            run[v].shutdowns += 1
        elif reason == _FAIL_ENTRY:
            run[v].failed += 1

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _end_run(self, v: cython.Py_ssize_t) -> cython.void:
        self._going[v].notified = self._notified - self._vcpu[v].notified
        if self._going[v].exits > self._longest[v].exits and not self._goes_on(v):
            if cython.compiled:
                self._longest[v] = self._going[v]
            else:
                self.longest[v] = self._pool[v]

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _goes_on(self, v: cython.Py_ssize_t) -> cython.bint:
        """Return whether a run shows progress."""
        run: cython.pointer[RipRun] = self._going
        exits: cython.longlong = run[v].exits
        if run[v].halts * 2 >= exits or run[v].ports * 2 >= exits:
            return True
        if (run[v].moves * _FEW >= exits and exits > 2) or (run[v].fresh - 1) * _FEW >= exits:
            return True
        if (run[v].errors + run[v].internal + run[v].shutdowns + run[v].failed) * 2 >= exits:
            return False
        return run[v].guest * 4 >= 3 * (run[v].until - run[v].since) and exits > 1
