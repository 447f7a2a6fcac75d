# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Steal time where all CPUs share one, as in the lab, whose emulator runs its CPUs in turn.

Recorded spans of vCPUs contain the run time of other tasks, which another policy would not have. There one thing goes
on at a time, so that the time between two rows of the VM is that of the later row's thread: what a zap worker took of
a vCPU's span is taken out of it (`lost`), and is the measure of what zaps cost there. What other tasks took (the
recorder above all) has no rows: a span many times as long as others between the same two kinds of row was preempted,
and is cut to their median (`preempted`). Where `sched_in` rows tell what a thread waited, that is out of the spans
already: `lost` is then part of it, and what is cut is the worker's spans, for it is preempted as well.

A kernel whose worker zaps has whoever changes memslots wait for it. How long that is beyond the zaps themselves
(`awaited`) depends on who else wants the worker's CPU, and another policy would not have it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import cython
import numpy as np

from replay.decode.vcpu_states import NO_SPAN, STILL, VcpuState
from traces.schema import BY_NAME

COMPILED: bool = cython.compiled

_TIMES = 10  # a span this many times the median of its like, and longer than _LEAST ns, was preempted
_LEAST = 50_000
_ENOUGH = 10  # spans of a kind, for a median
_TIMES_OF_WORKER = 3  # its zaps differ, as roots do; but preempted, it waits for a time slice or more
_NOTHING = 2  # a time in the guest of up to so many times the short ones is the switch, and little else

_NO_SPAN = cython.declare(cython.int, NO_SPAN)
_WAITS = cython.declare(cython.int, BY_NAME["zap_invalidated_begin"].code)
_WAITED = cython.declare(cython.int, BY_NAME["zap_invalidated_end"].code)
_BEGIN = cython.declare(cython.int, BY_NAME["zap_root_begin"].code)
_END = cython.declare(cython.int, BY_NAME["zap_root_end"].code)
_USER = cython.declare(cython.int, int(VcpuState.USER))
_REMOVES = cython.declare(cython.int, BY_NAME["kvm_mmu_prepare_zap_page"].code)


