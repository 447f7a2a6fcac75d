# SPDX-License-Identifier: Apache-2.0
from replay.simulate.compiled.structures cimport Root, Row, Slots, Vcpu, Word, Zapped


cdef class VmPools:
    cdef unsigned long long *bits
    cdef long long *gen
    cdef unsigned int *child
    cdef unsigned int *page_of
    cdef Vcpu *vcpu
    cdef Slots *slots
    cdef Word *word
    cdef Root *root
    cdef Row *log
    cdef long long *ranges
    cdef public long long page_room
    cdef public long long node_room
    cdef public long long log_room
    cdef public long long pages
    cdef public long long nodes
    cdef public long long rows
    cdef public long long vcpus
    cdef public long long words
    cdef public long long own_reference
    cdef public long long empties
    cdef public long long reloads
    cdef public long long flush_per_table
    cdef public long long zap_tables
    cdef public long long split_in_place
    cdef public long long recovers
    cdef public long long prefetch
    cdef public long long assume_refault
    cdef public long long logging
    cdef public long long at
    cdef public long long last_gen
    cdef public long long ids
    cdef public long long alive
    cdef public long long free_root
    cdef public long long frees
    cdef public long long prefetched
    cdef public long long tables
    cdef public long long tables_freed
    cdef public long long zapped
    cdef public long long flushes
    cdef public long long error
    cdef public long long error_root
    cdef public long long error_tables
    cdef long long gone_leaves
    cdef long long gone_tables
    cdef public long long assumed_leaves
    cdef public long long assumed_tables
    cdef Zapped *put
    cdef public long long put_room
    cdef public long long puts

    cdef bint _room(self) noexcept nogil
