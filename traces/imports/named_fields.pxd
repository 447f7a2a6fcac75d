# SPDX-License-Identifier: Apache-2.0
from traces.imports.line_head cimport LineHead


cdef class NamedFields(LineHead):
    cdef const long long[:, ::1] _field_table
    cdef const long long[:, ::1] _field_targets
    cdef unsigned long long[::1] _out
    cdef Py_ssize_t _l_end
    cdef bint _in_decimal

    cdef void _clear(self) noexcept nogil
    cdef void _put(self, long long to, long long shift, long long mask, unsigned long long value) noexcept nogil
    cdef bint _fields(self, long long event, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef long long _field(self, long long event, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
