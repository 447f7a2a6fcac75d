# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Move SMIs that keep their wall-clock time ("open") from the vCPUs' programs into queues of their own.

They are due at their recorded time: from the unload for the SMI to the load after the unload for its RSM. The time that
passed until an SMI belongs to the program's next operation.

This is Cython in pure-Python mode, like `specialize`, whose operations these are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cython

from replay.simulate.operations import Cause, Op
from replay.simulate.pools import as_bytes, as_structures, make_pool
from replay.simulate.timed_operations import LAST, MORE, NEVER, Timed

COMPILED: bool = cython.compiled

_ENTER = cython.declare(cython.int, int(Op.ENTER))
_UNLOAD = cython.declare(cython.int, int(Op.UNLOAD))
_END = cython.declare(cython.int, int(Op.END))
_SMI = cython.declare(cython.longlong, int(Cause.SMI))
_RSM = cython.declare(cython.longlong, int(Cause.RSM))
_WALL_MORE = cython.declare(cython.longlong, MORE)
_WALL_LAST = cython.declare(cython.longlong, LAST)

Kept = cython.struct(  # the state of one vCPU's program
    inside=cython.longlong,  # an SMI is under way
    leaving=cython.longlong,  # its RSM has unloaded, and the load that ends the SMI is still to come
    lead=cython.longlong,  # lead before the SMI, kept for the program's next operation, and parts of it
    guest=cython.longlong,
    idle=cython.longlong,
)
KEPT = [(name, "i8") for name in ("inside", "leaving", "lead", "guest", "idle")]


@cython.final
@cython.cclass
class SmisApart:
    """Moves the SMIs of one VM, part after part. `kept` has a row of Kept for each vCPU."""

    kept = cython.declare(object, visibility="public")
    _kept: cython.pointer[Kept]
    _vcpus: cython.longlong
    _began: cython.longlong

    def __init__(self, vcpus: int, began: int) -> None:
        """`began` is the boot time, in ns, from which the wall clock counts."""
        self._vcpus, self._began = max(vcpus, 1), began
        self.kept = make_pool(self._vcpus, KEPT)
        if cython.compiled:
            view: cython.uchar[::1] = as_bytes(self.kept)
            self._kept = cython.cast(cython.pointer[Kept], cython.address(view[0]))
        else:
            self._kept = as_structures(self.kept)

    def move(self, timed: Timed) -> Timed:
        """Return the next operations with their SMIs moved; their columns are changed in place."""
        block = timed.block
        self._move(
            block.op, block.gfn, block.time, timed.queue, timed.lead, timed.guest, timed.idle, timed.wall,
        )  # fmt: skip
        until = max(int(block.time[len(timed) - 1]) - self._began, 0) if len(timed) else NEVER
        return replace(timed, until=until)

    def rest(self, lead: Any, guest: Any, idle: Any) -> tuple[Any, Any, Any]:
        """Return the time after each vCPU's last operation, in ns, with what SMIs have kept of it added."""
        return lead + self.kept["lead"], guest + self.kept["guest"], idle + self.kept["idle"]

    def _move(
        self,
        op: cython.const[cython.uint][::1],
        gfn: cython.const[cython.longlong][::1],
        time: cython.const[cython.longlong][::1],
        queue: cython.int[::1],
        lead: cython.longlong[::1],
        guest: cython.longlong[::1],
        idle: cython.longlong[::1],
        wall: cython.longlong[::1],
    ) -> None:
        n: cython.Py_ssize_t
        v: cython.Py_ssize_t
        kind: cython.int
        kept: cython.pointer[Kept] = self._kept
        if not cython.compiled:
            op, gfn, time = map(memoryview, (op, gfn, time))  # type: ignore[arg-type]
        with cython.nogil:
            for n in range(op.shape[0]):
                kind = op[n] & 15
                v = queue[n]
                if kind == _END:
                    continue
                if kept[v].inside:
                    wall[n] = _WALL_MORE
                    if kind == _UNLOAD and gfn[n] == _RSM:
                        kept[v].leaving = True
                    if kept[v].leaving and kind == _ENTER:
                        wall[n] = _WALL_LAST
                        kept[v].inside = kept[v].leaving = False
                elif kind == _UNLOAD and gfn[n] == _SMI:
                    kept[v].lead += lead[n]
                    kept[v].guest += guest[n]
                    kept[v].idle += idle[n]
                    lead[n] = guest[n] = idle[n] = 0
                    kept[v].inside = True
                    wall[n] = max(time[n] - self._began, 0)
                else:
                    lead[n] += kept[v].lead
                    guest[n] += kept[v].guest
                    idle[n] += kept[v].idle
                    kept[v].lead = kept[v].guest = kept[v].idle = 0
                    continue
                queue[n] = cython.cast(cython.int, self._vcpus + v)
