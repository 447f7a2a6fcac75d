# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Hold the spans of one batch of rows, and pick samples of costs out of them.

This is Cython in pure-Python mode, like `decode.spans.timeline`: numpy would make an array of the whole batch for each
step.
"""

from __future__ import annotations

from typing import Any

import cython
import numpy as np

COMPILED: bool = cython.compiled


@cython.final
@cython.cclass
class RowSpans:
    """The spans that end with the rows of a batch, in memory that the next batch uses again.

    By row: `state` is the VcpuState that ends there (or NO_SPAN), `ns` its length, `mark` has the span's marks, and
    `before` is the kind of the row with which it began.
    """

    state = cython.declare(object, visibility="public")
    ns = cython.declare(object, visibility="public")
    mark = cython.declare(object, visibility="public")
    before = cython.declare(object, visibility="public")
    _room: tuple  # type: ignore[type-arg]
    _picked: cython.longlong[::1]

    def __init__(self) -> None:
        self._room = ()
        self.resize(0)

    def resize(self, rows: int) -> None:
        """Make these arrays `rows` long; what they held is lost."""
        if not self._room or rows > len(self._room[0]):
            self._room = (
                np.empty(rows, np.uint8), np.empty(rows, np.int64), np.empty(rows, np.uint8), np.empty(rows, np.uint8),
                np.empty(rows, np.int64),
            )  # fmt: skip
            self._picked = self._room[4]
        self.state, self.ns, self.mark, self.before = (each[:rows] for each in self._room[:4])

    def times_in(self, what: cython.int, below: cython.longlong) -> Any:
        """Return how many spans are in state `what`, and the lengths in ns, in order, of those shorter than `below`."""
        state: cython.const[cython.uchar][::1] = self.state
        ns: cython.const[cython.longlong][::1] = self.ns
        i: cython.Py_ssize_t
        n: cython.Py_ssize_t = 0
        count: cython.Py_ssize_t = 0
        with cython.nogil:
            for i in range(state.shape[0]):
                if state[i] == what:
                    count += 1
                    if ns[i] < below:
                        self._picked[n] = ns[i]
                        n += 1
        return count, self._room[4][:n].copy()

    def times_marked(self, bits: cython.int) -> Any:
        """Return the lengths in ns, in order, of the spans that have one of these marks."""
        mark: cython.const[cython.uchar][::1] = self.mark
        ns: cython.const[cython.longlong][::1] = self.ns
        i: cython.Py_ssize_t
        n: cython.Py_ssize_t = 0
        with cython.nogil:
            for i in range(mark.shape[0]):
                if mark[i] & bits:
                    self._picked[n] = ns[i]
                    n += 1
        return self._room[4][:n].copy()
