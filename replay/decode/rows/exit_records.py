# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The record of each exit with an input. Times of other exits go to the next record's lead."""

from __future__ import annotations

from typing import Any

import cython

from replay.decode.inputs import BUILT_ROOT, WAS_STILL
from replay.decode.rows.held_inputs import HeldInputs
from replay.decode.rows.row_meanings import Meaning
from replay.decode.spans.vcpu_states import INTERRUPT, STILL, VcpuState

_EXIT = cython.declare(cython.int, int(Meaning.EXIT))
_FAULT = cython.declare(cython.int, int(Meaning.FAULT))
_GET_PAGE = cython.declare(cython.int, int(Meaning.GET_PAGE))
_ROOT_GET = cython.declare(cython.int, int(Meaning.ROOT_GET))
_MMU_LOAD = cython.declare(cython.int, int(Meaning.MMU_LOAD))
_WAS_STILL = cython.declare(cython.uchar, WAS_STILL)
_BUILT_ROOT = cython.declare(cython.uchar, BUILT_ROOT)
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


@cython.cclass
class ExitRecords(HeldInputs):
    """Adds up the spans of time that end with each row."""

    _newest_root: cython.longlong

    def __init__(self, capabilities: Any, vcpus: int, timed: bool) -> None:
        """Take the same as HeldInputs."""
        super().__init__(capabilities, vcpus, timed)
        self._newest_root = 0

    def finish(self) -> None:
        """Complete every exit after the last row."""
        v: cython.Py_ssize_t
        for v in range(self._count_vcpus):
            self._close(v)

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
