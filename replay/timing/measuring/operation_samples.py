# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Pick samples of costs out of the operations of a recording, as its own kernel performed them.

This is Cython in pure-Python mode, like `row_spans`.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

from replay.simulate.operations import Op
from replay.simulate.timed_operations import CREATED, FOUND

COMPILED: bool = cython.compiled

_TOUCH = cython.declare(cython.int, int(Op.TOUCH))
_ENTER = cython.declare(cython.int, int(Op.ENTER))
_UNLOAD = cython.declare(cython.int, int(Op.UNLOAD))
_FOUND = cython.declare(cython.int, FOUND)
_CREATED = cython.declare(cython.int, CREATED)
NAMES = ("fault", "switch", "with_tables", "tables", "found", "created", "unload")


def samples_of(timed: Any, still: Any) -> dict[str, Any]:
    """Return what was sampled of these operations, by name, in order and in ns.

    `fault` is the cost of each fault that built no table; `switch` the guest's time before such a fault where the guest
    did next to nothing (`still`, by operation); `with_tables` the cost of each fault that built tables, and `tables`
    how many it built; `found` and `created` that of each load, by its outcome; `unload` that of each unload that took
    time.
    """
    room = [np.empty(len(timed), np.int64) for _ in NAMES]
    counts = np.zeros(len(NAMES), np.int64)
    _pick(timed.block.op, timed.was, timed.cost, timed.guest, still, counts, *room)
    return {name: each[:count] for name, each, count in zip(NAMES, room, counts.tolist(), strict=True)}


def _pick(
    op: cython.const[cython.uint][::1],
    was: cython.const[cython.uchar][::1],
    cost: cython.const[cython.longlong][::1],
    guest: cython.const[cython.longlong][::1],
    still: cython.const[cython.uchar][::1],
    counts: cython.longlong[::1],
    fault: cython.longlong[::1],
    switch: cython.longlong[::1],
    with_tables: cython.longlong[::1],
    tables: cython.longlong[::1],
    found: cython.longlong[::1],
    created: cython.longlong[::1],
    unload: cython.longlong[::1],
) -> None:
    i: cython.Py_ssize_t
    kind: cython.int
    faults: cython.Py_ssize_t = 0
    switches: cython.Py_ssize_t = 0
    built: cython.Py_ssize_t = 0
    finds: cython.Py_ssize_t = 0
    creations: cython.Py_ssize_t = 0
    unloads: cython.Py_ssize_t = 0
    with cython.nogil:
        for i in range(op.shape[0]):
            kind = op[i] & 15
            if kind == _TOUCH:
                if was[i] == 1:
                    fault[faults] = cost[i]
                    faults += 1
                    if still[i] and guest[i] > 0:
                        switch[switches] = guest[i]
                        switches += 1
                elif was[i] > 1:
                    with_tables[built] = cost[i]
                    tables[built] = was[i] - 1
                    built += 1
            elif kind == _ENTER:
                if was[i] == _FOUND:
                    found[finds] = cost[i]
                    finds += 1
                elif was[i] == _CREATED:
                    created[creations] = cost[i]
                    creations += 1
            elif kind == _UNLOAD and cost[i] > 0:
                unload[unloads] = cost[i]
                unloads += 1
    counts[0] = faults
    counts[1] = switches
    counts[2] = counts[3] = built
    counts[4] = finds
    counts[5] = creations
    counts[6] = unloads
