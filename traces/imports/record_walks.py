# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=True, wraparound=False, cdivision=True, initializedcheck=False
"""Where raw records are: `walk_perf` finds them in perf's stream, `walk_pages` in the pages of ftrace's ring buffer.

Both put them into a table (`raw_records`), which `raw_rows` makes rows of. Cython in pure-Python mode.
"""

from __future__ import annotations

import cython

from traces.imports.event_fields import COMMON
from traces.imports.raw_records import AT, ON, PROCESS, SIZE, THREAD, WHEN, u16, u32, u64

COMPILED: bool = cython.compiled

_COMMON = cython.declare(cython.int, COMMON)
# Of literals above 31 bits compiled code would make Python's numbers, a hundred times slower.
_MASK64 = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFFFFFF)
_MASK48 = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFF)

_AT = cython.declare(cython.int, AT)
_SIZE = cython.declare(cython.int, SIZE)
_WHEN = cython.declare(cython.int, WHEN)
_THREAD = cython.declare(cython.int, THREAD)
_PROCESS = cython.declare(cython.int, PROCESS)
_ON = cython.declare(cython.int, ON)

# Of perf's stream
_SAMPLE = cython.declare(cython.int, 9)
# Columns of a table of layouts: where a sample has what, -1: nowhere.
ID, TID, TIME, CPU, REST, READ, GROUP, CHAIN, RAW = range(9)
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
    while at + 8 <= total and n < room and u32(data, at) == _SAMPLE:
        size = u16(data, at + 6)
        if size < 8 or at + size > total:
            break
        body = at + 8
        end = at + size
        at = end
        which = 0
        if several:
            which = _layout_of(ids, u64(data, body)) if end - body >= 8 else -1
            if which >= 0:
                which = cython.cast(cython.Py_ssize_t, of_ids[which])
        if which < 0 or which >= len(layouts) or layouts[which, _RAW] < 0 or body + layouts[which, _REST] > end:
            odd += 1
            continue
        i = body + cython.cast(cython.Py_ssize_t, layouts[which, _REST])
        if layouts[which, _READ] >= 0:
            if layouts[which, _GROUP] > 0:
                many = u64(data, i) if i + 8 <= end else _MASK64
                if many > 4096:
                    odd += 1
                    continue
                i += cython.cast(cython.Py_ssize_t, many * cython.cast(cython.ulonglong, layouts[which, _GROUP]))
            i += cython.cast(cython.Py_ssize_t, layouts[which, _READ])
        if layouts[which, _CHAIN] >= 0:
            many = u64(data, i) if i + 8 <= end else _MASK64
            if many > 8192:
                odd += 1
                continue
            i += 8 + 8 * cython.cast(cython.Py_ssize_t, many)
        if i + 4 > end or i + 4 + cython.cast(cython.Py_ssize_t, u32(data, i)) > end:
            odd += 1
            continue
        found[n, _AT] = i + 4
        found[n, _SIZE] = cython.cast(cython.longlong, u32(data, i))
        found[n, _WHEN] = found[n, _THREAD] = found[n, _PROCESS] = found[n, _ON] = 0
        if layouts[which, _TIME] >= 0:
            found[n, _WHEN] = cython.cast(
                cython.longlong,
                u64(data, body + cython.cast(cython.Py_ssize_t, layouts[which, _TIME])) & (_MASK64 >> 1),
            )
        if layouts[which, _TID] >= 0:
            i = body + cython.cast(cython.Py_ssize_t, layouts[which, _TID])
            found[n, _PROCESS] = cython.cast(cython.longlong, u32(data, i))
            found[n, _THREAD] = cython.cast(cython.longlong, u32(data, i + 4))
        if layouts[which, _CPU] >= 0:
            found[n, _ON] = cython.cast(
                cython.longlong, u32(data, body + cython.cast(cython.Py_ssize_t, layouts[which, _CPU]))
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
        now = u64(data, page)
        commit = u64(data, page + 8)
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
                found[n, _SIZE] = cython.cast(cython.longlong, u64(data, end) & _MASK48)
            found[n, _WHEN] = cython.cast(cython.longlong, now & (_MASK64 >> 1))
            found[n, _THREAD] = found[n, _PROCESS] = 0
            found[n, _ON] = cpu
            n += 1
        while at + 4 <= end:
            what = cython.cast(cython.uint, u32(data, at)) & 31
            delta = u32(data, at) >> 5
            at += 4
            if what == 29:  # padding, or an event that was discarded
                if delta == 0 or at + 4 > end:
                    break
                now = (now + delta) & _MASK64
                length = u32(data, at)
                if length == 0 or length > cython.cast(cython.ulonglong, page_size):
                    break
                at += cython.cast(cython.Py_ssize_t, length)
                continue
            if what >= 30:
                if at + 4 > end:
                    odd += 1
                    break
                delta |= u32(data, at) << 27
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
                length = u32(data, at)
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
                found[n, _THREAD] = cython.cast(cython.longlong, u32(data, at + 4))
                found[n, _PROCESS] = 0
                found[n, _ON] = cpu
                n += 1
            at += size
        page += page_size
    return page // page_size, n, odd
