# SPDX-License-Identifier: Apache-2.0
cimport cython

from traces.imports.line_rows cimport LineRows
from traces.imports.line_text cimport find_byte


@cython.final
cdef class Scanner(LineRows):
    cdef public long long odd
    cdef public bytes first_odd
    cdef public long long lines
    cdef public long long joined
    cdef Py_ssize_t _room
    cdef const unsigned char[::1] _data
    cdef unsigned char[::1] _scratch
    cdef bint _in_scratch
    cdef Py_ssize_t _held
    cdef Py_ssize_t _held_at
    cdef int _parts
    cdef int _held_what
    cdef bint _goes_on_held
    cdef Py_ssize_t _held_used

    cdef int _take_line(self, Py_ssize_t begin, Py_ssize_t end) except -1 nogil
    cdef int _read(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef void _hold(self, Py_ssize_t begin, Py_ssize_t end, int what) noexcept nogil
    cdef void _keep(self) noexcept nogil
    cdef Py_ssize_t _append(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef bint _with_task(self, Py_ssize_t begin, Py_ssize_t end) except -1 nogil
    cdef int _read_data(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef int _read_scratch(self, Py_ssize_t length) noexcept nogil
    cdef int _absorb(self, Py_ssize_t length) except -1 nogil
    cdef int _became(self, Py_ssize_t length) except -1 nogil
    cdef bint _join(self, Py_ssize_t begin, Py_ssize_t end) except -1 nogil
    cdef int _count_odd(self, Py_ssize_t begin, Py_ssize_t end) except -1 nogil
