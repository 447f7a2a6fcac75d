# SPDX-License-Identifier: Apache-2.0
"""Soft-hangs: periods in which a vCPU hardly ran its guest, found in the vCPU's progress.

Progress is the time and the guest and idle time until then, both in ns and never falling, at some moments of a
recording or of a replay. Idle time counts as progress, since a guest that halts has nothing to do. Time that the vCPU
could not use (the host slept, its thread had no CPU, userspace did not run it) does not count at all. The rule can be
changed: a soft-hang is a period of at least `window` with less than `share` of it in the guest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
SOFT_LOCKUP: Final = 20 * 10**9  # ns; Linux: twice watchdog_thresh (10 s)
RCU_STALL: Final = 21 * 10**9  # ns; Linux: CONFIG_RCU_CPU_STALL_TIMEOUT


@dataclass(frozen=True)
class Rule:
    """What counts as a soft-hang: a period of at least `window` ns of which less than `share` is guest or idle time."""

    share: float = 0.10
    window: int = 100_000_000


@dataclass(frozen=True)
class Stall:
    """One soft-hang, [begin, end) in ns, with its guest and idle time (`guest`).

    `ns` is its length without the time that the vCPU could not use.
    """

    begin: int
    end: int
    guest: int
    ns: int


def stalls(time: Ints, guest: Ints, rule: Rule, away: Ints | None = None) -> list[Stall]:
    """Return the soft-hangs in a vCPU's progress, in order and without overlap.

    `time` and `guest` are the moments and the guest and idle time until then; `away` is the time until then that the
    vCPU could not use. Guest time is taken to pass evenly between two moments, so moments must be no further apart than
    a window.
    """
    if len(time) < 2:
        return []
    own = time if away is None else time - away
    later = np.searchsorted(own, own + rule.window)
    begin = np.flatnonzero(later < len(own))
    end = later[begin]
    bad = (guest[end] - guest[begin]) < rule.share * (own[end] - own[begin])
    found: list[Stall] = []
    first = last = -1
    for i, j in zip(begin[bad].tolist(), end[bad].tolist(), strict=True):
        if first >= 0 and i <= last:
            last = max(last, j)
            continue
        if first >= 0:
            found.append(_stall(time, guest, own, first, last))
        first, last = i, j
    if first >= 0:
        found.append(_stall(time, guest, own, first, last))
    return found


def watchdogs(longest: int) -> list[str]:
    """Return which watchdogs of a Linux guest a stall of `longest` ns would trigger."""
    return [name for name, limit in (("soft lockup", SOFT_LOCKUP), ("RCU stall", RCU_STALL)) if longest >= limit]


def _stall(time: Ints, guest: Ints, own: Ints, first: int, last: int) -> Stall:
    return Stall(int(time[first]), int(time[last]), int(guest[last] - guest[first]), int(own[last] - own[first]))
