# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=True, wraparound=False, cdivision=True, initializedcheck=False
"""Records as perf and trace-cmd keep them: the numbers in their bytes, and the table of where records were found.

What is read comes from files of others: whoever reads checks each number that says where the next one begins against
the end of the data, and all accesses are checked besides. Cython in pure-Python mode.
"""

from __future__ import annotations

import cython

# Columns of the table of found records; a gap has its number of lost events in place of a size, and -1 as its place.
AT, SIZE, WHEN, THREAD, PROCESS, ON = range(6)


@cython.ccall
def u16(data: cython.const[cython.uchar][::1], at: cython.Py_ssize_t) -> cython.uint:
    return data[at] | cython.cast(cython.uint, data[at + 1]) << 8


@cython.ccall
def u32(data: cython.const[cython.uchar][::1], at: cython.Py_ssize_t) -> cython.ulonglong:
    return u16(data, at) | cython.cast(cython.ulonglong, u16(data, at + 2)) << 16


@cython.ccall
def u64(data: cython.const[cython.uchar][::1], at: cython.Py_ssize_t) -> cython.ulonglong:
    return u32(data, at) | u32(data, at + 4) << 32
