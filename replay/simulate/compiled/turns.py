# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Find whose turn it is in virtual time, with a winner tree over the
queues of programs, of the wall clock, and of the VM.
"""

from __future__ import annotations

import cython

from replay.simulate.compiled.timed_queues import TimedQueues

NONE = cython.declare(cython.longlong, -1)  # stands for no operation
NEVER = cython.declare(cython.longlong, 0x4000000000000000)


@cython.cclass
class Turns(TimedQueues):
    """The winner tree over the queues."""

    turn: cython.pointer[Turn]
    leaves: cython.longlong  # number of leaves of the winner tree
    moved: cython.bint  # clocks of other vCPUs than the one whose turn it was have changed

    def attach_turns(self, turn: cython.uchar[::1], leaves: cython.longlong) -> None:
        """Use this pool for the winner tree.

        It has two rows for each of `leaves`, a power of two; leaves that belong to no queue are due NEVER.
        """
        self.leaves = leaves
        if cython.compiled:
            self.turn = cython.cast(cython.pointer[Turn], cython.address(turn[0]))
        else:
            self.turn = turn

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _lacks(self, v: cython.longlong) -> cython.bint:
        """Return whether it is not known yet what this vCPU does next."""
        return self.queue[v].head == NONE or (self.pace[v].inside != 0 and self.queue[self.core.vcpus + v].head == NONE)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _due(self, q: cython.longlong) -> cython.longlong:
        """Return when the first operation of a queue is due; NEVER if it has none or must wait."""
        vcpus: cython.longlong = self.core.vcpus
        i: cython.longlong = self.queue[q].head
        v: cython.longlong = q - vcpus if q >= vcpus else q
        when: cython.longlong = NEVER
        if i == NONE or (q < vcpus and self.pace[v].inside):
            return NEVER
        if q < vcpus:
            when = self.pace[v].clock + (self.todo[i].lead if self.pace[v].lead < 0 else self.pace[v].lead)
        elif q == 2 * vcpus:
            when = max(self.todo[i].wall, 0)
        elif self.todo[i].wall < 0:
            when = self.pace[v].clock + self.todo[i].lead
        else:
            when = max(self.todo[i].wall, self.pace[v].clock)
        return when

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _leaf(self, q: cython.longlong) -> cython.longlong:
        """Return a queue's leaf in the winner tree: leftmost is the VM's queue,
        then the wall clock's queues, then the programs.
        """
        vcpus: cython.longlong = self.core.vcpus
        return self.leaves + (0 if q == 2 * vcpus else q - vcpus + 1 if q >= vcpus else q + vcpus + 1)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _place(self, q: cython.longlong) -> cython.void:
        """Update a queue's leaf with the time at which the queue is due now, and the winners above it."""
        node: cython.longlong = self._leaf(q)
        due: cython.longlong = self._due(q)
        if self.turn[node].due != due:
            self.turn[node].due = due
            while node > 1:
                node >>= 1
                self._win(node)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _place_all(self) -> cython.void:
        q: cython.longlong
        node: cython.longlong
        for q in range(2 * self.core.vcpus + 1):
            node = self._leaf(q)
            self.turn[node].due = self._due(q)
            self.turn[node].queue = q
        for node in range(self.leaves - 1, 0, -1):
            self._win(node)
        self.moved = False

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _win(self, node: cython.longlong) -> cython.void:
        """Set a node to the winner of its two children; if both are due at the same time, the left one wins."""
        best: cython.longlong = 2 * node
        if self.turn[best + 1].due < self.turn[best].due:
            best += 1
        self.turn[node].due = self.turn[best].due
        self.turn[node].queue = self.turn[best].queue

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _bound(self, q: cython.longlong, until: cython.longlong) -> cython.longlong:
        """Return the time up to which the queue whose turn it is may run before another queue is due first."""
        bound: cython.longlong = until
        node: cython.longlong = self._leaf(q)
        while node > 1:
            bound = min(bound, self.turn[node - 1].due) if node & 1 else min(bound, self.turn[node + 1].due + 1)
            node >>= 1
        return bound
