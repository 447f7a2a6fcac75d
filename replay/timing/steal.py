# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Steal time where all CPUs share one, as in the lab, whose emulator runs its CPUs in turn.

Recorded spans of vCPUs contain the run time of other tasks, which another policy would not have. There one thing goes
on at a time, so that the time between two rows of the VM is that of the later row's thread: what a zap worker took of
a vCPU's span is taken out of it (`lost`), and is the measure of what zaps cost there. What other tasks took (the
recorder above all) has no rows: a span many times as long as others between the same two kinds of row was preempted,
and is cut to their median (`preempted`). Where `sched_in` rows tell what a thread waited, that is out of the spans
already: `lost` is then part of it.
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
_NOTHING = 2  # a time in the guest of up to so many times the short ones is the switch, and little else

_NO_SPAN = cython.declare(cython.int, NO_SPAN)
_WAITS = cython.declare(cython.int, BY_NAME["zap_invalidated_begin"].code)
_WAITED = cython.declare(cython.int, BY_NAME["zap_invalidated_end"].code)
_BEGIN = cython.declare(cython.int, BY_NAME["zap_root_begin"].code)
_END = cython.declare(cython.int, BY_NAME["zap_root_end"].code)
_REMOVES = cython.declare(cython.int, BY_NAME["kvm_mmu_prepare_zap_page"].code)


@cython.final
@cython.cclass
class Steal:
    """Takes steal time out of the spans of one VM, where `shared`; and measures zaps by other tasks everywhere.

    `lost` is what zap workers took, `preempted` what others did, ns by vCPU. `removed` tables took tasks that are
    neither vCPUs nor workers `removing` ns.
    """

    shared = cython.declare(cython.bint, visibility="public")
    known = cython.declare(cython.bint, visibility="public")
    lost = cython.declare(object, visibility="public")
    preempted = cython.declare(object, visibility="public")
    removed = cython.declare(cython.longlong, visibility="public")
    removing = cython.declare(cython.longlong, visibility="public")
    _workers: set  # type: ignore[type-arg]
    _zapping: dict  # type: ignore[type-arg]
    _time: cython.longlong  # of the last row
    _worked: cython.longlong  # ns of the workers, in all
    _waiting: cython.longlong  # invalidations that wait for the worker
    _taken: cython.longlong[::1]  # `_worked` at each vCPU's last row
    _lost: cython.longlong[::1]

    def __init__(self, vcpus: int, shared: bool, workers: Collection[int], known: bool = False) -> None:
        """`shared`: all run on one CPU. `workers` are the tids of kernel workers. `known`: spans are without what their
        threads waited for a CPU.
        """
        self.shared = shared
        self.known = known
        self.lost = np.zeros(vcpus, np.int64)
        self.preempted = np.zeros(vcpus, np.int64)
        self.removed = self.removing = 0
        self._workers = set(workers)
        self._zapping = {}
        self._time = -1
        self._worked = self._waiting = 0
        self._taken = np.zeros(vcpus, np.int64)
        self._lost = self.lost

    def feed(self, batch: Any, state: Any, ns: Any, mark: Any, before: Any) -> None:
        """Shorten the spans of a batch (`Timeline.feed`) by what was not theirs."""
        self._feed(batch.time, batch.vcpu, batch.tid, batch.kind, state, ns)
        if self.shared and not self.known:
            self._cut(batch, state, ns, mark, before)

    def _feed(
        self,
        time: cython.const[cython.longlong][::1],
        vcpu: cython.const[cython.int][::1],
        tid: cython.const[cython.int][::1],
        kind: cython.const[cython.uchar][::1],
        state: cython.const[cython.uchar][::1],
        ns: cython.longlong[::1],
    ) -> None:
        i: cython.Py_ssize_t
        v: cython.Py_ssize_t
        k: cython.int
        taken: cython.longlong
        with cython.nogil:
            for i in range(kind.shape[0]):
                v = vcpu[i]
                k = kind[i]
                if v < 0 and k in (_BEGIN, _END, _REMOVES):
                    with cython.gil:
                        self._zap(tid[i], k, time[i])
                if not self.shared:
                    continue
                if k == _WAITS:
                    self._waiting += 1
                elif k == _WAITED and self._waiting:
                    self._waiting -= 1
                # What an invalidation waits for is done under every policy.
                if v < 0 and not self._waiting and self._time >= 0 and self._is_worker(tid[i]):
                    self._worked += time[i] - self._time
                self._time = time[i]
                if state[i] != _NO_SPAN:
                    taken = self._worked - self._taken[v]
                    self._taken[v] = self._worked
                    if not self.known:
                        taken = min(taken, ns[i])
                        ns[i] -= taken
                    self._lost[v] += taken

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _is_worker(self, tid: cython.int) -> cython.bint:
        found: cython.bint
        with cython.gil:
            found = tid in self._workers
        return found

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
