# SPDX-License-Identifier: Apache-2.0
cimport cython

from replay.simulate.compiled.structures cimport Vcpu, Word
from replay.simulate.compiled.vm_operations cimport VmOperations


@cython.final
cdef class Core(VmOperations):
    cdef long long _run(self, const unsigned int *op, const long long *gfn, long long n, long long i, long long first) noexcept nogil
    cdef void _tell(self, long long v, long long[:, ::1] changes, long long i, long long sign) noexcept
    cdef bint _do(self, long long o, long long g) noexcept nogil
