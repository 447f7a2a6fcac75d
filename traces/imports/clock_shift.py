# SPDX-License-Identifier: Apache-2.0
"""What trace-cmd's options say of a file's times: a clock's ticks to nanoseconds, and a guest's times to its host's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from traces.imports.source_bytes import Damaged, SourceCursor

_MOST: Final = 1 << 16  # samples, CPUs
_INTERPOLATE: Final = 1
_WORD: Final = (1 << 64) - 1


@dataclass(frozen=True)
class _Sample:
    """At the guest's `time`: how much the host's is later, after scaling."""

    time: int
    offset: int
    scaling: int
    fraction: int


class ClockShift:
    """Applied in trace-cmd's own order: the guest's offset, ticks to nanoseconds, what a user added."""

    def __init__(self) -> None:
        self._added = 0
        self._multiply, self._right = 0, 0
        self._interpolated = False
        self._of_cpu: list[list[_Sample]] = []

    @property
    def needed(self) -> bool:
        return bool(self._added or self._multiply or self._of_cpu)

    @property
    def of_host(self) -> bool:
        """Whether there are offsets between a guest's clock and its host's."""
        return any(self._of_cpu)

    def add(self, nanoseconds: int) -> None:
        self._added += nanoseconds

    def scale(self, multiply: int, right: int) -> None:
        """Ticks are multiplied, then shifted to the right."""
        if right > 63:
            raise Damaged("a clock's scale makes no sense")
        self._multiply, self._right = multiply, right

    def of_guest(self, data: bytes) -> None:
        """By CPU: samples of the offset between a guest's clock and its host's."""
        cursor = SourceCursor(data, "offsets of times")
        _, flags, cpus = cursor.numbers("QII")
        self._interpolated = bool(flags & _INTERPOLATE)
        columns = []
        for _ in range(min(cpus, _MOST)):
            (count,) = cursor.numbers("I")
            if count > _MOST:
                raise Damaged("more offsets of times than there can be")
            columns.append([cursor.numbers(f"{count}{letter}") for letter in "QqQ"])
        self._of_cpu = []
        for times, offsets, scalings in columns:
            more = cursor.numbers(f"{len(times)}Q") if cursor.left else (0,) * len(times)
            if any(fraction > 63 for fraction in more):
                raise Damaged("a clock's scale makes no sense")
            samples = {t: _Sample(t, o, s, f) for t, o, s, f in zip(times, offsets, scalings, more, strict=True)}
            self._of_cpu.append([samples[time] for time in sorted(samples)])

    def shifted(self, time: NDArray[Any], cpu: int) -> NDArray[np.uint64]:
        """The times as trace-cmd would print them."""
        samples = self._of_cpu[cpu] if cpu < len(self._of_cpu) else []
        time = time.astype(np.uint64)
        if len(samples) == 1:
            time = time + np.uint64(samples[0].offset & _WORD)
        elif samples:
            time = self._as_host(time, samples)
        if self._multiply:  # the product has up to 96 bits
            low, high = time & np.uint64(0xFFFFFFFF), time >> np.uint64(32)
            multiply, right = np.uint64(self._multiply), np.uint64(self._right)
            carried = high * multiply << np.uint64(32 - self._right) if self._right <= 32 else high * multiply >> right
            time = (low * multiply >> right) + carried
        moved = (time + np.uint64(self._added & _WORD)).view(np.int64)
        return np.maximum(moved, 0).view(np.uint64)  # a guest's time before its host began

    def _as_host(self, time: NDArray[np.uint64], samples: list[_Sample]) -> NDArray[np.uint64]:
        """By the sample before each time, and where so asked by that after it as well."""
        at = np.array([sample.time for sample in samples], np.uint64)
        offset = np.array([sample.offset for sample in samples], np.int64)
        scaling = np.array([sample.scaling for sample in samples], np.uint64)
        fraction = np.array([sample.fraction for sample in samples], np.uint64)
        first = np.clip(np.searchsorted(at, time, side="right") - 1, 0, len(samples) - 2)
        added = offset[first]
        if self._interpolated:
            span = (at[first + 1] - at[first]).astype(np.int64)
            since = (time - at[first]).view(np.int64)
            added = added + (since * (offset[first + 1] - added) + span // 2) // span
        scaled: NDArray[np.uint64] = (time * scaling[first] >> fraction[first]) + added.view(np.uint64)
        return scaled
