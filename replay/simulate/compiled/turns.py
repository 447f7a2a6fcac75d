# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Whose turn it is in virtual time: a winner tree over the queues of programs, of the wall clock, and of the VM."""

from __future__ import annotations

import cython

from replay.simulate.compiled.core import Core

NONE = cython.declare(cython.longlong, -1)  # no generation, no vCPU
NEVER = cython.declare(cython.longlong, 0x4000000000000000)


@cython.cclass
class Turns:
    """The queues, each vCPU's clock, and what is due first."""

    core: Core
    todo: cython.pointer[Todo]
    queue: cython.pointer[Queue]
    turn: cython.pointer[Turn]
    pace: cython.pointer[Pace]
    leaves: cython.longlong  # of the winner tree
    moved: cython.bint  # other vCPUs than the one whose turn it was

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _lacks(self, v: cython.longlong) -> cython.bint:
        """What this vCPU does next is not known yet."""
        return self.queue[v].head == NONE or (self.pace[v].inside != 0 and self.queue[self.core.vcpus + v].head == NONE)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _due(self, q: cython.longlong) -> cython.longlong:
        """When the first of a queue is due."""
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
        """The VM's is the leftmost, then the wall clock's, then programs'."""
        vcpus: cython.longlong = self.core.vcpus
        return self.leaves + (0 if q == 2 * vcpus else q - vcpus + 1 if q >= vcpus else q + vcpus + 1)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _place(self, q: cython.longlong) -> cython.void:
        """Put a queue where it is due now."""
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
        """Of what is due at once the left one goes first."""
        best: cython.longlong = 2 * node
        if self.turn[best + 1].due < self.turn[best].due:
            best += 1
        self.turn[node].due = self.turn[best].due
        self.turn[node].queue = self.turn[best].queue

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _bound(self, q: cython.longlong, until: cython.longlong) -> cython.longlong:
        """Up to where the queue that goes first may run: then it is another one's turn."""
        bound: cython.longlong = until
        node: cython.longlong = self._leaf(q)
        while node > 1:
            bound = min(bound, self.turn[node - 1].due) if node & 1 else min(bound, self.turn[node + 1].due + 1)
            node >>= 1
        return bound
