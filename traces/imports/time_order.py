# SPDX-License-Identifier: Apache-2.0
"""Rows of several buffers in the order of their times, as far as they are there."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from traces.record import RECORD

Rows = NDArray[np.void]
_MOST: Final = 1 << 22  # rows that wait; more than that are written though older ones may come


class TimeOrder:
    """Takes rows as they are found, gives those up to a time in order. `late` rows came when later ones were gone."""

    def __init__(self) -> None:
        self.late = 0
        self._parts: list[NDArray[np.uint64]] = []  # rows as words, which are moved as a whole; the first is the time
        self.waiting = 0
        self.latest = 0  # time of any row so far
        self._given = 0

    def add(self, rows: Rows) -> None:
        if len(rows):
            words = rows.view(np.uint64).reshape(len(rows), -1)
            self._parts.append(words)
            self.waiting += len(rows)
            self.latest = max(self.latest, int(words[:, 0].max()))

    @property
    def crowded(self) -> bool:
        """Whether so many rows wait that some must go."""
        return self.waiting > _MOST

    def until(self, time: int | None) -> Rows | None:
        """The rows that are not later than `time` (None: all), in order; None: there are none."""
        if not self.waiting:
            return None
        rows = np.concatenate(self._parts) if len(self._parts) > 1 else self._parts[0]
        times = np.ascontiguousarray(rows[:, 0])
        if not bool((times[1:] >= times[:-1]).all()):
            order = np.argsort(times, kind="stable")
            rows, times = rows.take(order, axis=0), times[order]
        count = len(rows) if time is None else int(np.searchsorted(times, np.uint64(time), side="right"))
        self._parts = [rows[count:]] if count < len(rows) else []
        self.waiting = len(rows) - count
        if not count:
            return None
        self.late += int(np.searchsorted(times[:count], np.uint64(self._given)))
        self._given = max(self._given, int(times[count - 1]))
        given: Rows = rows[:count].view(RECORD)[:, 0]
        return given

    def half(self) -> Rows | None:
        """The older half of what waits."""
        times = np.sort(np.concatenate([part[:, 0] for part in self._parts]))
        return self.until(int(times[len(times) // 2]))
