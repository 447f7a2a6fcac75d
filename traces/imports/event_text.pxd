# SPDX-License-Identifier: Apache-2.0
from traces.imports.line_text cimport strlen
from traces.imports.named_fields cimport NamedFields


cdef class EventText(NamedFields):
    cdef const long long[:, ::1] _ops
    cdef const long long[:, ::1] _names
    cdef const long long[:, ::1] _form
    cdef const long long[:, ::1] _events
    cdef long long[::1] _last_form
    cdef long long _l_kind
    cdef long long _l_form
    cdef Py_ssize_t _l_name
    cdef Py_ssize_t _l_name_end
    cdef unsigned long long _pferr
    cdef bint _cut
    cdef public long long cut

    cdef int _event(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef int _matched(self, long long event, long long form) noexcept nogil
    cdef bint _matches(self, long long form, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef bint _is_cut(self, long long form, Py_ssize_t op, Py_ssize_t begin, Py_ssize_t at, Py_ssize_t end) noexcept nogil
    cdef bint _goes_on(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef bint _is_name(self, Py_ssize_t offset, Py_ssize_t length, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef bint _ends(self, Py_ssize_t begin, Py_ssize_t end, const char* tail) noexcept nogil
    cdef Py_ssize_t _fault_bits(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
