# SPDX-License-Identifier: Apache-2.0
cimport cython

from analysis.passes.acting_threads cimport ActingThreads
from analysis.passes.last_mappings cimport LastMappings
from analysis.passes.removal_totals cimport RemovalTotals


@cython.final
cdef class Removals:
    cdef public RemovalTotals totals
    cdef ActingThreads _threads
    cdef LastMappings _pages
    cdef unsigned char[::1] _counted
    cdef unsigned char[::1] _context
    cdef long long[::1] _marked
    cdef unsigned char[::1] _slot_flags
    cdef bint _shows
    cdef unsigned long long _spte
    cdef int _type
    cdef int _fixed
    cdef unsigned long long _there
    cdef unsigned long long _odd
    cdef unsigned long long _accessed
    cdef unsigned char[::1] _meaning
    cdef unsigned char[::1] _ioctls

    cdef Py_ssize_t _feed(
        self,
        Py_ssize_t start,
        const long long[::1] time,
        const short[::1] vcpu,
        const int[::1] tid,
        const unsigned char[::1] kind,
        const int[::1] root,
        const unsigned int[::1] role,
        const signed char[::1] level,
        const signed char[::1] as_id,
        const long long[::1] gfn,
        const unsigned long long[::1] old,
        const unsigned long long[::1] new,
        const unsigned long long[::1] addr,
        const unsigned long long[::1] code,
        const int[::1] ret,
        const int[::1] refs,
        const int[::1] slot,
        const unsigned char[::1] flags,
    ) noexcept nogil
    cdef bint _maps(self, unsigned long long spte) noexcept nogil
