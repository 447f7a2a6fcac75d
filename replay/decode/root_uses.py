# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What rows say of each root that they name: how many there are, from when to when, loads and faults, its role word.

Cython in pure-Python mode, as `timeline` is.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from traces.schema import BY_NAME

COMPILED: bool = cython.compiled

_FAULT = cython.declare(cython.int, BY_NAME["kvm_page_fault"].code)
_MMU_LOAD = cython.declare(cython.int, BY_NAME["mmu_load"].code)
_ROOT_GET = cython.declare(cython.int, BY_NAME["root_get"].code)
_GET_PAGE = cython.declare(cython.int, BY_NAME["kvm_mmu_get_page"].code)
_MIX = cython.declare(cython.ulonglong, 0x9E3779B97F4A7C15)  # spreads keys over the table
FIELDS = ("vm", "root", "rows", "loads", "faults", "role", "first_time", "last_time")
_VM = cython.declare(cython.int, 0)
_ROOT = cython.declare(cython.int, 1)
_ROWS = cython.declare(cython.int, 2)
_LOADS = cython.declare(cython.int, 3)
_FAULTS = cython.declare(cython.int, 4)
_ROLE = cython.declare(cython.int, 5)
_FIRST = cython.declare(cython.int, 6)
_LAST = cython.declare(cython.int, 7)


@cython.final
@cython.cclass
class RootUses:
    """Of all VMs: `uses` has a row of FIELDS for each VM and root, `count` of them in use. A role of 0: none is known.

    They are found by a hash table of their places (from 1 on; 0: free), at most half full.
    """

    uses = cython.declare(object, visibility="public")
    count = cython.declare(cython.Py_ssize_t, visibility="public")
    _places: object

    def __init__(self, room: int = 1 << 10) -> None:
        """`room`: roots that there is memory for at first, a power of two."""
        self.uses, self.count = np.zeros((room, len(FIELDS)), np.int64), 0
        self._places = np.zeros(2 * room, np.int64)

    def feed(self, vm: Any, root: Any, kind: Any, role: Any, time: Any) -> None:
        """Take in rows."""
        done: cython.Py_ssize_t = 0
        while True:
            done = self._feed(done, vm, root, kind, role, time, self.uses, self._places)
            if done == len(kind):
                return
            self._grow()

    def _grow(self) -> None:
        self.uses = np.concatenate([self.uses, np.zeros_like(self.uses)])
        self._places = np.zeros(2 * len(self.uses), np.int64)
        self._enter(self.uses, self._places)

    def _enter(self, uses: cython.longlong[:, ::1], places: cython.longlong[::1]) -> None:
        """Fill a new table."""
        i: cython.Py_ssize_t
        for i in range(self.count):
            places[_place(uses, places, uses[i, _VM], uses[i, _ROOT])] = i + 1

    def _feed(
        self,
        start: cython.Py_ssize_t,
        vm: cython.const[cython.int][::1],
        root: cython.const[cython.int][::1],
        kind: cython.const[cython.uchar][::1],
        role: cython.const[cython.uint][::1],
        time: cython.const[cython.longlong][::1],
        uses: cython.longlong[:, ::1],
        places: cython.longlong[::1],
    ) -> cython.Py_ssize_t:
        """From row `start` on; the row at which there is no room for one more root, or the number of rows."""
        i: cython.Py_ssize_t
        at: cython.Py_ssize_t = 0
        p: cython.Py_ssize_t
        k: cython.int
        stop: cython.Py_ssize_t = len(kind)
        if not cython.compiled:
            vm, root, kind, role, time = map(memoryview, (vm, root, kind, role, time))  # type: ignore[arg-type]
        with cython.nogil:
            for i in range(start, kind.shape[0]):
                if root[i] == 0:
                    continue
                k = kind[i]
                # Most often the root is that of the last row.
                if at >= self.count or uses[at, _ROOT] != root[i] or uses[at, _VM] != vm[i]:
                    p = _place(uses, places, vm[i], root[i])
                    if places[p] == 0:
                        if self.count == uses.shape[0]:
                            stop = i
                            break
                        uses[self.count, _VM] = vm[i]
                        uses[self.count, _ROOT] = root[i]
                        uses[self.count, _FIRST] = uses[self.count, _LAST] = time[i]
                        self.count += 1
                        places[p] = self.count
                    at = places[p] - 1
                uses[at, _ROWS] += 1
                if time[i] < uses[at, _FIRST]:
                    uses[at, _FIRST] = time[i]
                if time[i] > uses[at, _LAST]:
                    uses[at, _LAST] = time[i]
                if k == _FAULT:
                    uses[at, _FAULTS] += 1
                elif k in (_MMU_LOAD, _ROOT_GET, _GET_PAGE):
                    uses[at, _LOADS] += k == _MMU_LOAD
                    if role[i] and (uses[at, _ROLE] == 0 or role[i] < uses[at, _ROLE]):
                        uses[at, _ROLE] = role[i]
        return stop


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _place(
    uses: cython.longlong[:, ::1], places: cython.longlong[::1], vm: cython.longlong, root: cython.longlong
) -> cython.Py_ssize_t:
    """Where a root's place is in the table, or would be."""
    mask: cython.Py_ssize_t = places.shape[0] - 1
    key: cython.ulonglong = cython.cast(cython.ulonglong, (vm << 32) ^ root) * _MIX
    p: cython.Py_ssize_t = cython.cast(cython.Py_ssize_t, key >> 24) & mask
    while places[p] and (uses[places[p] - 1, _VM] != vm or uses[places[p] - 1, _ROOT] != root):
        p = (p + 1) & mask
    return p
