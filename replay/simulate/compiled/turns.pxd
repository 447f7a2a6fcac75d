# SPDX-License-Identifier: Apache-2.0
from replay.simulate.compiled.structures cimport Turn
from replay.simulate.compiled.timed_queues cimport TimedQueues


cdef class Turns(TimedQueues):
    cdef Turn *turn
    cdef long long leaves
    cdef bint moved

    cdef bint _lacks(self, long long v) noexcept nogil
    cdef long long _due(self, long long q) noexcept nogil
    cdef long long _leaf(self, long long q) noexcept nogil
    cdef void _place(self, long long q) noexcept nogil
    cdef void _place_all(self) noexcept nogil
    cdef void _win(self, long long node) noexcept nogil
    cdef long long _bound(self, long long q, long long until) noexcept nogil
