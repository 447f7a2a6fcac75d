# SPDX-License-Identifier: Apache-2.0
cimport cython

from replay.decode.rows.page_installs cimport PageInstalls
from replay.decode.rows.structures cimport Vcpu


@cython.final
cdef class Decoder(PageInstalls):
    cdef public bint ended
    cdef const unsigned char[::1] _means
    cdef bint _zap_leafs_once
    cdef bint _one_function
    cdef long long _fixed
    cdef unsigned long long _present
