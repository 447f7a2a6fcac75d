# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Steal time where all CPUs share one, as in the lab, whose emulator runs its CPUs in turn.

The recorded spans of vCPUs then contain the run time of other tasks, which another policy would not have. Only one task
runs at a time, so the time between two rows of the VM belongs to the thread of the later row. What a zap worker took of
a vCPU's span is removed from it (`lost`), and tells what zaps cost. What other tasks took (above all the recorder) has
no rows: a span that is many times as long as others between the same two kinds of row was preempted, and is cut to
their median (`preempted`). If `sched_in` rows say how long a thread waited for a CPU, that time is not in the spans in
the first place: `lost` is then a part of it, and the worker's own spans are cut, since the worker is preempted as well.

On a kernel whose worker zaps, a task that changes memslots waits for the worker. How much longer that takes than the
zaps themselves (`awaited`) depends on which other tasks want the worker's CPU, and another policy would not have that
time.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import cython
import numpy as np

from replay.decode.spans.vcpu_states import NO_SPAN, STILL, VcpuState
from traces.schema import BY_NAME

COMPILED: bool = cython.compiled

_TIMES = 10  # a span of more than this many times the median of similar spans was preempted, if longer than _LEAST ns
_LEAST = 50_000
_ENOUGH = 10  # the fewest similar spans for which a median is taken
_TIMES_OF_WORKER = 3  # the same for the worker: its zaps differ like roots, but preemption costs a time slice or more
_NOTHING = 2  # a time in the guest of up to this many times the short ones is little more than the switch

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
    """Removes steal time from the spans of one VM if all tasks share a CPU, and always measures zaps by other tasks.

    `lost` is the time that zap workers took and `preempted` the time that other tasks took, in ns by vCPU. `taken` is
    `lost` as arrays of (vCPU, boot ns, ns) if there are `sched_in` rows. `removed` tables were removed in `removing` ns
    by tasks that are neither vCPUs nor workers. `awaited` is the ns by vCPU in userspace while an invalidation waited
    for a worker that was not zapping.
    """

    shared = cython.declare(cython.bint, visibility="public")
    known = cython.declare(cython.bint, visibility="public")
    lost = cython.declare(object, visibility="public")
    preempted = cython.declare(object, visibility="public")
    taken = cython.declare(list, visibility="public")
    awaited = cython.declare(object, visibility="public")
    removed = cython.declare(cython.longlong, visibility="public")
    removing = cython.declare(cython.longlong, visibility="public")
    _workers: cython.int[::1]  # their tids, of which there are few
    _zapping: dict  # type: ignore[type-arg]
    _time: cython.longlong  # time of the last row
    _kind: cython.int  # kind of the last row
    _worked: cython.longlong  # ns that the workers worked in all
    _waiting: cython.longlong  # number of invalidations that are waiting for the worker
    _since: cython.longlong  # when the first of them began to wait
    _zapped: cython.longlong  # ns that the worker has zapped since then
    _idled: cython.longlong  # ns in all that invalidations waited while the worker was not zapping
    _behind: cython.longlong  # number of vCPUs that have had no row since it grew
    _taken: cython.longlong[::1]  # `_worked` at each vCPU's last row
    _lost: cython.longlong[::1]
    _idle: cython.longlong[::1]  # `_idled` at each vCPU's last row
    _awaited: cython.longlong[::1]

    def __init__(self, vcpus: int, shared: bool, workers: Collection[int], known: bool = False) -> None:
        """`shared` says that all tasks run on one CPU. `workers` are the tids of kernel workers.

        `known` says that the time for which a thread waited for a CPU is known from `sched_in` rows, and not in the
        spans.
        """
        self.shared = shared
        self.known = known
        self.lost = np.zeros(vcpus, np.int64)
        self.preempted = np.zeros(vcpus, np.int64)
        self.taken = []
        self.removed = self.removing = 0
        self._workers = np.array(sorted(workers), np.int32)
        self._zapping = {}
        self._time = self._kind = -1
        self._worked = self._waiting = self._since = self._zapped = self._idled = self._behind = 0
        self._taken = np.zeros(vcpus, np.int64)
        self._lost = self.lost
        self.awaited = np.zeros(vcpus, np.int64)
        self._idle = np.zeros(vcpus, np.int64)
        self._awaited = self.awaited

    def feed(self, batch: Any, state: Any, ns: Any, mark: Any, before: Any) -> None:
        """Shorten the spans of a batch (`Timeline.feed`), in place, by the time that other tasks took."""
        cuts = self.shared and self.known
        lost = np.zeros(len(batch) if cuts else 0, np.int64)
        work = self._work(batch) if cuts and len(self._workers) else lost[:0]
        self._feed(batch.time, batch.vcpu, batch.tid, batch.kind, state, ns, lost, work)
        if len(rows := np.flatnonzero(lost)):
            self.taken.append(np.column_stack([batch.vcpu[rows], batch.time[rows], lost[rows]]))
        if self.shared and not self.known:
            self._cut(batch, state, ns, mark, before)

    def _work(self, batch: Any) -> Any:
        """Return by row the ns for which the row's thread worked since the previous row if it is a worker, else 0.

        Of the worker's spans those are cut in which other tasks had the CPU.
        """
        work = np.zeros(len(batch), np.int64)
        rows = np.flatnonzero(batch.vcpu < 0)
        rows = rows[np.isin(batch.tid[rows], self._workers)]
        if self._time < 0:
            rows = rows[rows > 0]
        first = rows == 0  # the previous row is the last one of the previous batch
        spans = batch.time[rows] - np.where(first, self._time, batch.time[rows - 1])
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
        """Return one vCPU's part of `taken`, in order: the boot times and the ns."""
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
        worked: cython.longlong
        before: cython.longlong  # time of the previous row
        works: cython.bint = self._workers.shape[0] > 0
        known: cython.bint = work.shape[0] > 0
        with cython.nogil:
            for i in range(kind.shape[0]):
                v = vcpu[i]
                k = kind[i]
                if v >= 0 and not self._behind and not self.shared and k != _WAITS and k != _WAITED:
                    continue  # most rows: nothing of theirs is counted here
                if v < 0 and k in (_BEGIN, _END, _REMOVES):
                    with cython.gil:
                        self._zap(tid[i], k, time[i])
                if works:
                    # Where other tasks do not share the CPU, a worker works from one of its rows to the next.
                    worked = work[i] if known else 0
                    if not known and v < 0 and self._is_worker(tid[i]):
                        before = time[i - 1] if i else self._time
                        if i or self._time >= 0:
                            worked = max(time[i] - before, 0)
                    self._works(k, time[i], worked)
                if state[i] == _NO_SPAN:
                    continue
                if self._idle[v] != self._idled:
                    if state[i] == _USER:
                        self._awaited[v] += min(self._idled - self._idle[v], ns[i])
                    self._idle[v] = self._idled
                    self._behind -= 1
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
    def _is_worker(self, tid: cython.int) -> cython.bint:
        i: cython.Py_ssize_t
        found: cython.bint = False
        for i in range(self._workers.shape[0]):
            found |= self._workers[i] == tid
        return found

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _works(self, k: cython.int, time: cython.longlong, work: cython.longlong) -> cython.void:
        """Take in a row, before which a worker had worked for `work` ns."""
        idled: cython.longlong
        if k == _WAITS:
            if not self._waiting:
                self._since = time
                self._zapped = 0
            self._waiting += 1
        elif k == _WAITED and self._waiting:
            self._waiting -= 1
            if not self._waiting:
                idled = time - self._since - self._zapped
                if idled > 0:
                    self._idled += idled
                    self._behind = self._idle.shape[0]
        # The zaps that an invalidation waits for happen under every policy, so they are not lost time.
        if self._waiting:
            self._zapped += work if k != _BEGIN else 0
        else:
            self._worked += work

    def _zap(self, tid: int, kind: int, time: int) -> None:
        """Measure the removal of tables by tasks that are not workers, for kernels whose workers do not zap."""
        if self._is_worker(tid):
            return
        if kind == _REMOVES:
            self.removed += 1
        elif kind == _BEGIN:
            self._zapping[tid] = time
        elif tid in self._zapping:
            self.removing += time - self._zapping.pop(tid)

    def _cut(self, batch: Any, state: Any, ns: Any, mark: Any, before: Any) -> None:
        """Cut spans that are far longer than similar ones to the median of these."""
        spans = np.flatnonzero(state != NO_SPAN)
        still = mark[spans] & STILL != 0
        between = before[spans].astype(np.int64) << 8 | batch.kind[spans]
        # If the guest did nothing in STILL spans, all time beyond the switch is preemption. Their median tells: it is
        # then close to the short times in the guest.
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
