# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Count rows in groups, by VM and two keys: the number of rows, their first and last time, and some sums.

Most queries of a report use this; the group_by of polars takes five times as long. This is Cython in pure-Python mode,
like `timeline`.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from traces.schema import BY_NAME

COMPILED: bool = cython.compiled

_Whole = cython.fused_type(cython.int, cython.longlong)

FIELDS = ("vm", "key", "other", "rows", "first_time", "last_time")
# What `Groups.feed_windows` sums. `crossed` is the sum of ns since the window's begin over exits, less that over
# entries; `entered` and `left`, no sums, are the times of the last entry and exit, 0 without one; `smis` are entries
# into SMM, and `fixes` permission faults.
IN_WINDOW = ("entries", "exits", "crossed", "entered", "left", "faults", "fixes", "smis", "loads")
_VM = cython.declare(cython.int, 0)
_KEY = cython.declare(cython.int, 1)
_OTHER = cython.declare(cython.int, 2)
_ROWS = cython.declare(cython.int, 3)
_FIRST = cython.declare(cython.int, 4)
_LAST = cython.declare(cython.int, 5)
_SUM = cython.declare(cython.int, 6)
_ENTRIES = cython.declare(cython.int, 6 + IN_WINDOW.index("entries"))
_EXITS = cython.declare(cython.int, 6 + IN_WINDOW.index("exits"))
_CROSSED = cython.declare(cython.int, 6 + IN_WINDOW.index("crossed"))
_ENTERED = cython.declare(cython.int, 6 + IN_WINDOW.index("entered"))
_LEFT = cython.declare(cython.int, 6 + IN_WINDOW.index("left"))
_FAULTS = cython.declare(cython.int, 6 + IN_WINDOW.index("faults"))
_FIXES = cython.declare(cython.int, 6 + IN_WINDOW.index("fixes"))
_SMIS = cython.declare(cython.int, 6 + IN_WINDOW.index("smis"))
_LOADS = cython.declare(cython.int, 6 + IN_WINDOW.index("loads"))
_VCPUS = 1 << 15  # vCPU ids are int16 in a trace

_FAULT = cython.declare(cython.int, BY_NAME["kvm_page_fault"].code)
_FAST = cython.declare(cython.int, BY_NAME["fast_page_fault"].code)
_REQUESTED = cython.declare(cython.int, BY_NAME["kvm_mmu_spte_requested"].code)
_MMU_LOAD = cython.declare(cython.int, BY_NAME["mmu_load"].code)
_ROOT_GET = cython.declare(cython.int, BY_NAME["root_get"].code)
_GET_PAGE = cython.declare(cython.int, BY_NAME["kvm_mmu_get_page"].code)
_ENTRY = cython.declare(cython.int, BY_NAME["kvm_entry"].code)
_EXIT = cython.declare(cython.int, BY_NAME["kvm_exit"].code)
_SMM = cython.declare(cython.int, BY_NAME["kvm_smm_transition"].code)
_MIX = cython.declare(cython.ulonglong, 0x9E3779B97F4A7C15)  # spreads keys over the hash table


@cython.cfunc
@cython.nogil
@cython.inline
@cython.exceptval(check=False)
def _start(column: _Whole[::1]) -> cython.pointer[_Whole]:
    """Return a column in the form that loops take: a pointer, or in plain Python the column itself."""
    return cython.address(column[0]) if cython.compiled else column  # type: ignore[index,return-value]


