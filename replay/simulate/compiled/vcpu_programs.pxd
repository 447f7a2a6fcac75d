# SPDX-License-Identifier: Apache-2.0
from replay.simulate.compiled.structures cimport Pace, Sample, Todo, Vcpu, Word, Zapped
from replay.simulate.compiled.turns cimport Turns


cdef class VcpuPrograms(Turns):
    cdef Sample *sample
    cdef public long long sample_room
    cdef public long long samples
    cdef public long long switch
    cdef public long long fault
    cdef public long long table
    cdef public long long found
    cdef public long long created
    cdef public long long unload
    cdef public long long zap_leaf
    cdef public long long zap_table
    cdef public long long job
    cdef public long long chunk
    cdef public long long refill
    cdef public long long cpus
    cdef public long long hold
    cdef public long long prefetch
    cdef public long long faults_share
    cdef public long long loads_share
    cdef public long long inline
    cdef public long long by_worker
    cdef public long long weights
    cdef public long long begun
    cdef public long long worker
    cdef public long long locked
    cdef public long long shared
    cdef public long long worked
    cdef public long long jobs

    cdef bint _program(self, long long v, long long bound) noexcept nogil
    cdef void _guess(self, long long v, long long i) noexcept nogil
    cdef bint _step(self, long long v, long long i, long long guest) noexcept nogil
    cdef void _wait(self, long long v, bint exclusive) noexcept nogil
    cdef void _take(self, long long v, bint exclusive, long long since) noexcept nogil
    cdef void _queue_zap(self, long long now, long long work) noexcept nogil
    cdef void _pass(self, long long v, long long lead, long long guest, long long idle) noexcept nogil
    cdef void _switch(self, long long v, long long was, long long guest) noexcept nogil
    cdef void _spend(self, long long v, long long on, long long ns) noexcept nogil
    cdef void _pop(self, long long q, long long i) noexcept nogil
    cdef void _sample(self, long long v) noexcept nogil
