# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Rows of what was read, and what else is known: threads, events of no kind, losses, counts by form."""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from traces.imports import form_program as p
from traces.imports.event_text import EventText
from traces.imports.other_events import OTHER

_COUNT = cython.declare(cython.int, p.COUNT)
_ROLE = cython.declare(cython.int, p.ROLE)
_LEVEL = cython.declare(cython.int, p.LEVEL)
_FLAGS = cython.declare(cython.int, p.FLAGS)
_SPACE = cython.declare(cython.int, p.SPACE)
_VCPU = cython.declare(cython.int, p.VCPU)
_VENDOR = cython.declare(cython.int, p.VENDOR)
_ENTRY = cython.declare(cython.longlong, p.RUNS_GUEST[0])  # only a vCPU's thread has these
_LEFT = cython.declare(cython.longlong, p.RUNS_GUEST[1])
_RETURN = cython.declare(cython.longlong, p.RUNS_GUEST[2])
_NO_VCPU = cython.declare(cython.ulonglong, 0xFFFF)
_NO_KIND = cython.declare(cython.longlong, OTHER)
_MASK32 = cython.declare(cython.ulonglong, 0xFFFFFFFF)
_LOSS = cython.declare(cython.int, p.LOSS)
_THREAD_SLOTS = cython.declare(cython.int, 1 << 17)
_MOST_THREADS = cython.declare(cython.int, 1 << 16)
_NAME_SLOTS = cython.declare(cython.int, 1 << 12)
_CPUS = cython.declare(cython.int, 4096)
_MOST_LOST = cython.declare(cython.longlong, 1 << 50)  # a number that goes on is none
_FIELDS = (
    ("time", "u8"), ("w0", "u8"), ("w1", "u8"), ("w2", "u8"), ("w3", "u8"), ("tid", "u4"), ("tgid", "u4"),
    ("role", "u4"), ("n", "u4"), ("cpu", "u2"), ("vcpu", "u2"), ("kind", "u1"), ("level", "u1"), ("flags", "u1"),
    ("as_id", "u1"),
)  # fmt: skip
# What plain Python must see as C does: numbers that are no numpy's.
_VIEWS = (
    "_time", "_w0", "_w1", "_w2", "_w3", "_tid", "_tgid", "_role", "_n", "_cpu", "_vcpu", "_kind", "_level", "_flags",
    "_as_id", "_form_count", "_vendor_count", "_thread_slot", "_thread_tid", "_fact", "_other_hash", "_other",
    "_seen_on",
)  # fmt: skip


