# SPDX-License-Identifier: Apache-2.0
cimport cython

from analysis.passes.removal_totals cimport RemovalTotals


@cython.final
cdef class ActingThreads:
    cdef bint ended
    cdef long long[::1] at
    cdef unsigned char[::1] did
    cdef long long[::1] zaps
    cdef RemovalTotals _totals
    cdef long long[::1] _tid
    cdef Py_ssize_t _threads
    cdef long long[::1] _since
    cdef long long[::1] _done
    cdef long long[::1] _nx

    cdef Py_ssize_t _place(self, long long tid) noexcept nogil
    cdef bint _recovers(self, long long tid) noexcept nogil
    cdef int _unknown(self) noexcept nogil
    cdef void _begin(self, Py_ssize_t t, int why, long long tid, long long time) noexcept nogil
    cdef void _may_change(self, Py_ssize_t t, int why, long long time) noexcept nogil
    cdef void _goes_on(self, Py_ssize_t t, Py_ssize_t at, long long time) noexcept nogil
    cdef Py_ssize_t _row(self, Py_ssize_t t) noexcept nogil
    cdef Py_ssize_t _acts(self, Py_ssize_t t, long long tid, long long time) noexcept nogil
