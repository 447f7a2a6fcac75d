# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=True, wraparound=False, cdivision=True, initializedcheck=False
"""Raw records of tracepoints to rows: the loops over bytes that read what perf and trace-cmd keep.

Two walks find the records, `walk_perf` in perf's stream and `walk_pages` in the pages of ftrace's ring buffer;
`RawDecoder` reads their fields. What is read comes from files of others: each number that says where the next one
begins is checked against the end of the data, and all accesses are checked besides. Cython in pure-Python mode.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from traces.imports import form_program as p
from traces.imports.event_fields import COMMON, MOST_IDS
from traces.imports.other_events import OTHER
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
_MASK48 = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFF)
_MASK32 = cython.declare(cython.ulonglong, 0xFFFFFFFF)
_SIGN32 = cython.declare(cython.ulonglong, 0x80000000)
_WRAP32 = cython.declare(cython.longlong, 0x100000000)

# Of perf's stream
_SAMPLE = cython.declare(cython.int, 9)
# Columns of a table of layouts: where a sample has what, -1: nowhere.
ID, TID, TIME, CPU, REST, READ, GROUP, CHAIN, RAW = range(9)
_ID = cython.declare(cython.int, ID)
_TID = cython.declare(cython.int, TID)
_TIME = cython.declare(cython.int, TIME)
_CPU = cython.declare(cython.int, CPU)
_REST = cython.declare(cython.int, REST)
_READ = cython.declare(cython.int, READ)
_GROUP = cython.declare(cython.int, GROUP)
_CHAIN = cython.declare(cython.int, CHAIN)
_RAW = cython.declare(cython.int, RAW)

# Of a page of the ring buffer
_PAGE_HEAD = cython.declare(cython.int, 16)
_COMMIT = cython.declare(cython.ulonglong, (1 << 27) - 1)
_MISSED = cython.declare(cython.ulonglong, 1 << 31)
_MISSED_STORED = cython.declare(cython.ulonglong, 1 << 30)
_TOP_BITS = cython.declare(cython.ulonglong, 0xF8 << 56)

# The columns that `RawDecoder` fills, in the order of its arguments.
_COLUMNS = (
    "time", "w0", "w1", "w2", "w3", "tid", "tgid", "role", "n", "cpu", "vcpu", "kind", "level", "flags", "as_id",
)  # fmt: skip

# Columns of the table of found records; a gap has its number of lost events in place of a size, and -1 as its place.
AT, SIZE, WHEN, THREAD, PROCESS, ON = range(6)
_AT = cython.declare(cython.int, AT)
_SIZE = cython.declare(cython.int, SIZE)
_WHEN = cython.declare(cython.int, WHEN)
_THREAD = cython.declare(cython.int, THREAD)
_PROCESS = cython.declare(cython.int, PROCESS)
_ON = cython.declare(cython.int, ON)


@cython.cfunc
@cython.inline
def _u16(data: cython.const[cython.uchar][::1], at: cython.Py_ssize_t) -> cython.uint:
    return data[at] | cython.cast(cython.uint, data[at + 1]) << 8


@cython.cfunc
@cython.inline
def _u32(data: cython.const[cython.uchar][::1], at: cython.Py_ssize_t) -> cython.ulonglong:
    return _u16(data, at) | cython.cast(cython.ulonglong, _u16(data, at + 2)) << 16


@cython.cfunc
@cython.inline
def _u64(data: cython.const[cython.uchar][::1], at: cython.Py_ssize_t) -> cython.ulonglong:
    return _u32(data, at) | _u32(data, at + 4) << 32


@cython.cfunc
def _layout_of(ids: cython.const[cython.ulonglong][::1], number: cython.ulonglong) -> cython.Py_ssize_t:
    """Where a number stands among sorted ones; -1: nowhere."""
    low: cython.Py_ssize_t = 0
    high: cython.Py_ssize_t = len(ids)
    middle: cython.Py_ssize_t
    while low < high:
        middle = (low + high) >> 1
        if ids[middle] < number:
            low = middle + 1
        else:
            high = middle
    return low if low < len(ids) and ids[low] == number else -1


def walk_perf(
    data: cython.const[cython.uchar][::1],
    start: cython.Py_ssize_t,
    ids: cython.const[cython.ulonglong][::1],
    of_ids: cython.const[cython.longlong][::1],
    layouts: cython.const[cython.longlong][:, ::1],
    found: cython.longlong[:, ::1],
) -> tuple[int, int, int]:
    """Find samples from `start` on: (where it stopped, how many were found, how many are damaged or without raw data).

    It stops in front of a record that is no sample, of one that is not there whole, and where `found` is full.
    `layouts` are used by the sample's id where there are several.
    """
    at: cython.Py_ssize_t = start
    end: cython.Py_ssize_t
    body: cython.Py_ssize_t
    i: cython.Py_ssize_t
    size: cython.Py_ssize_t
    room: cython.Py_ssize_t = len(found)
    n: cython.Py_ssize_t = 0
    odd: cython.Py_ssize_t = 0
    which: cython.Py_ssize_t
    many: cython.ulonglong
    total: cython.Py_ssize_t = len(data)
    several: cython.bint = len(layouts) > 1
    while at + 8 <= total and n < room and _u32(data, at) == _SAMPLE:
        size = _u16(data, at + 6)
        if size < 8 or at + size > total:
            break
        body = at + 8
        end = at + size
        at = end
        which = 0
        if several:
            which = _layout_of(ids, _u64(data, body)) if end - body >= 8 else -1
            if which >= 0:
                which = cython.cast(cython.Py_ssize_t, of_ids[which])
        if which < 0 or which >= len(layouts) or layouts[which, _RAW] < 0 or body + layouts[which, _REST] > end:
            odd += 1
            continue
        i = body + cython.cast(cython.Py_ssize_t, layouts[which, _REST])
        if layouts[which, _READ] >= 0:
            if layouts[which, _GROUP] > 0:
                many = _u64(data, i) if i + 8 <= end else _MASK64
                if many > 4096:
                    odd += 1
                    continue
                i += cython.cast(cython.Py_ssize_t, many * cython.cast(cython.ulonglong, layouts[which, _GROUP]))
            i += cython.cast(cython.Py_ssize_t, layouts[which, _READ])
        if layouts[which, _CHAIN] >= 0:
            many = _u64(data, i) if i + 8 <= end else _MASK64
            if many > 8192:
                odd += 1
                continue
            i += 8 + 8 * cython.cast(cython.Py_ssize_t, many)
        if i + 4 > end or i + 4 + cython.cast(cython.Py_ssize_t, _u32(data, i)) > end:
            odd += 1
            continue
        found[n, _AT] = i + 4
        found[n, _SIZE] = cython.cast(cython.longlong, _u32(data, i))
        found[n, _WHEN] = found[n, _THREAD] = found[n, _PROCESS] = found[n, _ON] = 0
        if layouts[which, _TIME] >= 0:
            found[n, _WHEN] = cython.cast(
                cython.longlong,
                _u64(data, body + cython.cast(cython.Py_ssize_t, layouts[which, _TIME])) & (_MASK64 >> 1),
            )
        if layouts[which, _TID] >= 0:
            i = body + cython.cast(cython.Py_ssize_t, layouts[which, _TID])
            found[n, _PROCESS] = cython.cast(cython.longlong, _u32(data, i))
            found[n, _THREAD] = cython.cast(cython.longlong, _u32(data, i + 4))
        if layouts[which, _CPU] >= 0:
            found[n, _ON] = cython.cast(
                cython.longlong, _u32(data, body + cython.cast(cython.Py_ssize_t, layouts[which, _CPU]))
            )
        n += 1
    return at, n, odd


def walk_pages(
    data: cython.const[cython.uchar][::1],
    page_size: cython.Py_ssize_t,
    cpu: cython.longlong,
    found: cython.longlong[:, ::1],
) -> tuple[int, int, int]:
    """Find the records in whole pages of one CPU: (pages read, how many were found, pages that are damaged).

    It stops in front of a page for whose records `found` may have no room.
    """
    page: cython.Py_ssize_t = 0
    at: cython.Py_ssize_t
    end: cython.Py_ssize_t
    stored: cython.Py_ssize_t
    size: cython.Py_ssize_t
    length: cython.ulonglong
    n: cython.Py_ssize_t = 0
    odd: cython.Py_ssize_t = 0
    room: cython.Py_ssize_t = len(found)
    total: cython.Py_ssize_t = len(data)
    now: cython.ulonglong
    absolute: cython.ulonglong
    commit: cython.ulonglong
    what: cython.uint
    delta: cython.ulonglong
    while page + page_size <= total and n + (page_size >> 2) < room:
        now = _u64(data, page)
        commit = _u64(data, page + 8)
        at = page + _PAGE_HEAD
        stored = cython.cast(cython.Py_ssize_t, commit & _COMMIT)
        end = at + stored
        if end > page + page_size:
            odd += 1
            page += page_size
            continue
        if commit & _MISSED:
            found[n, _AT] = -1
            found[n, _SIZE] = 0
            if commit & _MISSED_STORED and end + 8 <= page + page_size:
                found[n, _SIZE] = cython.cast(cython.longlong, _u64(data, end) & _MASK48)
            found[n, _WHEN] = cython.cast(cython.longlong, now & (_MASK64 >> 1))
            found[n, _THREAD] = found[n, _PROCESS] = 0
            found[n, _ON] = cpu
            n += 1
        while at + 4 <= end:
            what = cython.cast(cython.uint, _u32(data, at)) & 31
            delta = _u32(data, at) >> 5
            at += 4
            if what == 29:  # padding, or an event that was discarded
                if delta == 0 or at + 4 > end:
                    break
                now = (now + delta) & _MASK64
                length = _u32(data, at)
                if length == 0 or length > cython.cast(cython.ulonglong, page_size):
                    break
                at += cython.cast(cython.Py_ssize_t, length)
                continue
            if what >= 30:
                if at + 4 > end:
                    odd += 1
                    break
                delta |= _u32(data, at) << 27
                at += 4
                if what == 30:
                    now = (now + delta) & _MASK64
                else:  # an absolute time, without its five highest bits
                    absolute = delta | (now & _TOP_BITS)
                    if absolute < now:
                        absolute = (absolute + (cython.cast(cython.ulonglong, 1) << 59)) & _MASK64
                    now = absolute
                continue
            now = (now + delta) & _MASK64
            if what == 0:
                if at + 4 > end:
                    odd += 1
                    break
                length = _u32(data, at)
                at += 4
                if length < 4:
                    odd += 1
                    break
                length = (length - 4 + 3) & ~cython.cast(cython.ulonglong, 3)
            else:
                length = what * 4
            if length > cython.cast(cython.ulonglong, end - at):
                odd += 1
                break
            size = cython.cast(cython.Py_ssize_t, length)
            if size >= _COMMON:
                found[n, _AT] = at
                found[n, _SIZE] = size
                found[n, _WHEN] = cython.cast(cython.longlong, now & (_MASK64 >> 1))
                found[n, _THREAD] = cython.cast(cython.longlong, _u32(data, at + 4))
                found[n, _PROCESS] = 0
                found[n, _ON] = cpu
                n += 1
            at += size
        page += page_size
    return page // page_size, n, odd


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
                which = self._events[_u16(data, at)]
                if which < 0:
                    self._others[_u16(data, at)] += 1
                    if self._texts is None:
                        continue
                    kind[r] = _NO_KIND
                    w0[r] = cython.cast(cython.ulonglong, at)
                    w1[r] = cython.cast(cython.ulonglong, found[i, _SIZE])
                    n[r] = self._signed(_u16(data, at))
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
                value = _u64(data, i)
            elif size == 4:
                value = _u32(data, i)
            elif size == 2:
                value = _u16(data, i)
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
