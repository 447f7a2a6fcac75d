# SPDX-License-Identifier: Apache-2.0
from replay.decode.rows.unload_triggers cimport UnloadTriggers


cdef class VmEvents(UnloadTriggers):
    cdef object _slots
    cdef set _collapsing
    cdef set _invalidating
    cdef set _zapping
    cdef dict _deleting
    cdef bint _collapses
    cdef bint _deletes
    cdef bint _slot_zap
    cdef bint _recovers
    cdef unsigned long long _spte_present
    cdef long long _slots_since
    cdef long long _slots_until
    cdef Py_ssize_t _slot_count
    cdef Py_ssize_t _most_slots
    cdef const long long[::1] _slot_key
    cdef const long long[::1] _slot_gfn
    cdef const long long[::1] _slot_pages
    cdef const unsigned long long[::1] _slot_hva
    cdef const long long[::1] _slot_space

    cdef bint _is_empty(self, int tid, bint all_roots) noexcept nogil
    cdef void _change_slot(self, int tid, int slot, int space) noexcept nogil
    cdef void _end_slot(self, int tid, bint zaps) noexcept nogil
    cdef void _zaps_root(self, int tid, bint begins) noexcept nogil
    cdef void _end_collapse(self, int tid) noexcept nogil
    cdef void _collapse(self, Py_ssize_t v, int tid, int level, int space, long long gfn, unsigned long long old, unsigned long long new) noexcept nogil
    cdef void _look_up_slots(self) noexcept nogil
    cdef void _unmap(self, unsigned long long start, unsigned long long end) noexcept nogil
