# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Convert a batch's columns to the numbers that decoding uses: kinds to their codes, vCPU ids to dense numbers.

This is Cython in pure-Python mode, like `timeline`.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

COMPILED: bool = cython.compiled


def kinds_of(places: cython.const[cython.int][::1], codes: cython.const[cython.uchar][::1]) -> Any:
    """Return the code of each row's kind.

    `places` are indices into the column's dictionary, and `codes` its kinds' codes.
    """
    i: cython.Py_ssize_t
    found = np.empty(len(places), np.uint8)
    out: cython.uchar[::1] = found
    with cython.nogil:
        for i in range(places.shape[0]):
            out[i] = codes[places[i]]
    return found


def vcpus_of(
    ids: cython.const[cython.short][::1],
    valid: cython.const[cython.uchar][::1],
    first: cython.Py_ssize_t,
    numbers: cython.const[cython.int][::1],
) -> Any:
    """Return the dense number of each row's vCPU, or -1 if it has none.

    `valid` is Arrow's validity bitmap, in which the first row's bit is number `first`; it is empty if all rows are
    valid. `numbers` has the dense number of each id.
    """
    i: cython.Py_ssize_t
    at: cython.Py_ssize_t
    every: cython.bint = valid.shape[0] == 0
    found = np.empty(len(ids), np.int32)
    out: cython.int[::1] = found
    with cython.nogil:
        for i in range(ids.shape[0]):
            at = first + i
            out[i] = numbers[ids[i]] if ids[i] >= 0 and (every or valid[at >> 3] >> (at & 7) & 1) else -1
    return found
