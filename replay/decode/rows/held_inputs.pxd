# SPDX-License-Identifier: Apache-2.0
from replay.decode.rows.structures cimport Vcpu


cdef class HeldInputs:
    cdef public object vcpus
    cdef public object counts
    cdef public long long inputs
    cdef public long long records
    cdef public long long ranges
    cdef long long _room
    cdef unsigned int[::1] _op
    cdef long long[::1] _gfn
    cdef long long[::1] _time
    cdef long long[::1] _seq
    cdef int[::1] _exit
    cdef long long[::1] _start
    cdef long long[::1] _end
    cdef long long[::1] _lead
    cdef long long[::1] _guest
    cdef long long[::1] _idle
    cdef long long[::1] _fault
    cdef long long[::1] _load
    cdef long long[::1] _unload
    cdef unsigned char[::1] _tables
    cdef unsigned int[::1] _has
    cdef unsigned char[::1] _flags
    cdef Vcpu *_vcpu
    cdef Py_ssize_t _count_vcpus
    cdef long long[::1] _count
    cdef unsigned char[::1] _unloads
    cdef long long _now
    cdef long long _at
    cdef bint _timed

    cdef void _put(self, unsigned int op, long long gfn) noexcept nogil
    cdef void _put_of(self, Py_ssize_t v, unsigned int op, long long gfn, long long has) noexcept nogil
    cdef void _put_range(self, unsigned int op, long long space, long long start, long long end) noexcept nogil
    cdef void _pull(self, Py_ssize_t v, long long trigger, long long state) noexcept nogil
