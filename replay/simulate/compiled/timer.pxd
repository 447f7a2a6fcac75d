# SPDX-License-Identifier: Apache-2.0
cimport cython

from replay.simulate.compiled.vcpu_programs cimport VcpuPrograms


@cython.final
cdef class Timer(VcpuPrograms):
    cdef bint _run(self, long long until, bint final) noexcept nogil
    cdef bint _event(self, long long q, long long when) noexcept nogil
    cdef void _interrupt(self, long long v, long long when) noexcept nogil
