# SPDX-License-Identifier: Apache-2.0
from replay.simulate.compiled.root_slots cimport RootSlots


cdef class VmOperations(RootSlots):
    cdef void _touch(self, long long v, long long g, long long level, long long first, long long last, long long resets) noexcept nogil
    cdef void _fix(self, long long v, long long g, long long level, long long resets) noexcept nogil
    cdef void _reset(self, long long v, long long g, long long level) noexcept nogil
    cdef void _enter(self, long long v) noexcept nogil
    cdef void _unload(self, long long v, long long cause) noexcept nogil
    cdef void _switch(self, long long v, long long w) noexcept nogil
    cdef void _invalidate(self) noexcept nogil
    cdef void _zap(self, long long as_id, long long start, long long end) noexcept nogil
    cdef void _zap_all(self) noexcept nogil
    cdef bint _split(self, long long as_id, long long start, long long end) noexcept nogil
    cdef void _collapse(self, long long as_id, long long level, long long g, long long for_good) noexcept nogil
    cdef void _end(self) noexcept nogil
