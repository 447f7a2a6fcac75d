# SPDX-License-Identifier: Apache-2.0
from replay.simulate.compiled.vm_pools cimport VmPools


cdef class Trees(VmPools):
    cdef long long _below(self, long long w, long long node, long long level, long long at) noexcept nogil
    cdef long long _leaf(self, long long w, long long g) noexcept nogil
    cdef void _fault(self, long long v, long long g, long long level, long long first, long long last) noexcept nogil
    cdef long long _descend(self, long long w, long long g, long long goal) noexcept nogil
    cdef long long _table(self, long long w, long long node, long long level, long long at) noexcept nogil
    cdef long long _split_leaf(self, long long w, long long node, long long level, long long at) noexcept nogil
    cdef long long _clear(self, long long page, long long first, long long last) noexcept nogil
    cdef void _drop(self, long long w, long long c, long long level) noexcept nogil
    cdef void _account(self, long long w) noexcept nogil
    cdef void _zap_tree(self, long long w) noexcept nogil
    cdef void _raze(self, long long w) noexcept nogil
    cdef void _zap_range(self, long long w, long long node, long long level, long long base, long long start, long long end) noexcept nogil
    cdef bint _split_range(self, long long w, long long node, long long level, long long base, long long start, long long end) noexcept nogil
