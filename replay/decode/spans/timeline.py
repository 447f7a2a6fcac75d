# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Where each vCPU's time went, row by row: in the guest, or in which part of handling an exit.

The time between two rows of a vCPU's thread belongs to the state that the later row shows (`vcpu_states`) or, if that
row shows none (a row with an exit's reason, the entry itself), to the state that an earlier row began. Every ns between
the first root that a vCPU loads (or its first entry) and its last row belongs to exactly one state:

    row                         ends a span in state
    kvm_entry                   OTHER, or the state before
    kvm_exit                    GUEST
    kvm_page_fault              FAULT
    kvm_mmu_set_spte            FAULT
    kvm_entry                   FAULT

A vCPU that exits for HLT is IDLE until its next row, and one that goes to userspace for HLT is IDLE until it enters
again. While userspace does not run it (a signal stopped it, or the guest has ended) it is PAUSED. The time for which
its thread waited for a CPU, as a `sched_in` row says, is STEAL. Time for which the host was suspended is in no state,
and is left out of all spans.

This is Cython in pure-Python mode: compiled it processes some 200 million rows a second, and it also runs uncompiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cython
import numpy as np

from replay.decode.exits import (
    CODES,
    EAGAIN,
    EINTR,
    USER_AP_RESET_HOLD,
    USER_DEBUG,
    USER_HLT,
    USER_SHUTDOWN,
    USER_SYSTEM_EVENT,
    idle_exits,
)
from replay.decode.spans.suspends import Suspend
from replay.decode.spans.vcpu_states import BARE, INTERRUPT, NO_SPAN, STILL, UNTOLD, VcpuState, states_of_kinds
from replay.simulate.pools import as_bytes, as_structures, make_pool
from traces.kernels.vendors import SVM, Vendor
from traces.schema import BY_NAME

COMPILED: bool = cython.compiled

_STILL = cython.declare(cython.int, STILL)
_BARE = cython.declare(cython.int, BARE)
_INTERRUPT = cython.declare(cython.int, INTERRUPT)
_ENTRY = cython.declare(cython.int, BY_NAME["kvm_entry"].code)
_EXIT = cython.declare(cython.int, BY_NAME["kvm_exit"].code)
_FAULT = cython.declare(cython.int, BY_NAME["kvm_page_fault"].code)
_USER_EXIT = cython.declare(cython.int, BY_NAME["kvm_userspace_exit"].code)
_SET = cython.declare(cython.int, BY_NAME["kvm_mmu_set_spte"].code)
_IOCTL = cython.declare(cython.int, BY_NAME["ioctl"].code)
_GUEST = cython.declare(cython.int, int(VcpuState.GUEST))
_FAULTING = cython.declare(cython.int, int(VcpuState.FAULT))
_LOAD = cython.declare(cython.int, int(VcpuState.LOAD))
_USER = cython.declare(cython.int, int(VcpuState.USER))
_OTHER = cython.declare(cython.int, int(VcpuState.OTHER))
_IDLE = cython.declare(cython.int, int(VcpuState.IDLE))
_STEAL = cython.declare(cython.int, int(VcpuState.STEAL))
_PAUSED = cython.declare(cython.int, int(VcpuState.PAUSED))
_PREFETCH = cython.declare(cython.int, int(VcpuState.PREFETCH))
_USER_HLT = cython.declare(cython.ulonglong, USER_HLT)
_USER_DEBUG = cython.declare(cython.ulonglong, USER_DEBUG)
_USER_SHUTDOWN = cython.declare(cython.ulonglong, USER_SHUTDOWN)
_USER_SYSTEM_EVENT = cython.declare(cython.ulonglong, USER_SYSTEM_EVENT)
_USER_AP_RESET_HOLD = cython.declare(cython.ulonglong, USER_AP_RESET_HOLD)
_EINTR = cython.declare(cython.int, -EINTR)
_EAGAIN = cython.declare(cython.int, -EAGAIN)
_SLEEPS = cython.declare(cython.ulonglong, 1)  # TASK_INTERRUPTIBLE of a task state
_PAUSE = cython.declare(cython.longlong, 10_000_000)  # ns in userspace after a signal, longer than handling one takes
_STEP = cython.declare(cython.longlong, 1_000_000)  # ns between two moments of a vCPU's progress, approximately
_CODES = cython.declare(cython.ulonglong, CODES)
_UNTOLD = cython.declare(cython.int, UNTOLD)
# What a kind of row shows, where that is neither a state nor nothing.
_SPECIAL = cython.declare(cython.int, 250)  # the least of these, and of _UNTOLD
_GOT_PAGE = cython.declare(cython.int, 250)  # a fault needs a table or, if the page is a root, a load builds it
_SWITCHED_IN = cython.declare(cython.int, 251)  # the thread continues what it was doing
_IGNORED = cython.declare(cython.int, 252)  # table_free: an RCU callback interrupts whatever runs
_NO_SPAN = cython.declare(cython.int, NO_SPAN)

Thread = cython.struct(  # the state of a vCPU's thread after its last row
    time=cython.longlong,  # time of that row; -1: there was none
    kind=cython.longlong,
    rip=cython.ulonglong,  # at the last entry
    state=cython.longlong,
    fetched=cython.longlong,  # the last exit was a fault on an instruction, or on the guest's own page tables
    tid=cython.longlong,
    part=cython.longlong,  # the part of the recorded time in which that row is
    part_end=cython.longlong,  # when that part ends
    next_ms=cython.longlong,  # when the millisecond ends in which that row is
    guest=cython.longlong,  # ns in the guest so far
    guests=cython.longlong,  # number of spans in the guest so far
    idle=cython.longlong,  # ns in IDLE so far
    away=cython.longlong,  # ns so far that the vCPU could not use: STEAL, PAUSED, and suspends of the host
    stolen=cython.longlong,  # the part of `away` in STEAL
    halts=cython.longlong,  # the last exit was for HLT
    rests=cython.longlong,  # the state to which time in userspace belongs now
    signalled=cython.longlong,  # the vCPU went to userspace for a signal
    waited=cython.longlong,  # ns for which the thread has waited for a CPU since that row
    spent=cython.longlong[12],  # ns by VcpuState
)
Moment = cython.struct(  # a vCPU's progress after a row; the fields are those of Thread
    vcpu=cython.longlong,
    time=cython.longlong,
    guest=cython.longlong,
    guests=cython.longlong,
    idle=cython.longlong,
    away=cython.longlong,
    stolen=cython.longlong,
)


@cython.final
@cython.cclass
class Timeline:
    """Divides the time of one VM, batch after batch, into spans that end with its rows.

    `totals` is the ns by vCPU and VcpuState; `backwards` is the number of rows whose time was before that of their
    thread's last row. `progress` has arrays of Moment: for each vCPU the last row in each millisecond, with the guest
    time until then, its number of spans, the idle time, the time that the vCPU could not use, and how much of that was
    stolen. `slept` is the ns by vCPU that were left out because the host was suspended.
    """

    totals = cython.declare(object, visibility="public")
    parts = cython.declare(object, visibility="public")
    progress = cython.declare(list, visibility="public")
    slept = cython.declare(object, visibility="public")
    backwards = cython.declare(cython.longlong, visibility="public")
    _pool: Any
    _moment_pool: Any
    _threads: set  # type: ignore[type-arg]
    _thread: cython.pointer[Thread]
    _moment: cython.pointer[Moment]
    _moments: cython.Py_ssize_t
    _in_part: cython.longlong[:, :, ::1]
    _states: cython.uchar[::1]
    _prefetches: cython.bint
    _fetch: cython.ulonglong  # bits of a fault's code (`vendors.FaultCode`); likewise the next two
    _walk_mask: cython.ulonglong
    _walk: cython.ulonglong
    _interrupts: cython.uchar[::1]  # by exit code: whether it is for an interrupt of the host
    _idles: cython.uchar[::1]  # by exit code: whether it is for HLT or similar
    _suspends: list  # type: ignore[type-arg]
    _least: cython.longlong  # ns; a shorter span contains no suspend of the host
    _slept: cython.longlong[::1]
    _first: cython.longlong
    _width: cython.longlong
    _count: cython.longlong

    def __init__(
        self,
        vcpus: int,
        prefetches: bool = False,
        vendor: Vendor = SVM,
        parts: tuple[int, int, int] | None = None,
        suspends: Sequence[Suspend] = (),
    ) -> None:
        """`prefetches` says that the recorded MMU prefetches, as the shadow MMU does.

        `vendor` gives the meaning of exit and fault codes. `suspends` are the times for which the host was suspended.

        With `parts` = (first, width, count), `self.parts` is added up as well: ns by vCPU, part and state, for `count`
        parts of `width` ns from `first` on.
        """
        vcpus = max(vcpus, 1)
        self._pool = make_pool(vcpus, THREAD)
        self._pool["time"] = -1
        self._pool["kind"] = UNTOLD
        self._pool["state"] = VcpuState.OTHER
        self._pool["tid"] = -1
        self._pool["rests"] = VcpuState.USER
        self._threads = set()
        self.totals = self._pool["spent"]
        first, width, count = parts or (0, 1, 0)
        self.parts = np.zeros((vcpus, count + 1, len(VcpuState)), np.int64)
        self._first, self._width, self._count = first, width, count
        self._pool["part_end"] = -(1 << 62)
        states = states_of_kinds()
        for name, special in (("table_free", _IGNORED), ("sched_in", _SWITCHED_IN), ("kvm_mmu_get_page", _GOT_PAGE)):
            states[BY_NAME[name].code] = special
        self._states = states
        self._prefetches = prefetches
        self._fetch, (self._walk_mask, self._walk) = vendor.fault.fetch, vendor.fault.walk
        interrupts = np.zeros(CODES, np.uint8)
        interrupts[list(vendor.interrupt)] = 1
        self._interrupts = interrupts
        self._idles = idle_exits(vendor)
        self._suspends = list(suspends)
        self._least = min((each.slept for each in suspends), default=1 << 62)
        self.slept = np.zeros(vcpus, np.int64)
        self._slept = self.slept
        self.backwards = 0
        self.progress = []
        self._moment_pool = make_pool(0, MOMENT)
        self._in_part = self.parts
        if cython.compiled:
            thread: cython.uchar[::1] = as_bytes(self._pool)
            self._thread = cython.cast(cython.pointer[Thread], cython.address(thread[0]))
        else:
            self._thread = as_structures(self._pool)

    def feed(self, batch: Any, state: Any, ns: Any, mark: Any, before: Any) -> None:
        """Write, for each row, the span that ends with it: its VcpuState (or
        NO_SPAN), ns, marks, and the kind of the row before.
        """
        if len(batch) > len(self._moment_pool):
            self._moment_pool = make_pool(len(batch), MOMENT)
            if cython.compiled:
                view: cython.uchar[::1] = as_bytes(self._moment_pool)
                self._moment = cython.cast(cython.pointer[Moment], cython.address(view[0]))
            else:
                self._moment = as_structures(self._moment_pool)
        self._moments = 0
        self._feed(
            batch.time, batch.vcpu, batch.tid, batch.kind, batch.root, batch.code, batch.rip, batch.value, batch.ret,
            state, ns, mark, before,
        )  # fmt: skip
        if self._moments:
            self.progress.append(self._moment_pool[: self._moments].copy())

    def finish(self) -> None:
        """Write each vCPU's last moment after the last row."""
        count: cython.Py_ssize_t = self.totals.shape[0]
        last = make_pool(count, MOMENT)
        last["vcpu"] = np.arange(count)
        for name in ("time", "guest", "guests", "idle", "away", "stolen"):
            last[name] = self._pool[name]
        self.progress.append(last[self._pool["time"] >= 0])
        self._moment_pool = make_pool(0, MOMENT)  # release memory that is not needed any more

    def _feed(
        self,
        time: cython.const[cython.longlong][::1],
        vcpu: cython.const[cython.int][::1],
        tid: cython.const[cython.int][::1],
        kind: cython.const[cython.uchar][::1],
        root: cython.const[cython.int][::1],
        code: cython.const[cython.ulonglong][::1],
        rip: cython.const[cython.ulonglong][::1],
        value: cython.const[cython.ulonglong][::1],
        ret: cython.const[cython.int][::1],
        state: cython.uchar[::1],
        ns: cython.longlong[::1],
        mark: cython.uchar[::1],
        before: cython.uchar[::1],
    ) -> None:
        i: cython.Py_ssize_t
        v: cython.Py_ssize_t
        k: cython.int
        was: cython.int
        own: cython.int
        what: cython.int
        marks: cython.int
        now: cython.longlong
        passed: cython.longlong
        away: cython.longlong
        thread: cython.pointer[Thread] = self._thread
        states: cython.uchar[::1] = self._states
        if not cython.compiled:
            time, vcpu, tid, kind = map(memoryview, (time, vcpu, tid, kind))  # type: ignore[arg-type]
            root, code, rip, value, ret = map(memoryview, (root, code, rip, value, ret))  # type: ignore[arg-type]
        with cython.nogil:
            for i in range(kind.shape[0]):
                state[i] = _NO_SPAN
                ns[i] = mark[i] = 0
                v = vcpu[i]
                k = kind[i]
                if v < 0:
                    continue
                own = states[k]
                if own >= _SPECIAL:
                    if own == _IGNORED:
                        continue
                    if own == _SWITCHED_IN:
                        if tid[i] == thread[v].tid:
                            self._comes_back(v, time[i], code[i], value[i])
                        continue
                    if own == _GOT_PAGE:
                        own = _LOAD if root[i] != 0 else _FAULTING
                if tid[i] != thread[v].tid:
                    # What a thread did before it first ran a vCPU, such as setting it up, is not the vCPU's time.
                    if not self._runs_vcpus(tid[i], own == _LOAD or k == _ENTRY):
                        continue
                    thread[v].tid = tid[i]

                if own != _UNTOLD:
                    thread[v].state = own
                what = cython.cast(cython.int, thread[v].state)
                was = cython.cast(cython.int, thread[v].kind)
                marks = 0
                if was == _ENTRY and k == _EXIT:
                    what = _GUEST
                    if rip[i] == thread[v].rip:
                        marks = _STILL | _BARE if thread[v].fetched else _STILL
                else:
                    if was == _USER_EXIT:
                        what = _USER
                    if what == _USER and (was != _IOCTL or thread[v].rests == _PAUSED):
                        what = cython.cast(cython.int, thread[v].rests)
                    if was == _EXIT and thread[v].halts:
                        what = _IDLE
                    elif self._prefetches and was == _SET and k == _SET:
                        what = _PREFETCH

                now = time[i]
                passed = 0
                if thread[v].time >= 0:
                    passed = now - thread[v].time
                    if passed < 0:
                        self.backwards += 1
                        passed = 0
                    if now >= thread[v].next_ms:
                        self._note(v)
                        thread[v].next_ms = (now // _STEP + 1) * _STEP
                    if passed >= self._least:
                        away = self._asleep(thread[v].time, now, what not in (_GUEST, _USER, _IDLE, _PAUSED))
                        self._slept[v] += away
                        thread[v].away += away
                        passed -= away
                    away = 0
                    if thread[v].waited:
                        away = min(thread[v].waited, passed)
                        passed -= away
                        thread[v].spent[_STEAL] += away
                        thread[v].away += away
                        thread[v].stolen += away
                    if what == _GUEST:
                        thread[v].guest += passed
                        thread[v].guests += 1
                    elif what == _IDLE:
                        thread[v].idle += passed
                    elif what == _USER and thread[v].signalled and passed >= _PAUSE:
                        what = _PAUSED
                    if what == _PAUSED:
                        thread[v].away += passed
                    thread[v].spent[what] += passed
                    if self._count:
                        self._spread(v, what, now - away - passed, now - away)
                        if away:
                            self._spread(v, _STEAL, now - away, now)
                if k == _EXIT:
                    thread[v].fetched = thread[v].halts = False
                    if code[i] < _CODES:
                        thread[v].halts = self._idles[code[i]]
                        if self._interrupts[code[i]]:
                            marks |= _INTERRUPT
                elif k == _ENTRY:
                    thread[v].rip = rip[i]
                    thread[v].rests = _USER
                    thread[v].signalled = False
                elif k == _FAULT:
                    thread[v].fetched = self._is_fetch(code[i])
                elif k == _USER_EXIT:
                    thread[v].rests = self._rest(code[i], ret[i])
                    thread[v].signalled = ret[i] == _EINTR
                thread[v].time = now
                thread[v].kind = k
                thread[v].waited = 0
                ns[i] = passed
                state[i] = what
                mark[i] = marks
                before[i] = was

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _note(self, v: cython.Py_ssize_t) -> cython.void:
        """Write a moment: a vCPU's last row was the last one in its millisecond."""
        at: cython.Py_ssize_t = self._moments
        self._moment[at].vcpu = v
        self._moment[at].time = self._thread[v].time
        self._moment[at].guest = self._thread[v].guest
        self._moment[at].guests = self._thread[v].guests
        self._moment[at].idle = self._thread[v].idle
        self._moment[at].away = self._thread[v].away
        self._moment[at].stolen = self._thread[v].stolen
        self._moments = at + 1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _comes_back(
        self, v: cython.Py_ssize_t, time: cython.longlong, code: cython.ulonglong, value: cython.ulonglong
    ) -> cython.void:
        """The vCPU's thread gets a CPU again: it had waited for one, or had
        slept in the kernel because it had nothing to do.
        """
        off: cython.longlong = time - self._thread[v].time
        waited: cython.longlong = cython.cast(cython.longlong, min(value, cython.cast(cython.ulonglong, max(off, 0))))
        self._thread[v].waited += waited
        if code & _SLEEPS and self._thread[v].state == _OTHER and 2 * (off - waited) > off:
            self._thread[v].state = _IDLE

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _rest(self, reason: cython.ulonglong, error: cython.int) -> cython.int:
        """Return the state of a vCPU that went to userspace for this reason, until it enters its guest again."""
        if error < 0:
            return _IDLE if error == _EAGAIN else _USER
        if reason in (_USER_HLT, _USER_AP_RESET_HOLD):
            return _IDLE
        return _PAUSED if reason in (_USER_SHUTDOWN, _USER_SYSTEM_EVENT, _USER_DEBUG) else _USER

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _asleep(self, begin: cython.longlong, end: cython.longlong, in_kernel: cython.bint) -> cython.longlong:
        """Return the ns of [begin, end) for which the host was suspended.

        `in_kernel` says that an exit was being handled.
        """
        found: cython.longlong = 0
        with cython.gil:
            for suspend in self._suspends:
                if in_kernel or not suspend.assumed:
                    found += min(suspend.slept, max(min(end, suspend.end) - max(begin, suspend.begin), 0))
        return found

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _is_fetch(self, code: cython.ulonglong) -> cython.bint:
        """Return whether a fault was on an instruction fetch, or on an access to the guest's own page tables.

        The guest has then not completed the instruction with which it enters, and another fault at the same RIP is on
        its data.
        """
        return code & self._fetch != 0 or code & self._walk_mask == self._walk

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _runs_vcpus(self, tid: cython.int, begins: cython.bint) -> cython.bint:
        """Return whether a thread runs vCPUs, which it does from the first root
        that it loads, or the first guest that it enters.
        """
        found: cython.bint
        with cython.gil:
            if begins:
                self._threads.add(tid)
            found = tid in self._threads
        return found

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _spread(
        self, v: cython.Py_ssize_t, what: cython.int, begin: cython.longlong, end: cython.longlong
    ) -> cython.void:
        """Add a span to the parts of the recorded time in which it lies."""
        part: cython.longlong
        cut: cython.longlong
        last: cython.longlong = self._first + self._width * self._count
        begin = min(max(begin, self._first), last)
        end = min(max(end, self._first), last)
        part = self._thread[v].part
        cut = self._thread[v].part_end
        if begin < cut - self._width or begin >= cut:
            part = (begin - self._first) // self._width
            cut = self._first + (part + 1) * self._width
        while end > cut:
            self._in_part[v, part, what] += cut - begin
            begin = cut
            part += 1
            cut += self._width
        self._in_part[v, part, what] += end - begin
        self._thread[v].part = part
        self._thread[v].part_end = cut


THREAD = [
    ("time", "i8"), ("kind", "i8"), ("rip", "u8"), ("state", "i8"), ("fetched", "i8"), ("tid", "i8"), ("part", "i8"),
    ("part_end", "i8"), ("next_ms", "i8"), ("guest", "i8"), ("guests", "i8"), ("idle", "i8"), ("away", "i8"),
    ("stolen", "i8"), ("halts", "i8"), ("rests", "i8"), ("signalled", "i8"), ("waited", "i8"),
    ("spent", "i8", (len(VcpuState),)),
]  # fmt: skip
MOMENT = [(name, "i8") for name in ("vcpu", "time", "guest", "guests", "idle", "away", "stolen")]
