# SPDX-License-Identifier: Apache-2.0
from libc.string cimport memchr, strlen


cdef inline Py_ssize_t find_byte(
    const unsigned char[::1] text, unsigned char byte, Py_ssize_t begin, Py_ssize_t end
) noexcept nogil:
    """Where the byte stands first; `end` where it does not."""
    if begin >= end:
        return end
    cdef const unsigned char* found = <const unsigned char*>memchr(&text[begin], byte, end - begin)
    return end if found is NULL else found - &text[0]


cdef class LineText:
    cdef const unsigned char[::1] _text
    cdef const unsigned char[::1] _blob
    cdef const unsigned char[::1] _of_name
    cdef const long long[:, ::1] _event_table
    cdef const long long[:, ::1] _exit_table
    cdef unsigned long long _digits_value

    cdef long long _number(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef bint _prefixed(self, Py_ssize_t begin, Py_ssize_t end, const char* prefix) noexcept nogil
    cdef unsigned long long _hash(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef long long _find(self, const long long[:, ::1] table, Py_ssize_t slots, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef int _digits(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef unsigned long long _hexadecimal(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
    cdef unsigned long long _wide(self, Py_ssize_t begin, Py_ssize_t end) noexcept nogil
