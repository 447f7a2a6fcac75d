# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What each vCPU did, added up row by row: where its time went, what it faulted on again, how long its exits took.

Rows come in parts of which each is in the order of time, as rings give them; they are taken one by one across all
parts, so that nothing has to be sorted or copied. Cython in pure-Python mode.
"""

from __future__ import annotations

from typing import Any, Final

import cython
import numpy as np
from numpy.typing import NDArray

from tracer.flight.vcpu_time import ENTRY, EXIT, GUEST, IDLE, OUT, SCHED, UNINTERRUPTIBLE, USER
from traces.record import RECORD
from traces.recording.identity import CREATED, GET_PAGE
from traces.schema import BY_NAME

COMPILED: bool = cython.compiled
EXIT_EDGES: Final = 10 ** np.arange(3, 11)  # ns: 1 us to 10 s
REMEMBERED: Final = 5  # seconds within which a second fault on a gfn is a refault

_ENTRY = cython.declare(cython.int, ENTRY)
_EXIT = cython.declare(cython.int, EXIT)
_USER = cython.declare(cython.int, USER)
_SCHED = cython.declare(cython.int, SCHED)
_FAULT = cython.declare(cython.int, BY_NAME["kvm_page_fault"].code)
_PAGE = cython.declare(cython.int, GET_PAGE)
_ZAP = cython.declare(cython.int, BY_NAME["kvm_mmu_prepare_zap_page"].code)
_SMM = cython.declare(cython.int, BY_NAME["kvm_smm_transition"].code)
_CREATED = cython.declare(cython.int, CREATED)
_OUT = cython.declare(cython.longlong, OUT)
_IN = cython.declare(cython.longlong, GUEST)
_IDLE = cython.declare(cython.longlong, IDLE)
_HELD_UP = cython.declare(cython.ulonglong, UNINTERRUPTIBLE)
_EDGES = cython.declare(cython.int, len(EXIT_EDGES))
_MEMORY = cython.declare(cython.longlong, REMEMBERED)
_MIX = cython.declare(cython.ulonglong, 0x9E3779B97F4A7C15)
_GFN_BITS = cython.declare(cython.int, 44)
_GFNS = cython.declare(cython.ulonglong, (1 << 44) - 1)
_ENDLESS = cython.declare(cython.longlong, (1 << 63) - 1)

Row = cython.struct(  # RECORD
    time=cython.ulonglong,
    kvm=cython.ulonglong,
    root=cython.ulonglong,
    w0=cython.ulonglong,
    w1=cython.ulonglong,
    w2=cython.ulonglong,
    w3=cython.ulonglong,
    tid=cython.uint,
    tgid=cython.uint,
    role=cython.uint,
    n=cython.int,
    cpu=cython.ushort,
    vcpu=cython.short,
    kind=cython.uchar,
    level=cython.uchar,
    flags=cython.uchar,
    as_id=cython.uchar,
)
assert list(RECORD.names or ()) == [
    "time", "kvm", "root", "w0", "w1", "w2", "w3", "tid", "tgid", "role", "n", "cpu", "vcpu", "kind", "level", "flags",
    "as_id",
], "Row is RECORD"  # fmt: skip

Metered = cython.struct(  # `vcpu` is -1 for what other threads of the host do in that VM
    kvm=cython.ulonglong,
    vcpu=cython.longlong,
    pid=cython.longlong,  # the thread of its last row, and when that row was
    tid=cython.longlong,
    shown=cython.longlong,
    last=cython.longlong,  # until when its time is accounted for, and its state since then
    state=cython.longlong,
    left=cython.longlong,  # when it left its guest; -1: it is in it, idle, or was not seen to leave
    entered=cython.longlong,
    guest=cython.longlong,  # ns
    idle=cython.longlong,
    steal=cython.longlong,
    unknown=cython.longlong,
    longest=cython.longlong,
    faults=cython.longlong,
    refaults=cython.longlong,
    roots=cython.longlong,
    smis=cython.longlong,
    zaps=cython.longlong,
    exits=cython.longlong,  # to userspace
    out=cython.longlong,  # ns of the exits that have ended
)
BY_SECOND: Final = (
    "guest", "idle", "steal", "unknown", "longest", "faults", "refaults", "roots", "smis", "zaps", "exits", "out",
)  # fmt: skip
METERED: Final = np.dtype(
    [("kvm", "u8")]
    + [(name, "i8") for name in ("vcpu", "pid", "tid", "shown", "last", "state", "left", "entered", *BY_SECOND)]
)


@cython.final
@cython.cclass
class MeterRows:
    """Meters of all vCPUs that had rows: `meters` has a row of METERED for each, `took` its exits by duration."""

    meters = cython.declare(object, visibility="public")
    took = cython.declare(object, visibility="public")
    seconds = cython.declare(cython.longlong, visibility="public")  # that have ended; the clock of remembered faults
    _idle: Any
    _meter: cython.pointer[Metered]
    _took: cython.longlong[:, ::1]
    _edges: cython.longlong[::1]
    _halts: cython.ulonglong[::1]
    _count: cython.Py_ssize_t
    _places: cython.int[::1]  # of vCPUs in `meters`, by hash; -1: none
    _recent: cython.Py_ssize_t  # the vCPU of the last row
    _keys: cython.ulonglong[::1]  # (vCPU's place + 1, gfn) of faults, by hash; 0: none
    _when: cython.longlong[::1]  # the second of each key's last fault
    _known: cython.Py_ssize_t

    def __init__(self, idle_codes: NDArray[np.uint64]) -> None:
        """`idle_codes` are the exit reasons by which a guest says that it is idle."""
        self._halts = np.ascontiguousarray(idle_codes, np.uint64)
        self._edges = np.ascontiguousarray(EXIT_EDGES, np.int64)
        self.seconds = 0
        self._count = self._recent = 0
        self._point_at(np.zeros(64, METERED), np.zeros((64, len(EXIT_EDGES) + 1), np.int64))
        self._forget_faults(1 << 10)

    def vcpus(self) -> NDArray[Any]:
        """Return the rows of METERED, one for each vCPU; they are not copied, so writing to them changes the meters."""
        return self.meters[: self._count]  # type: ignore[no-any-return]

    def exits_took(self) -> NDArray[np.int64]:
        """Return for each of `vcpus` its exits by duration: more than one of EXIT_EDGES (ns), up to the next."""
        return self.took[: self._count]  # type: ignore[no-any-return]

    def keep(self, kept: NDArray[np.bool_]) -> None:
        """End a second: set all counts to 0, and keep only the vCPUs for which `kept`, a mask of `vcpus`, is true."""
        meters, took = self.meters[: self._count], self.took[: self._count]
        for name in BY_SECOND:
            meters[name] = 0
        took[:] = 0
        self.seconds += 1
        if not kept.all():  # a vCPU's place names its faults: those of one that stays must not become another's
            gone, old = np.flatnonzero(~kept), len(meters)
            moved = np.cumsum(kept) - 1
            self._count = old - len(gone)
            meters[: self._count] = meters[kept]
            self._recent = 0
            self._move_faults(np.where(kept, moved, -1))
            self._find_places()

    def take(self, parts: list[NDArray[Any]], until: int) -> list[int]:
        """Take the rows up to `until` (boot ns) of all parts, in order of time, and return how many of each part."""
        at = np.zeros(len(parts), np.int64)
        sizes = np.array([len(part) for part in parts], np.int64)
        strides = np.array([part.strides[0] for part in parts], np.int64)
        if cython.compiled:
            self._take(np.array([part.ctypes.data for part in parts], np.uint64), [], strides, sizes, at, until)
        else:
            rows = [_structures(RECORD, np.ascontiguousarray(part).view(np.uint8)) for part in parts]
            self._take(np.empty(0), rows, strides, sizes, at, until)
        return at.tolist()

    def _take(
        self,
        addresses: cython.ulonglong[::1],
        structures: list[Any],  # the same, uncompiled
        strides: cython.longlong[::1],
        sizes: cython.longlong[::1],
        at: cython.longlong[::1],
        until: cython.longlong,
    ) -> None:
        n: cython.Py_ssize_t = sizes.shape[0]
        heads: cython.longlong[::1] = np.full(n, _ENDLESS, np.int64)  # each part's next row's time
        i: cython.Py_ssize_t
        best: cython.Py_ssize_t
        limit: cython.longlong
        for i in range(n):
            if sizes[i]:
                row = _row(addresses[i]) if cython.compiled else structures[i]
                heads[i] = row[0].time
        while n:
            best = 0
            for i in range(1, n):
                if heads[i] < heads[best]:
                    best = i
            if heads[best] > until or heads[best] == _ENDLESS:
                return
            limit = until
            for i in range(n):
                if i != best and heads[i] < limit:
                    limit = heads[i]
            while at[best] < sizes[best] and heads[best] <= limit:
                i = at[best]
                if cython.compiled:
                    row = _row(addresses[best] + i * strides[best])
                    self._one(row, 0)
                    row = _row(addresses[best] + (i + 1) * strides[best])
                else:
                    self._one(structures[best], i)
                    row = structures[best][i + 1 : i + 2]
                at[best] = i + 1
                heads[best] = row[0].time if i + 1 < sizes[best] else _ENDLESS

    @cython.cfunc
    def _one(self, rows: cython.pointer[Row], i: cython.Py_ssize_t) -> cython.void:
        if not rows[i].kvm:
            return
        kind: cython.int = rows[i].kind
        time: cython.longlong = rows[i].time
        if kind in (_ENTRY, _EXIT, _USER, _SCHED):
            if rows[i].vcpu < 0:
                if kind != _USER:
                    return
            else:
                self._follow(self._place(rows, i), rows, i, kind, time)
            if kind == _USER:
                self._meter[self._place(rows, i)].exits += 1
        elif kind == _FAULT:
            place: cython.Py_ssize_t = self._place(rows, i)
            self._meter[place].faults += 1
            self._meter[place].refaults += self._again(place, rows[i].w0 >> 12)
        elif kind == _PAGE:
            if rows[i].flags & _CREATED and rows[i].root and rows[i].root == rows[i].w1:
                self._meter[self._place(rows, i)].roots += 1
        elif kind == _ZAP:
            self._meter[self._place(rows, i)].zaps += 1
        elif kind == _SMM and rows[i].flags & 1:
            self._meter[self._place(rows, i)].smis += 1

    @cython.cfunc
    def _follow(
        self,
        place: cython.Py_ssize_t,
        rows: cython.pointer[Row],
        i: cython.Py_ssize_t,
        kind: cython.int,
        time: cython.longlong,
    ) -> cython.void:
        """Account the time up to a row that says where its vCPU is. A thread scheduled in again keeps its state."""
        passed: cython.longlong = max(time - self._meter[place].last, 0)
        state: cython.longlong = self._meter[place].state
        if state == _IN:
            self._meter[place].guest += passed
        elif state == _IDLE:
            self._meter[place].idle += passed
        elif kind == _SCHED:
            off: cython.longlong = min(max(time - cython.cast(cython.longlong, rows[i].w0), 0), passed)
            waited: cython.longlong = min(cython.cast(cython.longlong, rows[i].w1), off)
            self._meter[place].steal += waited
            if not rows[i].w2 & _HELD_UP:
                self._meter[place].idle += off - waited
        self._meter[place].last = time
        if kind == _ENTRY:
            if self._meter[place].left >= 0:
                self._ended(place, time - self._meter[place].left)
                self._meter[place].left = -1
            self._meter[place].entered = 1
            self._meter[place].state = _IN
        elif kind == _EXIT:
            idle: cython.bint = self._halted(rows[i].w0)
            self._meter[place].state = _IDLE if idle else _OUT
            self._meter[place].left = -1 if idle else time
        elif kind == _USER:
            self._meter[place].state = _OUT

    @cython.cfunc
    def _halted(self, code: cython.ulonglong) -> cython.bint:
        i: cython.Py_ssize_t = 0
        while i < self._halts.shape[0] and self._halts[i] != code:
            i += 1
        return i < self._halts.shape[0]

    @cython.cfunc
    def _ended(self, place: cython.Py_ssize_t, took: cython.longlong) -> cython.void:
        """Count an exit that took `took` ns."""
        i: cython.int = 0
        while i < _EDGES and self._edges[i] < took:
            i += 1
        self._took[place, i] += 1
        self._meter[place].out += took
        self._meter[place].longest = max(self._meter[place].longest, took)

    @cython.cfunc
    def _place(self, rows: cython.pointer[Row], i: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Return the index of the row's vCPU in `meters`, added if it is new; note the row's thread and time there."""
        place: cython.Py_ssize_t = self._recent
        kvm: cython.ulonglong = rows[i].kvm
        vcpu: cython.longlong = rows[i].vcpu
        if place >= self._count or self._meter[place].kvm != kvm or self._meter[place].vcpu != vcpu:
            mask: cython.ulonglong = self._places.shape[0] - 1
            slot: cython.ulonglong = _hash(kvm + cython.cast(cython.ulonglong, vcpu + 1)) & mask
            place = self._places[slot]
            while place >= 0 and (self._meter[place].kvm != kvm or self._meter[place].vcpu != vcpu):
                slot = (slot + 1) & mask
                place = self._places[slot]
            if place < 0:
                place = self._add(kvm, vcpu, rows[i].time)
            self._recent = place
        self._meter[place].pid = rows[i].tgid
        self._meter[place].tid = rows[i].tid
        self._meter[place].shown = rows[i].time
        return place

    @cython.cfunc
    def _add(self, kvm: cython.ulonglong, vcpu: cython.longlong, time: cython.longlong) -> cython.Py_ssize_t:
        place: cython.Py_ssize_t = self._count
        if place == len(self.meters):
            self._point_at(
                np.concatenate([self.meters, np.zeros(place, METERED)]),
                np.concatenate([self.took, np.zeros((place, len(EXIT_EDGES) + 1), np.int64)]),
            )
        self.meters[place] = 0
        self._meter[place].kvm, self._meter[place].vcpu = kvm, vcpu
        self._meter[place].last, self._meter[place].left = time, -1
        self._count += 1
        self._note_place(place)
        return place

    def _point_at(self, meters: NDArray[Any], took: NDArray[np.int64]) -> None:
        self.meters, self.took, self._took = meters, took, took
        if cython.compiled:
            self._meter = cython.cast(cython.pointer[Metered], cython.cast(cython.size_t, meters.ctypes.data))
        else:
            self._meter = _structures(METERED, meters.view(np.uint8))
        self._find_places()

    def _find_places(self) -> None:
        """Hash all vCPUs anew. The table is at most a quarter full, so that searches are short."""
        self._places = np.full(4 * len(self.meters), -1, np.int32)
        for place in range(self._count):
            self._note_place(place)

    @cython.cfunc
    def _note_place(self, place: cython.Py_ssize_t) -> cython.void:
        mask: cython.ulonglong = self._places.shape[0] - 1
        vcpu: cython.ulonglong = self._meter[place].vcpu + 1
        slot: cython.ulonglong = _hash(self._meter[place].kvm + vcpu) & mask
        while self._places[slot] >= 0:
            slot = (slot + 1) & mask
        self._places[slot] = place

    @cython.cfunc
    def _again(self, place: cython.Py_ssize_t, gfn: cython.ulonglong) -> cython.longlong:
        """Return 1 if the vCPU faulted on this gfn in the last REMEMBERED seconds, else 0, and remember this fault."""
        key: cython.ulonglong = (cython.cast(cython.ulonglong, place + 1) << _GFN_BITS) | (gfn & _GFNS)
        mask: cython.ulonglong = self._keys.shape[0] - 1
        slot: cython.ulonglong = _hash(key) & mask
        while self._keys[slot] and self._keys[slot] != key:
            slot = (slot + 1) & mask
        again: cython.longlong = 0
        if self._keys[slot]:
            again = self.seconds - self._when[slot] < _MEMORY
        else:
            self._keys[slot] = key
            self._known += 1
        self._when[slot] = self.seconds
        if 2 * self._known > self._keys.shape[0]:
            self._move_faults(np.arange(self._count))
        return again

    def _forget_faults(self, room: int) -> None:
        self._keys, self._when = np.zeros(room, np.uint64), np.zeros(room, np.int64)
        self._known = 0

    def _move_faults(self, places: NDArray[np.int64]) -> None:
        """Hash the remembered faults anew; `places` maps each vCPU's old index to its new one, -1 if it is gone."""
        keys, when = np.asarray(self._keys), np.asarray(self._when)
        fresh = (keys != 0) & (self.seconds - when < REMEMBERED)
        keys, when = keys[fresh], when[fresh]
        moved = places[(keys >> np.uint64(44)).astype(np.int64) - 1]
        keys, when, moved = keys[moved >= 0], when[moved >= 0], moved[moved >= 0]
        room = 1 << 10
        while room < 4 * len(keys):
            room *= 2
        self._forget_faults(room)
        self._insert(((moved + 1).astype(np.uint64) << np.uint64(44)) | (keys & np.uint64((1 << 44) - 1)), when)

    def _insert(self, keys: cython.ulonglong[::1], when: cython.longlong[::1]) -> None:
        mask: cython.ulonglong = self._keys.shape[0] - 1
        i: cython.Py_ssize_t
        for i in range(keys.shape[0]):
            slot: cython.ulonglong = _hash(keys[i]) & mask
            while self._keys[slot]:
                slot = (slot + 1) & mask
            self._keys[slot] = keys[i]
            self._when[slot] = when[i]
        self._known = keys.shape[0]


@cython.cfunc
@cython.inline
def _hash(key: cython.ulonglong) -> cython.ulonglong:
    mixed: cython.ulonglong = key * _MIX if cython.compiled else int(key) * _MIX % (1 << 64)
    return mixed ^ (mixed >> 32)


@cython.cfunc
@cython.inline
def _row(address: cython.ulonglong) -> cython.pointer[Row]:
    return cython.cast(cython.pointer[Row], cython.cast(cython.size_t, address))


def _structures(dtype: Any, memory: Any) -> Any:
    """Return `memory` as an array of ctypes structures, which is what the loop reads when it is not compiled."""
    return (np.ctypeslib.as_ctypes_type(dtype) * (len(memory) // dtype.itemsize)).from_buffer(memory)
