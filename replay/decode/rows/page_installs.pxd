# SPDX-License-Identifier: Apache-2.0
from replay.decode.rows.vm_events cimport VmEvents
from replay.decode.rows.structures cimport Vcpu


cdef class PageInstalls(VmEvents):
    cdef public long long inferred
    cdef public long long hidden
    cdef object _unseen
    cdef bint _groups
    cdef bint _shadow
    cdef bint _infers

    cdef void _leaf(self, Py_ssize_t v, bint mmio, long long level, long long gfn, long long root, long long table) noexcept nogil
    cdef unsigned int _group(self, long long space, long long gfn) noexcept nogil
    cdef void _repaired(self, Py_ssize_t v, unsigned long long addr, bint huge) noexcept nogil
    cdef void _splits(self, Py_ssize_t v, long long gfn, long long level) noexcept nogil
    cdef void _infer(self, Py_ssize_t v, long long root, long long gfn, long long level, long long space, long long table, bint asks) noexcept nogil
    cdef void _forget(self, long long root) noexcept nogil
