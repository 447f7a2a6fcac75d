# SPDX-License-Identifier: Apache-2.0
cpdef unsigned int u16(const unsigned char[::1] data, Py_ssize_t at) except? -1
cpdef unsigned long long u32(const unsigned char[::1] data, Py_ssize_t at) except? -1
cpdef unsigned long long u64(const unsigned char[::1] data, Py_ssize_t at) except? -1
