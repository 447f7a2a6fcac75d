# SPDX-License-Identifier: Apache-2.0
"""How a duration is written, the same in every table, sentence and document."""

from __future__ import annotations

from numbers import Integral
from typing import Final

_UNITS: Final = (("s", 10**9), ("ms", 10**6), ("us", 10**3))


def duration(ns: float) -> str:
    """Nanoseconds with three figures, in the largest unit that leaves at least one before the point.

    >>> duration(1_234_567), duration(999_600), duration(17), duration(17.0), duration(-2_000_000_000)
    ('1.23 ms', '1.00 ms', '17 ns', '17.0 ns', '-2.00 s')
    """
    if ns < 0:
        return f"-{duration(-ns)}"
    rounded = float(f"{ns:.3g}")  # 999.6 us are 1.00 ms, not 1000 us
    for unit, size in _UNITS:
        if rounded >= size:
            return f"{ns / size:.{_decimals(rounded / size)}f} {unit}"
    return f"{ns} ns" if isinstance(ns, Integral) else f"{ns:.{_decimals(rounded)}f} ns"


def _decimals(value: float) -> int:
    return 2 if 0 < value < 10 else 1 if 0 < value < 100 else 0
