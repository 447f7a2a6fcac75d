# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Numbers for the values of a batch: which are equal, in the order in which they come.

Cython in pure-Python mode, as all compiled modules.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

COMPILED: bool = cython.compiled

_SPREAD = cython.declare(cython.ulonglong, 0x9E3779B97F4A7C15)  # 2^64 by the golden ratio
_MASK64 = cython.declare(cython.ulonglong, 0xFFFFFFFFFFFFFFFF)


def numbered(values: cython.const[cython.ulonglong][::1]) -> tuple[Any, Any]:
    """Codes 0, 1, ... of the values in order of first appearance, and the row in which each is first."""
    n: cython.Py_ssize_t = len(values)
    i: cython.Py_ssize_t
    at: cython.Py_ssize_t
    found: cython.int = 0
    code: cython.int = -1
    bits: cython.int = 4
    value: cython.ulonglong
    last: cython.ulonglong = 0
    while n > 1 << (bits - 1):
        bits += 1
    mask: cython.Py_ssize_t = (1 << bits) - 1
    coded, began = np.empty(n, np.int64), np.empty(n, np.int64)
    codes: cython.longlong[::1] = coded
    firsts: cython.longlong[::1] = began
    slots: cython.int[::1] = np.zeros(1 << bits, np.int32)  # codes + 1
    if not cython.compiled:
        values = memoryview(values)
    with cython.nogil:
        for i in range(n):
            value = values[i]
            if code < 0 or value != last:
                at = cython.cast(cython.Py_ssize_t, ((value * _SPREAD) & _MASK64) >> (64 - bits))
                while slots[at] != 0 and values[firsts[slots[at] - 1]] != value:
                    at = (at + 1) & mask
                if slots[at] == 0:
                    firsts[found] = i
                    found += 1
                    slots[at] = found
                code = slots[at] - 1
                last = value
            codes[i] = code
    return coded, began[:found]
