# SPDX-License-Identifier: Apache-2.0
from replay.decode.rows.root_loads cimport RootLoads
from replay.decode.rows.structures cimport Vcpu


cdef class UnloadTriggers(RootLoads):
    cdef public long long by_guest
    cdef public long long by_clock
    cdef unsigned char[::1] _meaning
    cdef bint _valued
    cdef bint _msr_valued
    cdef long long _invalidated

    cdef void _exits(self, Py_ssize_t v, unsigned long long code, unsigned long long value) noexcept nogil
    cdef long long _asked(self, long long ioctl) noexcept nogil
    cdef void _writes(self, Py_ssize_t v, unsigned long long register, long long value) noexcept nogil
    cdef void _writes_efer(self, Py_ssize_t v, long long value) noexcept nogil
    cdef void _not_seen(self, Py_ssize_t v) noexcept nogil
    cdef void _silent(self, Py_ssize_t v, long long trigger) noexcept nogil
    cdef void _moves(self, Py_ssize_t v, bint entering) noexcept nogil
    cdef void _resets(self, Py_ssize_t v, bint unload, bint in_smm) noexcept nogil
    cdef long long _cause(self, long long why, bint in_smm) noexcept nogil
