# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=True, wraparound=False, cdivision=True, initializedcheck=False
"""Raw records of tracepoints to rows: `RawDecoder` reads the fields of those that `record_walks` found.

Where each event has its fields says the source itself (`event_fields`). Cython in pure-Python mode.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from traces.imports import form_program as p
from traces.imports.event_fields import COMMON, MOST_IDS
from traces.imports.other_events import OTHER
from traces.imports.raw_records import AT, ON, PROCESS, SIZE, THREAD, WHEN, u16, u32, u64
from traces.record import RECORD

COMPILED: bool = cython.compiled

_COUNT = cython.declare(cython.int, p.COUNT)
_ROLE = cython.declare(cython.int, p.ROLE)
_LEVEL = cython.declare(cython.int, p.LEVEL)
_FLAGS = cython.declare(cython.int, p.FLAGS)
_SPACE = cython.declare(cython.int, p.SPACE)
_VCPU = cython.declare(cython.int, p.VCPU)
_VENDOR = cython.declare(cython.int, p.VENDOR)
_PLACES = cython.declare(cython.int, p.PLACES)
_COMMON = cython.declare(cython.int, COMMON)
_NO_KIND = cython.declare(cython.uchar, OTHER)
_CPUS = cython.declare(cython.int, 4096)
# Of literals above 31 bits compiled code would make Python's numbers, a hundred times slower.
_MASK64 = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFFFFFF)
_MASK32 = cython.declare(cython.ulonglong, 0xFFFFFFFF)
_SIGN32 = cython.declare(cython.ulonglong, 0x80000000)
_WRAP32 = cython.declare(cython.longlong, 0x100000000)

_AT = cython.declare(cython.int, AT)
_SIZE = cython.declare(cython.int, SIZE)
_WHEN = cython.declare(cython.int, WHEN)
_THREAD = cython.declare(cython.int, THREAD)
_PROCESS = cython.declare(cython.int, PROCESS)
_ON = cython.declare(cython.int, ON)

# The columns that `RawDecoder` fills, in the order of its arguments.
_COLUMNS = (
    "time", "w0", "w1", "w2", "w3", "tid", "tgid", "role", "n", "cpu", "vcpu", "kind", "level", "flags", "as_id",
)  # fmt: skip


@cython.final
@cython.cclass
class RawDecoder:
    """Found records to rows (dtype RECORD), in order.

    `others` counts events of no kind by number, `vendors` exits of VMX and SVM; `odd` records were not as they must be.
    """

    others = cython.declare(object, visibility="public")
    vendors = cython.declare(object, visibility="public")
    odd = cython.declare(cython.longlong, visibility="public")
    lost = cython.declare(cython.longlong, visibility="public")
    uncounted = cython.declare(cython.longlong, visibility="public")
    _texts: Any
    _events: cython.const[cython.longlong][::1]
    _kinds: cython.const[cython.longlong][:, ::1]
    _fields: cython.const[cython.longlong][:, ::1]
    _others: cython.longlong[::1]
    _vendors: cython.longlong[::1]
    _out: cython.ulonglong[::1]
    _seen_on: cython.longlong[::1]

    def __init__(self, fields: Any, texts: Any = None) -> None:
        """`texts`: where those of events go that no kind is for (`field_texts.FieldTexts`); None: they are left out."""
        self._texts = texts
        self.others = np.zeros(MOST_IDS, np.int64)
        self.vendors = np.zeros(2, np.int64)
        self._events, self._kinds, self._fields = fields.events, fields.kinds, fields.fields
        self._others, self._vendors = self.others, self.vendors
        self._out = np.zeros(_PLACES, np.uint64)
        self._seen_on = np.zeros(_CPUS, np.int64)
        if not cython.compiled:
            for name in ("_events", "_kinds", "_fields", "_others", "_vendors", "_out", "_seen_on"):
                setattr(self, name, memoryview(getattr(self, name)))
        self.odd = self.lost = self.uncounted = 0

    def rows(self, data: cython.const[cython.uchar][::1], found: cython.longlong[:, ::1], count: int) -> Any:
        """The rows of the first `count` of `found`."""
        made = np.zeros(count, RECORD)
        columns: list[Any] = [made[name] for name in _COLUMNS]
        if not cython.compiled:
            columns = [memoryview(values) for values in columns]
        rows = made[: self._fill(data, found, count, *columns)]
        if self._texts is not None:
            self._texts.fill(rows, data)
        return rows

    def _fill(
        self,
        data: cython.const[cython.uchar][::1],
        found: cython.longlong[:, ::1],
        count: cython.Py_ssize_t,
        time: cython.ulonglong[:],
        w0: cython.ulonglong[:],
        w1: cython.ulonglong[:],
        w2: cython.ulonglong[:],
        w3: cython.ulonglong[:],
        tid: cython.uint[:],
        tgid: cython.uint[:],
        role: cython.uint[:],
        n: cython.int[:],
        cpu: cython.ushort[:],
        vcpu: cython.short[:],
        kind: cython.uchar[:],
        level: cython.uchar[:],
        flags: cython.uchar[:],
        as_id: cython.uchar[:],
    ) -> int:
        r: cython.Py_ssize_t = 0
        i: cython.Py_ssize_t
        at: cython.Py_ssize_t
        which: cython.longlong
        on: cython.longlong
        for i in range(count):
            at = cython.cast(cython.Py_ssize_t, found[i, _AT])
            on = found[i, _ON] & (_CPUS - 1)
            if at < 0:
                vcpu[r] = -1
                w0[r] = cython.cast(cython.ulonglong, found[i, _SIZE])
                w2[r] = cython.cast(cython.ulonglong, self._seen_on[on])
                self.lost += found[i, _SIZE]
                if found[i, _SIZE] == 0:
                    self.uncounted += 1
            else:
                if found[i, _SIZE] < _COMMON:
                    self.odd += 1
                    continue
                which = self._events[u16(data, at)]
                if which < 0:
                    self._others[u16(data, at)] += 1
                    if self._texts is None:
                        continue
                    kind[r] = _NO_KIND
                    w0[r] = cython.cast(cython.ulonglong, at)
                    w1[r] = cython.cast(cython.ulonglong, found[i, _SIZE])
                    n[r] = self._signed(u16(data, at))
                    vcpu[r] = -1
                    tid[r] = cython.cast(cython.uint, found[i, _THREAD] & 0x7FFFFFFF)
                    tgid[r] = cython.cast(cython.uint, found[i, _PROCESS] & 0x7FFFFFFF)
                    time[r] = cython.cast(cython.ulonglong, found[i, _WHEN])
                    cpu[r] = cython.cast(cython.ushort, on)
                    r += 1
                    continue
                if found[i, _SIZE] < self._kinds[which, 3]:
                    self.odd += 1
                    continue
                self._read(data, at, which)
                kind[r] = cython.cast(cython.uchar, self._kinds[which, 0])
                w0[r] = self._out[0]
                w1[r] = self._out[1]
                w2[r] = self._out[2]
                w3[r] = self._out[3]
                n[r] = self._signed(self._out[_COUNT] & _MASK32)
                role[r] = cython.cast(cython.uint, self._out[_ROLE] & _MASK32)
                level[r] = cython.cast(cython.uchar, self._out[_LEVEL] & 0xFF)
                flags[r] = cython.cast(cython.uchar, self._out[_FLAGS] & 0xFF)
                as_id[r] = cython.cast(cython.uchar, self._out[_SPACE] & 0xFF)
                vcpu[r] = -1
                if self._out[_VCPU] < 0x7FFF:
                    vcpu[r] = cython.cast(cython.short, self._out[_VCPU])
                if self._out[_VENDOR] == 1 or self._out[_VENDOR] == 2:
                    self._vendors[cython.cast(cython.Py_ssize_t, self._out[_VENDOR] - 1)] += 1
                tid[r] = cython.cast(cython.uint, found[i, _THREAD] & 0x7FFFFFFF)
                tgid[r] = cython.cast(cython.uint, found[i, _PROCESS] & 0x7FFFFFFF)
                self._seen_on[on] = found[i, _WHEN]
            time[r] = cython.cast(cython.ulonglong, found[i, _WHEN])
            cpu[r] = cython.cast(cython.ushort, on)
            r += 1
        return r

    @cython.cfunc
    @cython.inline
    def _signed(self, value: cython.ulonglong) -> cython.int:
        return cython.cast(cython.int, value if value < _SIGN32 else cython.cast(cython.longlong, value) - _WRAP32)

    @cython.cfunc
    def _read(
        self, data: cython.const[cython.uchar][::1], at: cython.Py_ssize_t, which: cython.longlong
    ) -> cython.void:
        """The event's fields into `_out`."""
        f: cython.Py_ssize_t
        i: cython.Py_ssize_t
        to: cython.longlong
        size: cython.longlong
        shift: cython.longlong
        value: cython.ulonglong
        for f in range(_PLACES):
            self._out[f] = 0
        self._out[_VCPU] = 0xFFFF
        for f in range(
            cython.cast(cython.Py_ssize_t, self._kinds[which, 1]), cython.cast(cython.Py_ssize_t, self._kinds[which, 2])
        ):
            i = at + cython.cast(cython.Py_ssize_t, self._fields[f, 0])
            size = self._fields[f, 1]
            if size == 8:
                value = u64(data, i)
            elif size == 4:
                value = u32(data, i)
            elif size == 2:
                value = u16(data, i)
            else:
                value = data[i]
            if self._fields[f, 2] and size < 8 and value >> (8 * size - 1):
                value = (value - (cython.cast(cython.ulonglong, 1) << (8 * size))) & _MASK64
            to = self._fields[f, 3]
            shift = self._fields[f, 4]
            value = value & (cython.cast(cython.ulonglong, self._fields[f, 5]) & _MASK64)
            value = (value << shift) & _MASK64 if shift >= 0 else value >> -shift
            if to == _VCPU:
                self._out[_VCPU] = value
            else:
                self._out[to] |= value
