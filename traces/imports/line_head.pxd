# SPDX-License-Identifier: Apache-2.0
from traces.imports.line_text cimport LineText, find_byte


cdef class LineHead(LineText):
    cdef unsigned long long _l_time
    cdef long long _l_tid
    cdef long long _l_tgid
    cdef long long _l_cpu
    cdef Py_ssize_t _l_comm
    cdef Py_ssize_t _l_comm_end
    cdef int _l_how

    cdef Py_ssize_t _find_time(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef bint _after_cpu(self, Py_ssize_t begin, Py_ssize_t at) noexcept nogil
    cdef void _task(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef bint _are_flags(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef Py_ssize_t _microseconds(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef Py_ssize_t _comment(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef Py_ssize_t _relative(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef Py_ssize_t _bare(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef bint _starts(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef int _heading(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
