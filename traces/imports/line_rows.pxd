# SPDX-License-Identifier: Apache-2.0
from traces.imports.event_text cimport EventText


cdef class LineRows(EventText):
    cdef public object columns
    cdef public Py_ssize_t rows
    cdef public list threads
    cdef public object thread_facts
    cdef public list texts
    cdef public list other_names
    cdef public object other_counts
    cdef public object forms
    cdef public long long raw
    cdef public long long bare
    cdef public long long backwards
    cdef public long long ticks
    cdef public long long relative
    cdef public long long lost
    cdef public long long uncounted
    cdef public object by_vendor
    cdef unsigned long long[::1] _time
    cdef unsigned long long[::1] _w0
    cdef unsigned long long[::1] _w1
    cdef unsigned long long[::1] _w2
    cdef unsigned long long[::1] _w3
    cdef unsigned int[::1] _tid
    cdef unsigned int[::1] _tgid
    cdef unsigned int[::1] _role
    cdef unsigned int[::1] _n
    cdef unsigned short[::1] _cpu
    cdef unsigned short[::1] _vcpu
    cdef unsigned char[::1] _kind
    cdef unsigned char[::1] _level
    cdef unsigned char[::1] _flags
    cdef unsigned char[::1] _as_id
    cdef long long[::1] _form_count
    cdef long long[::1] _vendor_count
    cdef long long[::1] _thread_slot
    cdef long long[::1] _thread_tid
    cdef long long[:, ::1] _fact
    cdef long long[::1] _other_hash
    cdef long long[::1] _other
    cdef unsigned long long[::1] _seen_on
    cdef unsigned long long _now
    cdef long long _last_emitted
    cdef Py_ssize_t _known_threads

    cdef int _emit(self) except -1 nogil
    cdef long long _thread(self) except -2 nogil
    cdef int _count_other(self) except -1 nogil
    cdef int _loss(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