@cython.final
@cython.cclass
class Groups:
    """The groups. `table` has one row for each, of which `count` are in use: FIELDS, and then the sums.

    What the keys and the sums mean depends on the method that feeds rows. Groups are found by a hash table of their
    positions (from 1 on; 0 is free), which is at most half full. Rows are fed by VM, -1 for those of none. The columns
    are as in traces, except that `kind` is a code, and that `vcpu` and `gfn` are -1 where there is none.
    """

    table = cython.declare(object, visibility="public")
    count = cython.declare(cython.Py_ssize_t, visibility="public")
    _places: object
    _mask: cython.Py_ssize_t
    _width: cython.Py_ssize_t
    _latest: object  # by vCPU id: where the group of its last row is in `table`

    def __init__(self, sums: int, room: int = 1 << 10) -> None:
        """`sums` is their number; `room` is that of groups to allocate memory for at first, a power of two."""
        self.table, self.count = np.zeros((room, len(FIELDS) + sums), np.int64), 0
        self._width = len(FIELDS) + sums
        self._places, self._mask = np.zeros(2 * room, np.int32), 2 * room - 1
        self._latest = None

    def feed(self, vm: int, wanted: Any, kind: Any, time: Any, key: Any, other: Any) -> None:
        """Group rows by `key` (int32 or int64) and `other` (uint8), if `wanted` is not 0 for the code of their kind.

        There are no sums.
        """
        self._through(self._feed, len(kind), vm, wanted, kind, time, key, other)

    def feed_roots(self, vm: int, kind: Any, time: Any, root: Any, role: Any) -> None:
        """Group rows that have a root by that root.

        The sums are: loads; faults; and, not a sum, the least role word of the root, 0 if none is known.
        """
        self._through(self._feed_roots, len(kind), vm, kind, time, root, role)

    def feed_pages(self, vm: int, vcpu: Any, kind: Any, time: Any, gfn: Any, addr: Any, old: Any, new: Any) -> None:
        """Group the rows of vCPUs' faults by page and vCPU.

        The sums are: faults; mappings and permissions that they led to.
        """
        self._through(self._feed_pages, len(kind), vm, vcpu, kind, time, gfn, addr, old, new)

    def feed_windows(
        self, vm: int, first: int, width: int, present: int, reserved: int,
        vcpu: Any, kind: Any, time: Any, code: Any, flags: Any,
    ) -> None:  # fmt: skip
        """Group rows that show a vCPU's time by window and vCPU.

        Windows are `width` ns long, from `first` on. The sums are IN_WINDOW. Permission faults are those whose code
        has a bit of `present` and none of `reserved`.
        """
        if self._latest is None:
            self._latest = np.zeros(_VCPUS, np.int32)
        given = (vm, first, width, present, reserved, vcpu, kind, time, code, flags, self._latest)
        self._through(self._feed_windows, len(kind), *given)

    def _through(self, loop: Any, rows: int, *given: Any) -> None:
        """Run a loop over all rows, which stops when there is no room for another group.

        Then enlarge the tables and continue.
        """
        done = 0
        while (done := loop(done, *given, self.table.reshape(-1), self._places)) < rows:
            # Memory for rows that are not in use is not taken from the machine.
            larger = np.zeros((4 * len(self.table), self._width), np.int64)
            larger[: len(self.table)] = self.table
            self.table = larger
            self._places, self._mask = np.zeros(2 * len(larger), np.int32), 2 * len(larger) - 1
            self._enter(larger.reshape(-1), self._places)

    def _enter(self, table: cython.longlong[::1], places: cython.int[::1]) -> None:
        """Enter all groups into a new hash table."""
        i: cython.Py_ssize_t
        g: cython.Py_ssize_t
        p: cython.Py_ssize_t
        for i in range(self.count):
            g = i * self._width
            p = self._place(_start(table), _start(places), table[g + _VM], table[g + _KEY], table[g + _OTHER])
            places[p] = cython.cast(cython.int, i + 1)

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _count(
        self,
        cells: cython.pointer[cython.longlong],
        places: cython.pointer[cython.int],
        likely: cython.Py_ssize_t,
        vm: cython.longlong,
        key: cython.longlong,
        other: cython.longlong,
        time: cython.longlong,
    ) -> cython.Py_ssize_t:
        """Count a row in its group, which most often is `likely`, or the next one.

        The next, because a guest that runs through its memory again does so in the same order. Return where the group
        begins in `cells`, or -1 without room.
        """
        g: cython.Py_ssize_t = likely
        p: cython.Py_ssize_t
        if cells[g + _KEY] != key or cells[g + _OTHER] != other or cells[g + _VM] != vm or self.count == 0:
            g += self._width
            if g >= self.count * self._width:
                g = 0
        if cells[g + _KEY] != key or cells[g + _OTHER] != other or cells[g + _VM] != vm or self.count == 0:
            p = self._place(cells, places, vm, key, other)
            if places[p] == 0:
                if 2 * self.count > self._mask:
                    return -1
                g = self.count * self._width
                cells[g + _VM] = vm
                cells[g + _KEY] = key
                cells[g + _OTHER] = other
                cells[g + _FIRST] = cells[g + _LAST] = time
                self.count += 1
                places[p] = cython.cast(cython.int, self.count)
            g = (places[p] - 1) * self._width
        cells[g + _ROWS] += 1
        if time < cells[g + _FIRST]:
            cells[g + _FIRST] = time
        if time > cells[g + _LAST]:
            cells[g + _LAST] = time
        return g

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _place(
        self,
        cells: cython.pointer[cython.longlong],
        places: cython.pointer[cython.int],
        vm: cython.longlong,
        key: cython.longlong,
        other: cython.longlong,
    ) -> cython.Py_ssize_t:
        """Return where a group's position is stored in the hash table, or would be stored."""
        mixed: cython.ulonglong = cython.cast(cython.ulonglong, (vm << 32) ^ other) * _MIX
        p: cython.Py_ssize_t
        g: cython.Py_ssize_t
        mixed = (mixed ^ cython.cast(cython.ulonglong, key)) * _MIX
        p = cython.cast(cython.Py_ssize_t, mixed >> 24) & self._mask
        while places[p]:
            g = (places[p] - 1) * self._width
            if cells[g + _KEY] == key and cells[g + _OTHER] == other and cells[g + _VM] == vm:
                break
            p = (p + 1) & self._mask
        return p

    def _feed(
        self,
        start: cython.Py_ssize_t,
        vm: cython.longlong,
        wanted: cython.const[cython.uchar][::1],
        kind: cython.const[cython.uchar][::1],
        time: cython.const[cython.longlong][::1],
        key: cython.const[_Whole][::1],
        other: cython.const[cython.uchar][::1],
        table: cython.longlong[::1],
        places: cython.int[::1],
    ) -> cython.Py_ssize_t:
        """Process rows from `start` on.

        Return the row at which there is no room for another group, or the number of rows.
        """
        i: cython.Py_ssize_t
        at: cython.Py_ssize_t = 0
        stop: cython.Py_ssize_t = len(kind)
        cells: cython.pointer[cython.longlong] = _start(table)
        held: cython.pointer[cython.int] = _start(places)
        if not cython.compiled:
            kind, time, key, other = map(memoryview, (kind, time, key, other))  # type: ignore[arg-type]
        with cython.nogil:
            for i in range(start, kind.shape[0]):
                if wanted[kind[i]]:
                    at = self._count(cells, held, at, vm, key[i], other[i], time[i])
                    if at < 0:
                        stop = i
                        break
        return stop

    def _feed_roots(
        self,
        start: cython.Py_ssize_t,
        vm: cython.longlong,
        kind: cython.const[cython.uchar][::1],
        time: cython.const[cython.longlong][::1],
        root: cython.const[cython.int][::1],
        role: cython.const[cython.uint][::1],
        table: cython.longlong[::1],
        places: cython.int[::1],
    ) -> cython.Py_ssize_t:
        i: cython.Py_ssize_t
        k: cython.int
        stop: cython.Py_ssize_t = len(kind)
        cells: cython.pointer[cython.longlong] = _start(table)
        held: cython.pointer[cython.int] = _start(places)
        at: cython.Py_ssize_t = 0
        if not cython.compiled:
            kind, time, root, role = map(memoryview, (kind, time, root, role))  # type: ignore[arg-type]
        with cython.nogil:
            for i in range(start, kind.shape[0]):
                if root[i] == 0:
                    continue
                at = self._count(cells, held, at, vm, root[i], 0, time[i])
                if at < 0:
                    stop = i
                    break
                k = kind[i]
                if k == _FAULT:
                    cells[at + _SUM + 1] += 1
                elif k in (_MMU_LOAD, _ROOT_GET, _GET_PAGE):
                    cells[at + _SUM] += k == _MMU_LOAD
                    if role[i] and (cells[at + _SUM + 2] == 0 or role[i] < cells[at + _SUM + 2]):
                        cells[at + _SUM + 2] = role[i]
        return stop

    def _feed_pages(
        self,
        start: cython.Py_ssize_t,
        vm: cython.longlong,
        vcpu: cython.const[cython.short][::1],
        kind: cython.const[cython.uchar][::1],
        time: cython.const[cython.longlong][::1],
        gfn: cython.const[cython.longlong][::1],
        addr: cython.const[cython.ulonglong][::1],
        old: cython.const[cython.ulonglong][::1],
        new: cython.const[cython.ulonglong][::1],
        table: cython.longlong[::1],
        places: cython.int[::1],
    ) -> cython.Py_ssize_t:
        i: cython.Py_ssize_t
        k: cython.int
        stop: cython.Py_ssize_t = len(kind)
        cells: cython.pointer[cython.longlong] = _start(table)
        held: cython.pointer[cython.int] = _start(places)
        at: cython.Py_ssize_t = 0
        page: cython.longlong
        if not cython.compiled:
            vcpu, kind, time = map(memoryview, (vcpu, kind, time))  # type: ignore[arg-type]
            gfn, addr, old, new = map(memoryview, (gfn, addr, old, new))  # type: ignore[arg-type]
        with cython.nogil:
            for i in range(start, kind.shape[0]):
                k = kind[i]
                if vcpu[i] < 0 or k not in (_FAULT, _REQUESTED, _FAST):
                    continue
                page = gfn[i] if k == _REQUESTED else cython.cast(cython.longlong, addr[i] >> 12)
                at = self._count(cells, held, at, vm, page, vcpu[i], time[i])
                if at < 0:
                    stop = i
                    break
                cells[at + _SUM] += k == _FAULT
                cells[at + _SUM + 1] += k == _REQUESTED or (k == _FAST and old[i] != new[i])
        return stop

    def _feed_windows(
        self,
        start: cython.Py_ssize_t,
        vm: cython.longlong,
        first: cython.longlong,
        width: cython.longlong,
        present: cython.ulonglong,
        reserved: cython.ulonglong,
        vcpu: cython.const[cython.short][::1],
        kind: cython.const[cython.uchar][::1],
        time: cython.const[cython.longlong][::1],
        code: cython.const[cython.ulonglong][::1],
        flags: cython.const[cython.uchar][::1],
        latest: cython.int[::1],
        table: cython.longlong[::1],
        places: cython.int[::1],
    ) -> cython.Py_ssize_t:
        i: cython.Py_ssize_t
        k: cython.int
        v: cython.Py_ssize_t
        stop: cython.Py_ssize_t = len(kind)
        cells: cython.pointer[cython.longlong] = _start(table)
        held: cython.pointer[cython.int] = _start(places)
        at: cython.Py_ssize_t
        window: cython.longlong = 0
        begin: cython.longlong = first  # when that window begins
        if not cython.compiled:
            vcpu, kind, time, code, flags = map(memoryview, (vcpu, kind, time, code, flags))  # type: ignore[arg-type]
        with cython.nogil:
            for i in range(start, kind.shape[0]):
                k = kind[i]
                v = vcpu[i]
                if v < 0 or k not in (_ENTRY, _EXIT, _FAULT, _SMM, _MMU_LOAD):
                    continue
                if time[i] < begin or time[i] - begin >= width:
                    window = (time[i] - first) // width
                    begin = first + window * width
                at = self._count(cells, held, latest[v] * self._width, vm, window, v, time[i])
                if at < 0:
                    stop = i
                    break
                latest[v] = cython.cast(cython.int, at // self._width)
                if k == _ENTRY:
                    cells[at + _ENTRIES] += 1
                    cells[at + _CROSSED] -= time[i] - begin
                    if cells[at + _ENTRIES] == 1 or time[i] > cells[at + _ENTERED]:
                        cells[at + _ENTERED] = time[i]
                elif k == _EXIT:
                    cells[at + _EXITS] += 1
                    cells[at + _CROSSED] += time[i] - begin
                    if cells[at + _EXITS] == 1 or time[i] > cells[at + _LEFT]:
                        cells[at + _LEFT] = time[i]
                elif k == _FAULT:
                    cells[at + _FAULTS] += 1
                    cells[at + _FIXES] += code[i] & present != 0 and code[i] & reserved == 0
                elif k == _SMM:
                    cells[at + _SMIS] += flags[i] & 1
                else:
                    cells[at + _LOADS] += 1
        return stop
