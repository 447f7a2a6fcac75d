# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Run a Core's operations in virtual time, equal to `timing.reference_clock` to the ns.

What is due first runs first: a vCPU's program up to when another queue is due, or one operation of the wall clock.
"""

from __future__ import annotations

import cython

from replay.simulate.compiled.vcpu_programs import VcpuPrograms

NONE = cython.declare(cython.longlong, -1)  # stands for no operation
LAST = cython.declare(cython.longlong, -2)  # the value of simulate.timed_operations; test_clock compares them


@cython.final
@cython.cclass
class Timer(VcpuPrograms):
    """The virtual time of a Core. `timed_engine.TimedEngine` sets it up and reads its results."""

    def run(
        self, ranges: cython.const[cython.longlong][::1], until: cython.longlong, final: cython.bint
    ) -> cython.bint:
        """Run the operations that are due before `until` and whose order is known.

        Returns True if it stopped because a pool is full or the core has an error.
        """
        if cython.compiled:
            self.core.ranges = cython.cast(cython.pointer[cython.longlong], cython.address(ranges[0]))
            with cython.nogil:
                final = self._run(until, final)
        else:
            self.core.ranges = memoryview(ranges)
            final = self._run(until, final)
        return final

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _run(self, until: cython.longlong, final: cython.bint) -> cython.bint:
        """Run what is due first.

        At the same time, the VM's operation precedes those of the wall clock, and these the programs'.

        The queues are the leaves of a winner tree, in that order, so that finding the next takes the logarithm of the
        vCPUs.
        """
        vcpus: cython.longlong = self.core.vcpus
        v: cython.longlong
        which: cython.longlong
        due: cython.longlong
        programs: cython.longlong = 0  # number of programs that have operations
        stopped: cython.bint
        for v in range(vcpus):
            if not final and self._lacks(v):
                return False
            programs += self.queue[v].head != NONE
        self._place_all()
        while programs or not final:
            due = self.turn[1].due
            which = self.turn[1].queue
            if due >= until:
                return False
            stopped = self._program(which, self._bound(which, until)) if which < vcpus else self._event(which, due)
            if stopped:
                return True
            if self.moved:
                self._place_all()
            elif which == 2 * vcpus:
                self._place(which)
            else:
                v = which if which < vcpus else which - vcpus
                self._place(v)
                self._place(vcpus + v)
            if which < vcpus and self.queue[which].head == NONE:
                programs -= 1
            if which < 2 * vcpus and not final and self._lacks(which if which < vcpus else which - vcpus):
                return False
        return False

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _event(self, q: cython.longlong, when: cython.longlong) -> cython.bint:
        """Run one operation of a wall-clock queue; return True if it could not be finished."""
        v: cython.longlong = q - self.core.vcpus
        i: cython.longlong = self.queue[q].head
        guest: cython.longlong = 0
        if self.samples == self.sample_room or not self.core._room():
            return True
        if v == self.core.vcpus:
            self.core.at = self.todo[i].at
            if self.core._do(self.todo[i].op, self.todo[i].gfn):
                return True
            self._pop(q, i)
            return False
        if self.todo[i].wall >= 0:
            self._interrupt(v, when)
        else:
            guest = self.todo[i].guest
            self._pass(v, self.todo[i].lead, guest, self.todo[i].idle)
        if self._step(v, i, guest):
            self.todo[i].lead = self.todo[i].guest = self.todo[i].idle = 0
            return True
        self.pace[v].inside = self.todo[i].wall != LAST
        self._pop(q, i)
        self._sample(v)
        return False

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _interrupt(self, v: cython.longlong, when: cython.longlong) -> cython.void:
        i: cython.longlong = self.queue[v].head
        passed: cython.longlong = when - self.pace[v].clock
        ran: cython.longlong
        halted: cython.longlong
        if i == NONE:
            self._pass(v, passed, 0, 0)
            return
        if self.pace[v].lead < 0:
            self.pace[v].lead = self.todo[i].lead
            self.pace[v].guest = self.todo[i].guest
            self.pace[v].idle = self.todo[i].idle
        ran = min(passed, self.pace[v].guest)
        halted = min(passed - ran, self.pace[v].idle)
        self._pass(v, passed, ran, halted)
        self.pace[v].lead -= passed
        self.pace[v].guest -= ran
        self.pace[v].idle -= halted
