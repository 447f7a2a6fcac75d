# SPDX-License-Identifier: Apache-2.0
from replay.decode.rows.held_inputs cimport HeldInputs
from replay.decode.rows.structures cimport Vcpu


cdef class ExitRecords(HeldInputs):
    cdef long long _newest_root

    cdef void _spend(self, Py_ssize_t v, int means, int state, long long ns, int mark, long long root) noexcept nogil
    cdef void _close(self, Py_ssize_t v) noexcept nogil
