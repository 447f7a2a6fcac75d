# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The operations that wait for their time: one pool of them, in the order of the stream, and queues through the pool.

Each vCPU has a queue for its program and one for what the wall clock brings it, and the VM has one. The classes of the
clock extend one another, in the way that an operation goes: TimedQueues, Turns, VcpuPrograms, Timer.
"""

from __future__ import annotations

import cython

from replay.simulate.compiled.core import Core
from replay.simulate.operations import Op

NONE = cython.declare(cython.longlong, -1)  # stands for no operation
SWITCH = cython.declare(cython.longlong, int(Op.SWITCH))
ZAP = cython.declare(cython.longlong, int(Op.ZAP))
SPLIT = cython.declare(cython.longlong, int(Op.SPLIT))


@cython.cclass
class TimedQueues:
    """Operations that a Core is to run, in their queues, and each vCPU's clock."""

    core: Core
    todo: cython.pointer[Todo]
    queue: cython.pointer[Queue]
    pace: cython.pointer[Pace]
    todo_room: cython.longlong
    todos: cython.longlong

    def attach(self, core: Core, queue: cython.uchar[::1], pace: cython.uchar[::1]) -> None:
        """Time this core, using these pools."""
        self.core = core
        if cython.compiled:
            self.queue = cython.cast(cython.pointer[Queue], cython.address(queue[0]))
            self.pace = cython.cast(cython.pointer[Pace], cython.address(pace[0]))
        else:
            self.queue, self.pace = queue, pace

    def attach_todo(self, todo: cython.uchar[::1], room: cython.longlong) -> None:
        """Use this pool for operations; it holds what the previous pool held."""
        if cython.compiled:
            self.todo = cython.cast(cython.pointer[Todo], cython.address(todo[0]))
        else:
            self.todo = todo
        self.todo_room = room

    def check(
        self,
        op: cython.const[cython.uint][::1],
        queue: cython.const[cython.int][::1],
        lead: cython.const[cython.longlong][::1],
        guest: cython.const[cython.longlong][::1],
        idle: cython.const[cython.longlong][::1],
        cost: cython.const[cython.longlong][::1],
    ) -> cython.longlong:
        """Return the index of the first operation that is in the wrong queue or
        has an invalid time, or the number of operations.
        """
        i: cython.longlong
        q: cython.longlong
        vcpus: cython.longlong = self.core.vcpus
        for i in range(op.shape[0]):
            q = queue[i]
            if q < 0 or q > 2 * vcpus or guest[i] < 0 or idle[i] < 0 or cost[i] < 0:
                return i
            if lead[i] < guest[i] or lead[i] - guest[i] < idle[i]:
                return i
            if op[i] & 15 <= SWITCH and op[i] >> 16 != (q - vcpus if q >= vcpus else q):
                return i
        return op.shape[0]

    def take(
        self,
        op: cython.const[cython.uint][::1],
        gfn: cython.const[cython.longlong][::1],
        queue: cython.const[cython.int][::1],
        lead: cython.const[cython.longlong][::1],
        guest: cython.const[cython.longlong][::1],
        idle: cython.const[cython.longlong][::1],
        cost: cython.const[cython.longlong][::1],
        was: cython.const[cython.uchar][::1],
        wall: cython.const[cython.longlong][::1],
        first: cython.longlong,
        ranges: cython.longlong,
    ) -> None:
        """Append checked operations to their queues. The block's ranges begin with number `ranges` of all ranges."""
        i: cython.longlong
        at: cython.longlong = self.todos
        tail: cython.longlong
        kind: cython.longlong
        for i in range(op.shape[0]):
            kind = op[i] & 15
            self.todo[at].op = op[i]
            self.todo[at].gfn = gfn[i] + ranges if kind in (ZAP, SPLIT) else gfn[i]
            self.todo[at].lead = lead[i]
            self.todo[at].guest = guest[i]
            self.todo[at].idle = idle[i]
            self.todo[at].cost = cost[i]
            self.todo[at].was = was[i]
            self.todo[at].wall = wall[i]
            self.todo[at].at = first + i
            self.todo[at].next = 0
            tail = self.queue[queue[i]].tail
            if tail == NONE:
                self.queue[queue[i]].head = at
            else:
                self.todo[tail].next = cython.cast(cython.uint, at - tail)
            self.queue[queue[i]].tail = at
            at += 1
        self.todos = at
