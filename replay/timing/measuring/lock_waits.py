# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Measure how long faults hold mmu_lock, and remove from the recorded times what vCPUs waited for it.

A fault holds mmu_lock from about its kvm_mmu_spte_requested to the last SPTE that it sets. Where faults exclude each
other (5.10, whose lock is a spinlock, and the shadow MMU), another vCPU that is between its kvm_page_fault and its
kvm_mmu_spte_requested meanwhile waits. The virtual clock computes waits by itself, so recorded ones must not count
twice:

    vCPU 0   requested ------ set_spte            holds mmu_lock
    vCPU 1        page_fault ..waits.. requested  waits from its fault on until vCPU 0 is done
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from replay.decode.spans.vcpu_states import VcpuState
from traces.schema import BY_NAME

COMPILED: bool = cython.compiled

_KEPT = cython.declare(cython.int, 256)  # how many of the latest periods under the lock are kept
_IS_FAULT = cython.declare(cython.int, int(VcpuState.FAULT))
_IS_PREFETCH = cython.declare(cython.int, int(VcpuState.PREFETCH))
_FAULT = cython.declare(cython.int, BY_NAME["kvm_page_fault"].code)
_REQUESTED = cython.declare(cython.int, BY_NAME["kvm_mmu_spte_requested"].code)
_SET = cython.declare(cython.int, BY_NAME["kvm_mmu_set_spte"].code)
_GET_PAGE = cython.declare(cython.int, BY_NAME["kvm_mmu_get_page"].code)


@cython.final
@cython.cclass
class LockWaits:
    """Removes waits for mmu_lock from the times of faults.

    `waited` is the time removed, in ns by vCPU. `held` is the ns for which all vCPUs together held the lock, and
    `faults` is how many faults did.
    """

    waited = cython.declare(object, visibility="public")
    held = cython.declare(cython.longlong, visibility="public")
    faults = cython.declare(cython.longlong, visibility="public")
    _waited: cython.longlong[::1]
    _begin: cython.longlong[::1]
    _end: cython.longlong[::1]
    _vcpu: cython.longlong[::1]
    _newest: cython.longlong
    _exclusive: cython.bint

    def __init__(self, vcpus: int, exclusive: bool) -> None:
        """`exclusive` says that faults of the recorded kernel hold mmu_lock for write, or as a spinlock."""
        self.waited = np.zeros(vcpus, np.int64)
        self.held = self.faults = 0
        self._waited = self.waited
        self._begin, self._end, self._vcpu = (np.full(_KEPT, -1, np.int64) for _ in range(3))
        self._newest = 0
        self._exclusive = exclusive and vcpus > 1

    def feed(self, batch: Any, state: Any, ns: Any, before: Any) -> None:
        """Shorten the spans of a batch (`Timeline.feed`), in place, by the waits in them."""
        self._feed(batch.time, batch.vcpu, batch.kind, state, ns, before)

    def _feed(
        self,
        time: cython.const[cython.longlong][::1],
        vcpu: cython.const[cython.int][::1],
        kind: cython.const[cython.uchar][::1],
        state: cython.const[cython.uchar][::1],
        ns: cython.longlong[::1],
        before: cython.const[cython.uchar][::1],
    ) -> None:
        i: cython.Py_ssize_t
        waited: cython.longlong
        with cython.nogil:
            for i in range(kind.shape[0]):
                if state[i] != _IS_FAULT and state[i] != _IS_PREFETCH:
                    continue
                if kind[i] == _SET or kind[i] == _GET_PAGE:
                    self.held += ns[i]
                    if self._exclusive and ns[i]:
                        self._newest = (self._newest + 1) % _KEPT
                        self._begin[self._newest] = time[i] - ns[i]
                        self._end[self._newest] = time[i]
                        self._vcpu[self._newest] = vcpu[i]
                elif kind[i] == _REQUESTED:
                    self.faults += 1
                    if self._exclusive and before[i] == _FAULT:
                        waited = self._wait_of(vcpu[i], time[i] - ns[i], time[i])
                        self._waited[vcpu[i]] += waited
                        ns[i] -= waited

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _wait_of(self, v: cython.longlong, begin: cython.longlong, end: cython.longlong) -> cython.longlong:
        """Return the ns of [begin, end) in which another vCPU held the lock; no ns counts twice."""
        waited: cython.longlong = 0
        at: cython.longlong = self._newest
        first: cython.longlong
        last: cython.longlong
        for _ in range(_KEPT):
            if self._end[at] <= begin:
                break
            if self._vcpu[at] != v:
                first = max(self._begin[at], begin)
                last = min(self._end[at], end)
                if last > first:
                    waited += last - first
                    end = first
            at = (at + _KEPT - 1) % _KEPT
        return waited
