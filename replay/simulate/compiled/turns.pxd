# SPDX-License-Identifier: Apache-2.0
from replay.simulate.compiled.core cimport Core
from replay.simulate.compiled.structures cimport Pace, Queue, Todo, Turn


cdef class Turns:
    cdef Core core
    cdef Todo *todo
    cdef Queue *queue
    cdef Turn *turn
    cdef Pace *pace
    cdef public long long leaves
    cdef bint moved

    cdef bint _lacks(self, long long v) noexcept nogil
    cdef long long _due(self, long long q) noexcept nogil
    cdef long long _leaf(self, long long q) noexcept nogil
    cdef void _place(self, long long q) noexcept nogil
    cdef void _place_all(self) noexcept nogil
    cdef void _win(self, long long node) noexcept nogil
    cdef long long _bound(self, long long q, long long until) noexcept nogil
