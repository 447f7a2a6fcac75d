# SPDX-License-Identifier: Apache-2.0
cimport cython

from analysis.passes.removal_totals cimport RemovalTotals


@cython.final
cdef class LastMappings:
    cdef long long beyond
    cdef Py_ssize_t held
    cdef unsigned char[::1] fixing
    cdef RemovalTotals _totals
    cdef unsigned char[::1] _lost
    cdef unsigned int[::1] _words
    cdef long long _newest
    cdef long long _invalid
    cdef int _invalid_by
    cdef long long[::1] _keys
    cdef long long[::1] _values
    cdef unsigned int[::1] _own
    cdef Py_ssize_t _own_count
    cdef unsigned int _smm

    cdef Py_ssize_t _room(self) noexcept nogil
    cdef void _name(self, long long root, unsigned int word) noexcept nogil
    cdef void _lose(self, long long root, Py_ssize_t by) noexcept nogil
    cdef void _invalidate(self, Py_ssize_t by) noexcept nogil
    cdef Py_ssize_t _cause(self, long long root) noexcept nogil
    cdef void _change(self, long long root, int as_id, long long level, long long gfn, long long by, bint goes) noexcept nogil
    cdef void _split(self, int as_id, long long level, long long gfn) noexcept nogil
    cdef void _map(self, long long root, long long level, long long gfn, int v) noexcept nogil
    cdef bint _mapped(self, long long root, long long level, long long gfn) noexcept nogil
    cdef bint _mend(self, int v) noexcept nogil
    cdef void _split_in_place(self, int v) noexcept nogil
    cdef void _lacks_permission(self, int v, long long root, long long gfn) noexcept nogil
    cdef void _put(self, long long key, long long root, long long protect, long long removed) noexcept nogil
    cdef long long _key(self, unsigned int word, long long level, long long gfn) noexcept nogil
    cdef Py_ssize_t _place(self, long long key) noexcept nogil
