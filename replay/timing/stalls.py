# SPDX-License-Identifier: Apache-2.0
"""Soft-hangs: periods in which a vCPU hardly ran its guest, found in its progress.

Progress is (time, guest and idle time until then) at some moments, both in ns and never falling: a recording's, or a
replay's. A guest that halts got as far as it wanted. Time that was not the vCPU's to use (the host slept, its thread
had no CPU, userspace held it back) is of no period. The rule is adjustable: under `share` for at least `window`.
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
    """What counts as a soft-hang: less than `share` of a period of `window` ns or more in the guest, or halted."""

    share: float = 0.10
    window: int = 100_000_000


@dataclass(frozen=True)
class Stall:
    """One soft-hang, [begin, end) in ns, with the guest and idle time in it; `ns` is without time not the vCPU's."""

    begin: int
    end: int
    guest: int
    ns: int


def stalls(time: Ints, guest: Ints, rule: Rule, away: Ints | None = None) -> list[Stall]:
    """The soft-hangs in a vCPU's progress, in order, none touching another. `away`: ns until then not its own to use.

    Between two moments guest time is taken to pass evenly, so that moments a window apart or closer are needed to see
    a window's share.
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
    """Which of a Linux guest's watchdogs a stall of this length would set off."""
    return [name for name, limit in (("soft lockup", SOFT_LOCKUP), ("RCU stall", RCU_STALL)) if longest >= limit]


def _stall(time: Ints, guest: Ints, own: Ints, first: int, last: int) -> Stall:
    return Stall(int(time[first]), int(time[last]), int(guest[last] - guest[first]), int(own[last] - own[first]))
