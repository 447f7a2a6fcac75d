# SPDX-License-Identifier: Apache-2.0
"""What others take of a vCPU's CPU while it runs: a vCPU that is done sooner has waited less.

Who takes it is not known. Who runs by the clock takes early what was taken early in the recording, whatever root policy
KVM has; who runs because of what the guest does (a recorder, a device's thread) takes in proportion to that. A replay
takes the middle of both, and half their difference for its standard error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class StealCurve:
    """ns by moment, none less than the one before: what a vCPU had of a CPU (`own`), and was stolen from it (`stolen`).

    Time that it halts or is held back in counts as neither.
    """

    own: Ints
    stolen: Ints

    def at(self, own: int) -> int:
        """ns stolen until it has had a CPU for `own` ns; beyond the recording's end, on average as much."""
        return self.even(own) if own > self.own[-1] else int(np.interp(own, self.own, self.stolen))

    def even(self, own: int) -> int:
        """The same if others took as much of each ms."""
        return int(self.stolen[-1]) * own // max(int(self.own[-1]), 1)


def steal_curve(moments: NDArray[Any], began: int, taken: tuple[Ints, Ints], stolen: int) -> StealCurve:
    """One vCPU's, from its `Moment`s, in order, and when it `began` (boot ns).

    `taken` is what does not count as stolen, for a zap worker took it: boot ns, and ns at each. In the end it is
    `stolen`.
    """
    times, ns = taken
    until = np.concatenate([[0], np.cumsum(ns)])[np.searchsorted(times, moments["time"], "right")]
    lost = moments["stolen"] - until
    lost[-1:] = stolen
    # Of a wait, what a zap worker had of it may be known late.
    lost = np.clip(np.minimum.accumulate(lost[::-1])[::-1], 0, stolen)
    had = moments["time"] - began - moments["idle"] - (moments["away"] - moments["stolen"]) - lost
    zero = np.zeros(1, np.int64)
    return StealCurve(np.maximum.accumulate(np.concatenate([zero, had])), np.concatenate([zero, lost]))
