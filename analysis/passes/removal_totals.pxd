# SPDX-License-Identifier: Apache-2.0
cimport cython


@cython.final
cdef class RemovalTotals:
    cdef public object table
    cdef public int count
    cdef long long[:, ::1] _cells
    cdef unsigned char[::1] _places

    cdef Py_ssize_t _room(self) noexcept nogil
    cdef int _find(self, int why, long long tid) noexcept nogil
    cdef int _begin(self, int why, long long tid, long long time) noexcept nogil
    cdef void _extend(self, Py_ssize_t at, long long more, long long length, long long time) noexcept nogil
    cdef void _count(self, Py_ssize_t at, Py_ssize_t field) noexcept nogil
    cdef void _count_page(self, Py_ssize_t at, Py_ssize_t field, long long gfn) noexcept nogil