@cython.final
@cython.cclass
class Steal:
    """Takes steal time out of the spans of one VM, where `shared`; and measures zaps by other tasks everywhere.

    `lost` is what zap workers took, `preempted` what others did, ns by vCPU. `taken` is `lost`, in arrays of (vCPU,
    boot ns, ns), where `sched_in` rows tell. `removed` tables took tasks that are neither vCPUs nor workers `removing`
    ns. `awaited` is ns by vCPU in userspace while an invalidation waited for a worker that did not zap.
    """

    shared = cython.declare(cython.bint, visibility="public")
    known = cython.declare(cython.bint, visibility="public")
    lost = cython.declare(object, visibility="public")
    preempted = cython.declare(object, visibility="public")
    taken = cython.declare(list, visibility="public")
    awaited = cython.declare(object, visibility="public")
    removed = cython.declare(cython.longlong, visibility="public")
    removing = cython.declare(cython.longlong, visibility="public")
    _workers: set  # type: ignore[type-arg]
    _zapping: dict  # type: ignore[type-arg]
    _time: cython.longlong  # of the last row, and its kind
    _kind: cython.int
    _worked: cython.longlong  # ns of the workers, in all
    _waiting: cython.longlong  # invalidations that wait for the worker
    _since: cython.longlong  # when the first of them began to, and how long the worker has zapped since
    _zapped: cython.longlong
    _idled: cython.longlong  # ns in all that invalidations waited for more than zaps
    _taken: cython.longlong[::1]  # `_worked` at each vCPU's last row
    _lost: cython.longlong[::1]
    _idle: cython.longlong[::1]  # `_idled` at each vCPU's last row
    _awaited: cython.longlong[::1]

    def __init__(self, vcpus: int, shared: bool, workers: Collection[int], known: bool = False) -> None:
        """`shared`: all run on one CPU. `workers` are the tids of kernel workers. `known`: spans are without what their
        threads waited for a CPU.
        """
        self.shared = shared
        self.known = known
        self.lost = np.zeros(vcpus, np.int64)
        self.preempted = np.zeros(vcpus, np.int64)
        self.taken = []
        self.removed = self.removing = 0
        self._workers = set(workers)
        self._zapping = {}
        self._time = self._kind = -1
        self._worked = self._waiting = self._since = self._zapped = self._idled = 0
        self._taken = np.zeros(vcpus, np.int64)
        self._lost = self.lost
        self.awaited = np.zeros(vcpus, np.int64)
        self._idle = np.zeros(vcpus, np.int64)
        self._awaited = self.awaited

    def feed(self, batch: Any, state: Any, ns: Any, mark: Any, before: Any) -> None:
        """Shorten the spans of a batch (`Timeline.feed`) by what was not theirs."""
        lost = np.zeros(len(batch) if self.shared and self.known else 0, np.int64)
        work = self._work(batch) if self._workers else lost[:0]
        self._feed(batch.time, batch.vcpu, batch.tid, batch.kind, state, ns, lost, work)
        if len(rows := np.flatnonzero(lost)):
            self.taken.append(np.column_stack([batch.vcpu[rows], batch.time[rows], lost[rows]]))
        if self.shared and not self.known:
            self._cut(batch, state, ns, mark, before)

    def _work(self, batch: Any) -> Any:
        """By row: ns since the row before it that its thread, a worker, was at work."""
        work = np.zeros(len(batch), np.int64)
        rows = np.flatnonzero(batch.vcpu < 0)
        rows = rows[np.isin(batch.tid[rows], list(self._workers))]
        if self._time < 0:
            rows = rows[rows > 0]
        first = rows == 0  # the row before it is the last one of the batch before
        spans = batch.time[rows] - np.where(first, self._time, batch.time[rows - 1])
        if self.shared and self.known:  # where not, what others took while a worker ran is no time of the vCPU's either
            kinds = batch.kind.astype(np.int64)
            between = np.where(first, self._kind, kinds[rows - 1]) << 8 | kinds[rows]
            for pair in np.unique(between):
                alike = spans[between == pair]
                most = max(_TIMES_OF_WORKER * int(np.median(alike)), _LEAST)
                if len(alike) >= _ENOUGH:
                    spans[(between == pair) & (spans > most)] = int(np.median(alike))
        work[rows] = np.maximum(spans, 0)
        return work

    def taken_of(self, vcpu: int) -> tuple[Any, Any]:
        """One vCPU's part of `taken`, in order: boot ns, and ns."""
        every = np.concatenate(self.taken) if self.taken else np.zeros((0, 3), np.int64)
        mine = every[every[:, 0] == vcpu]
        return mine[:, 1], mine[:, 2]

    def _feed(
        self,
        time: cython.const[cython.longlong][::1],
        vcpu: cython.const[cython.int][::1],
        tid: cython.const[cython.int][::1],
        kind: cython.const[cython.uchar][::1],
        state: cython.const[cython.uchar][::1],
        ns: cython.longlong[::1],
        lost: cython.longlong[::1],
        work: cython.const[cython.longlong][::1],
    ) -> None:
        i: cython.Py_ssize_t
        v: cython.Py_ssize_t
        k: cython.int
        taken: cython.longlong
        works: cython.bint = work.shape[0] > 0
        with cython.nogil:
            for i in range(kind.shape[0]):
                v = vcpu[i]
                k = kind[i]
                if v < 0 and k in (_BEGIN, _END, _REMOVES):
                    with cython.gil:
                        self._zap(tid[i], k, time[i])
                if works:
                    self._works(k, time[i], work[i])
                if state[i] == _NO_SPAN:
                    continue
                if works:
                    if state[i] == _USER:
                        self._awaited[v] += min(self._idled - self._idle[v], ns[i])
                    self._idle[v] = self._idled
                if self.shared:
                    taken = self._worked - self._taken[v]
                    self._taken[v] = self._worked
                    if not self.known:
                        taken = min(taken, ns[i])
                        ns[i] -= taken
                    else:
                        lost[i] = taken
                    self._lost[v] += taken
            if kind.shape[0]:
                self._time = time[kind.shape[0] - 1]
                self._kind = kind[kind.shape[0] - 1]

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _works(self, k: cython.int, time: cython.longlong, work: cython.longlong) -> cython.void:
        """A row where there is a worker, which worked for so long until then."""
        if k == _WAITS:
            if not self._waiting:
                self._since = time
                self._zapped = 0
            self._waiting += 1
        elif k == _WAITED and self._waiting:
            self._waiting -= 1
            if not self._waiting:
                self._idled += max(time - self._since - self._zapped, 0)
        # What an invalidation waits for is done under every policy, once the worker is at it.
        if self._waiting:
            self._zapped += work if k != _BEGIN else 0
        else:
            self._worked += work

    def _zap(self, tid: int, kind: int, time: int) -> None:
        """Zaps by other tasks measure a table's removal where no worker does."""
        if tid in self._workers:
            return
        if kind == _REMOVES:
            self.removed += 1
        elif kind == _BEGIN:
            self._zapping[tid] = time
        elif tid in self._zapping:
            self.removing += time - self._zapping.pop(tid)

    def _cut(self, batch: Any, state: Any, ns: Any, mark: Any, before: Any) -> None:
        """Cut spans that are far longer than their like to the median of these."""
        spans = np.flatnonzero(state != NO_SPAN)
        still = mark[spans] & STILL != 0
        between = before[spans].astype(np.int64) << 8 | batch.kind[spans]
        # Where the guest did nothing, all beyond the switch is preemption. It did something where what is usual is far
        # from the short times in the guest.
        guest = ns[spans][state[spans] == VcpuState.GUEST]
        nothing = still.any() and np.median(ns[spans[still]]) <= _NOTHING * np.quantile(guest, 0.1)
        like = [(spans[still], 1, 0) if nothing else (spans[still], _TIMES, _LEAST)]
        like += [(spans[~still & (between == pair)], _TIMES, _LEAST) for pair in np.unique(between)]
        for alike, times, least in like:
            if len(alike) < _ENOUGH:
                continue
            usual = int(np.median(ns[alike]))
            long = alike[ns[alike] > max(times * usual, least)]
            np.add.at(self.preempted, batch.vcpu[long], ns[long] - usual)
            ns[long] = usual
