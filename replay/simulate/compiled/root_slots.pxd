# SPDX-License-Identifier: Apache-2.0
from replay.simulate.compiled.trees cimport Trees


cdef class RootSlots(Trees):
    cdef void _search(self, long long v, long long w) noexcept nogil
    cdef void _load(self, long long v) noexcept nogil
    cdef void _empty(self, long long v, long long cause, bint only_invalid) noexcept nogil
    cdef void _put(self, long long r, long long cause, long long v) noexcept nogil
    cdef void _invalidate_root(self, long long r, long long cause) noexcept nogil
    cdef void _free(self, long long r, long long cause, long long v) noexcept nogil
    cdef void _forget(self) noexcept nogil
    cdef long long _tables_alive(self) noexcept nogil
    cdef void _note(self, long long event, long long r, long long cause, long long v, long long leaves, long long tables) noexcept nogil
    cdef void _refresh(self, long long v) noexcept nogil
