# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The inputs that a decoder holds, and the state of the vCPUs that they belong to.

The memory is `vm_inputs`': the last inputs are held until no later row can change them, then it takes them out.

Each class of this package extends the one before it: HeldInputs, ExitRecords, RootLoads, UnloadTriggers, VmEvents,
PageInstalls, Decoder.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from replay.decode.inputs import HAS_ROLE, HAS_TRIGGER, NO_STATE, STATE_SHIFT, TRIGGER
from replay.decode.rows.vcpu_rows import NEVER, VCPU
from replay.simulate.pools import as_bytes, as_structures, make_pool
from traces.kernels import roles
from traces.kernels.triggers import Trigger

_TRIGGER = cython.declare(cython.uint, TRIGGER)
_LEVEL_SHIFT = cython.declare(cython.int, 4)
_VCPU_SHIFT = cython.declare(cython.int, 16)
_STATE_SHIFT = cython.declare(cython.int, STATE_SHIFT)
_NO_STATE = cython.declare(cython.longlong, NO_STATE)
_HAS_ROLE = cython.declare(cython.longlong, HAS_ROLE)
_HAS_TRIGGER = cython.declare(cython.longlong, HAS_TRIGGER)


@cython.cclass
class HeldInputs:
    """Adds inputs of the row under way, and a record for each exit that has one (`decode.inputs`)."""

    vcpus: Any  # rows of Vcpu
    counts: Any
    # Numbers of inputs, of records of exits and of ranges that are held
    inputs: cython.longlong
    records: cython.longlong
    ranges: cython.longlong

    _room: cython.longlong
    _op: cython.uint[::1]
    _gfn: cython.longlong[::1]
    _time: cython.longlong[::1]
    _seq: cython.longlong[::1]
    _exit: cython.int[::1]
    _start: cython.longlong[::1]
    _end: cython.longlong[::1]
    _lead: cython.longlong[::1]
    _guest: cython.longlong[::1]
    _idle: cython.longlong[::1]
    _fault: cython.longlong[::1]
    _load: cython.longlong[::1]
    _unload: cython.longlong[::1]
    _tables: cython.uchar[::1]
    _has: cython.uint[::1]
    _flags: cython.uchar[::1]

    _vcpu: cython.pointer[Vcpu]
    _count_vcpus: cython.Py_ssize_t
    _count: cython.longlong[::1]
    _unloads: cython.uchar[::1]
    _now: cython.longlong  # time of the row under way
    _at: cython.longlong  # seq of the row under way
    _timed: cython.bint

    def __init__(self, capabilities: Any, vcpus: int, timed: bool) -> None:
        """`timed` says that spans of time come with the rows."""
        vcpus = max(vcpus, 1)
        self.vcpus = make_pool(vcpus, VCPU)
        for name in NEVER:
            self.vcpus[name] = -1
        self.vcpus["state"] = roles.USUAL
        self.vcpus["root"] = 0
        if cython.compiled:
            view: cython.uchar[::1] = as_bytes(self.vcpus)
            self._vcpu = cython.cast(cython.pointer[Vcpu], cython.address(view[0]))
        else:
            self._vcpu = as_structures(self.vcpus)
        self._count_vcpus = vcpus
        self.counts = np.zeros(len(Trigger), np.int64)
        self._count = self.counts
        self._unloads = np.array([trigger in capabilities.kernel.unloads for trigger in Trigger], np.uint8)
        self._timed = timed
        self.inputs = self.records = self.ranges = 0

    def attach(self, held: Any) -> None:
        """Write inputs, records and ranges into these arrays
        (`vm_inputs._Held`), which contain what there is so far.
        """
        self._op, self._gfn, self._time, self._seq, self._exit = held.op, held.gfn, held.time, held.seq, held.exit
        self._lead, self._guest, self._idle, self._fault = held.lead, held.guest, held.idle, held.fault
        self._load, self._unload, self._tables = held.load, held.unload, held.tables
        self._has, self._flags = held.has, held.flags
        self._start, self._end = held.start, held.end
        self._room = len(held.op)

    def drop(self, inputs: int, records: int, ranges: int) -> None:
        """Forget the first inputs, records and ranges: the others were moved to the front."""
        v: cython.Py_ssize_t
        vcpu: cython.pointer[Vcpu] = self._vcpu
        self.inputs -= inputs
        self.records -= records
        self.ranges -= ranges
        for v in range(self._count_vcpus):
            vcpu[v].first -= inputs
            vcpu[v].touch_input = max(vcpu[v].touch_input - inputs, -1)
            vcpu[v].cr0_input = max(vcpu[v].cr0_input - inputs, -1)
            if vcpu[v].record >= 0:
                vcpu[v].record -= records

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _put(self, op: cython.uint, gfn: cython.longlong) -> cython.void:
        """Add an input of this row that belongs to no vCPU."""
        n: cython.Py_ssize_t = self.inputs
        self._op[n] = op
        self._gfn[n] = gfn
        self._time[n] = self._now
        self._seq[n] = self._at
        self._exit[n] = -1
        self.inputs = n + 1

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _put_of(self, v: cython.Py_ssize_t, op: cython.uint, gfn: cython.longlong, has: cython.longlong) -> cython.void:
        """Add an input of this row that belongs to a vCPU and to its exit."""
        n: cython.Py_ssize_t = self.inputs
        self._put(op | cython.cast(cython.uint, v << _VCPU_SHIFT), gfn)
        if self._timed:
            if self._vcpu[v].record < 0:
                self._vcpu[v].record = self.records
                self._vcpu[v].first = n
                self._vcpu[v].has = 0
                self.records += 1
            self._vcpu[v].has |= has
            self._exit[n] = cython.cast(cython.int, self._vcpu[v].record)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _put_range(
        self, op: cython.uint, space: cython.longlong, start: cython.longlong, end: cython.longlong
    ) -> cython.void:
        """Add an operation on [start, end) of one address space."""
        self._start[self.ranges] = start
        self._end[self.ranges] = end
        self._put(op | cython.cast(cython.uint, (space & 7) << _LEVEL_SHIFT), self.ranges)
        self.ranges += 1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _pull(self, v: cython.Py_ssize_t, trigger: cython.longlong, state: cython.longlong) -> cython.void:
        """Add a trigger, with the state that it puts the vCPU in."""
        has: cython.longlong = _HAS_TRIGGER << trigger
        if state != _NO_STATE:
            has |= _HAS_ROLE
        self._count[trigger] += 1
        if self._unloads[trigger]:
            self._vcpu[v].unloaded = self._at
        self._put_of(v, _TRIGGER, trigger | state << _STATE_SHIFT, has)
