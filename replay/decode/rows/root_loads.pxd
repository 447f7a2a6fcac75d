# SPDX-License-Identifier: Apache-2.0
from replay.decode.rows.exit_records cimport ExitRecords
from replay.decode.rows.structures cimport Vcpu


cdef class RootLoads(ExitRecords):
    cdef public long long nested
    cdef public long long began
    cdef unsigned int[::1] _roles
    cdef int _loads_by
    cdef bint _open_resets
    cdef long long _invalidations
    cdef bint _guest_bits
    cdef long long _wp
    cdef long long _nx

    cdef void _load_root(self, Py_ssize_t v, long long root, unsigned int role) noexcept nogil
    cdef void _arrive(self, Py_ssize_t v, long long state) noexcept nogil
    cdef void _switches(self, Py_ssize_t v, unsigned int role) noexcept nogil
    cdef void _enters(self, Py_ssize_t v, long long root, unsigned int role) noexcept nogil
    cdef void _name(self, long long root, unsigned int role) noexcept nogil
    cdef unsigned int _role_of(self, long long root) noexcept nogil
    cdef bint _shadows(self, unsigned int role) noexcept nogil
    cdef long long _state(self, unsigned int word) noexcept nogil
    cdef long long _with_registers(self, Py_ssize_t v, long long state) noexcept nogil