@cython.cclass
class LineRows(EventText):
    """`rows` of them are in `columns`.

    `threads`: (tid, comm) of each, in order of appearance, `thread_facts` what is known of them (tgid + 1, vCPU + 1,
    whether it ran a guest, whether an event of KVM is its). `others`: events that a trace has no kind for, by name;
    `texts` are those of their rows. `forms` and `raw` count the rows by form, and those given as fields.
    """

    columns: Any
    rows: int
    threads: list[Any]
    thread_facts: Any
    texts: list[Any]
    other_names: list[Any]
    other_counts: Any
    forms: Any
    raw: int
    bare: int
    backwards: int
    ticks: int
    relative: int
    lost: int
    uncounted: int
    by_vendor: Any
    _time: cython.ulonglong[::1]
    _w0: cython.ulonglong[::1]
    _w1: cython.ulonglong[::1]
    _w2: cython.ulonglong[::1]
    _w3: cython.ulonglong[::1]
    _tid: cython.uint[::1]
    _tgid: cython.uint[::1]
    _role: cython.uint[::1]
    _n: cython.uint[::1]
    _cpu: cython.ushort[::1]
    _vcpu: cython.ushort[::1]
    _kind: cython.uchar[::1]
    _level: cython.uchar[::1]
    _flags: cython.uchar[::1]
    _as_id: cython.uchar[::1]
    _form_count: cython.longlong[::1]
    _vendor_count: cython.longlong[::1]
    _thread_slot: cython.longlong[::1]
    _thread_tid: cython.longlong[::1]
    _fact: cython.longlong[:, ::1]
    _other_hash: cython.longlong[::1]
    _other: cython.longlong[::1]
    _seen_on: cython.ulonglong[::1]
    _now: cython.ulonglong
    _last_emitted: cython.longlong
    _known_threads: cython.Py_ssize_t

    def __init__(self, room: int) -> None:
        super().__init__()
        self.columns = {name: np.zeros(room, dtype) for name, dtype in _FIELDS}
        self._time, self._w0, self._w1 = self.columns["time"], self.columns["w0"], self.columns["w1"]
        self._w2, self._w3 = self.columns["w2"], self.columns["w3"]
        self._tid, self._tgid, self._role = self.columns["tid"], self.columns["tgid"], self.columns["role"]
        self._n, self._cpu, self._vcpu = self.columns["n"], self.columns["cpu"], self.columns["vcpu"]
        self._kind, self._level = self.columns["kind"], self.columns["level"]
        self._flags, self._as_id = self.columns["flags"], self.columns["as_id"]
        self.forms = np.zeros(len(self._form), np.int64)
        self._form_count = self.forms
        self.by_vendor = np.zeros(2, np.int64)
        self._vendor_count = self.by_vendor
        self.threads = []
        self._thread_slot = np.zeros(_THREAD_SLOTS, np.int64)
        self._thread_tid = np.zeros(_MOST_THREADS, np.int64)
        self.thread_facts = np.zeros((_MOST_THREADS, 4), np.int64)
        self._fact = self.thread_facts
        self.texts = []
        self.other_names = []
        self.other_counts = np.zeros(_NAME_SLOTS, np.int64)
        self._other = self.other_counts
        self._other_hash = np.zeros(_NAME_SLOTS, np.int64)
        self._seen_on = np.zeros(_CPUS, np.uint64)
        self._now = 0
        self._known_threads = 0
        if not cython.compiled:
            for name in _VIEWS:
                setattr(self, name, memoryview(getattr(self, name)))
        self.rows = self.raw = self.bare = self.backwards = self.ticks = self.relative = self.lost = self.uncounted = 0

    def others(self) -> dict[str, int]:
        """Events that no kind is for, by name, with how many there were."""
        return {name.decode(errors="replace"): int(self.other_counts[at]) for at, name in self.other_names}

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(-1, check=False)
    def _emit(self) -> cython.int:
        """Write the row of the line just read."""
        r: cython.Py_ssize_t = self.rows
        kind: cython.longlong = self._l_kind
        vcpu: cython.ulonglong = self._out[_VCPU]
        thread: cython.longlong
        if self._l_how == 0:
            if self._l_time < self._now:
                self.backwards += 1
            self._now = self._l_time
        elif self._l_how == 1:
            self.bare += 1
        elif self._l_how == 2:
            self.ticks += 1
            self._now = self._l_time
        else:
            self.relative += 1
            self._now = self._l_time
        self._time[r] = self._now
        self._w0[r] = self._out[0]
        self._w1[r] = self._out[1]
        self._w2[r] = self._out[2]
        self._w3[r] = self._out[3]
        self._n[r] = cython.cast(cython.uint, self._out[_COUNT] & _MASK32)
        self._role[r] = cython.cast(cython.uint, self._out[_ROLE] & _MASK32)
        self._level[r] = cython.cast(cython.uchar, self._out[_LEVEL] & 0xFF)
        self._flags[r] = cython.cast(cython.uchar, self._out[_FLAGS] & 0xFF)
        self._as_id[r] = cython.cast(cython.uchar, self._out[_SPACE] & 0xFF)
        self._kind[r] = cython.cast(cython.uchar, kind)
        self._tid[r] = cython.cast(cython.uint, self._l_tid & _MASK32)
        self._tgid[r] = cython.cast(cython.uint, self._l_tgid & _MASK32)
        self._cpu[r] = cython.cast(cython.ushort, self._l_cpu & 0xFFFF)
        self._vcpu[r] = cython.cast(cython.ushort, vcpu & 0xFFFF)
        if self._out[_VENDOR] > 0:
            self._vendor_count[1 if self._out[_VENDOR] > 1 else 0] += 1
        if kind == _NO_KIND:
            pass
        elif self._l_form >= 0:
            self._last_emitted = self._l_form
            self._form_count[self._l_form] += 1
        else:
            self._last_emitted = 0
            self._form_count[0] += 1
            self.raw += 1
        if kind == 0:  # what perf says it lost
            self._w1[r] = 0
            self._w2[r] = self._seen_on[self._l_cpu & (_CPUS - 1)]
            self._vcpu[r] = cython.cast(cython.ushort, _NO_VCPU)
            self.lost += cython.cast(cython.longlong, self._out[0] & _MASK32)
        self._seen_on[self._l_cpu & (_CPUS - 1)] = self._now
        if self._l_tid > 0:
            thread = self._thread()
            if thread >= 0:
                if self._l_tgid > 0:
                    self._fact[thread, 0] = self._l_tgid + 1
                if kind != _NO_KIND:
                    self._fact[thread, 3] = 1
                if vcpu != _NO_VCPU and kind != 0:
                    self._fact[thread, 1] = cython.cast(cython.longlong, vcpu) + 1
                    self._fact[thread, 2] = 1
                elif kind in (_ENTRY, _LEFT, _RETURN):
                    self._fact[thread, 2] = 1
        self.rows = r + 1
        return 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(-2, check=False)
    def _thread(self) -> cython.longlong:
        """The number of the line's thread; -1: there are too many."""
        at: cython.Py_ssize_t = (self._l_tid * 40503) & (_THREAD_SLOTS - 1)
        while self._thread_slot[at] != 0:
            if self._thread_tid[self._thread_slot[at] - 1] == self._l_tid:
                return self._thread_slot[at] - 1
            at = (at + 1) & (_THREAD_SLOTS - 1)
        if self._known_threads >= _MOST_THREADS:
            return -1
        with cython.gil:
            self.threads.append((int(self._l_tid), bytes(self._text[self._l_comm : self._l_comm_end])))
        self._thread_tid[self._known_threads] = self._l_tid
        self._known_threads += 1
        self._thread_slot[at] = self._known_threads
        return self._known_threads - 1

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(-1, check=False)
    def _count_other(self) -> cython.int:
        """Count an event by its name; a name beyond the table's room with the last."""
        h: cython.longlong = cython.cast(cython.longlong, self._hash(self._l_name, self._l_name_end)) + 1
        at: cython.Py_ssize_t = h & (_NAME_SLOTS - 1)
        tries: cython.int = 0
        while self._other_hash[at] != 0 and self._other_hash[at] != h and tries < 64:
            at = (at + 1) & (_NAME_SLOTS - 1)
            tries += 1
        if self._other_hash[at] == 0:
            self._other_hash[at] = h
            with cython.gil:
                name = bytes(self._text[self._l_name : min(self._l_name_end, self._l_name + 100)])
                self.other_names.append((at, name))
        self._other[at] += 1
        self._l_kind = _NO_KIND
        self._clear()
        self._out[_VCPU] = _NO_VCPU
        self._emit()
        with cython.gil:
            self.texts.append(bytes(self._text[self._l_name : self._l_end]))
        return 0

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _loss(self, begin: cython.Py_ssize_t, end: cython.Py_ssize_t) -> cython.int:
        """A gap row, as far as the line says how much was lost."""
        i: cython.Py_ssize_t = begin + 4
        cpu: cython.longlong = 0
        count: cython.longlong = 0
        r: cython.Py_ssize_t = self.rows
        while i < end and 48 <= self._text[i] <= 57 and cpu < 100000:
            cpu = cpu * 10 + (self._text[i] - 48)
            i += 1
        while i < end and not 48 <= self._text[i] <= 57:
            i += 1
        while i < end and 48 <= self._text[i] <= 57 and count < _MOST_LOST:
            count = count * 10 + (self._text[i] - 48)
            i += 1
        self._time[r] = self._now
        self._w0[r] = cython.cast(cython.ulonglong, count)
        self._w2[r] = self._seen_on[cpu & (_CPUS - 1)]
        self._w1[r] = self._w3[r] = 0
        self._tid[r] = self._tgid[r] = self._role[r] = self._n[r] = 0
        self._kind[r] = self._level[r] = self._flags[r] = self._as_id[r] = 0
        self._cpu[r] = cython.cast(cython.ushort, cpu & (_CPUS - 1))
        self._vcpu[r] = cython.cast(cython.ushort, _NO_VCPU)
        self.lost += count
        if count == 0:
            self.uncounted += 1
        self.rows = r + 1
        return _LOSS
