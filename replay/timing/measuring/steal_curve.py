# SPDX-License-Identifier: Apache-2.0
"""Model how much steal time a vCPU would have had if it had run for a shorter or longer time than recorded.

It is not known which tasks take the CPU. A task that runs by the clock takes early what it took early in the recording,
whatever KVM's root policy is. A task that runs because of what the guest does (a recorder, a device's thread) takes in
proportion to that. A replay uses the mean of the two, and half their difference as its standard error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class StealCurve:
    """Two series in ns that never fall: a vCPU's CPU time (`own`), and the time stolen from it until then (`stolen`).

    Time for which it halts, or is not run by userspace, is in neither.
    """

    own: Ints
    stolen: Ints

    def at(self, own: int) -> int:
        """Return the ns stolen until the vCPU has had a CPU for `own` ns.

        Beyond the recording's end, the average rate is used.
        """
        return self.even(own) if own > self.own[-1] else int(np.interp(own, self.own, self.stolen))

    def even(self, own: int) -> int:
        """Return the ns stolen until then if steal time were spread evenly over the vCPU's own time."""
        return int(self.stolen[-1]) * own // max(int(self.own[-1]), 1)


def steal_curve(moments: NDArray[Any], began: int, taken: tuple[Ints, Ints], stolen: int) -> StealCurve:
    """Return the curve of one vCPU from its `Moment`s, in order; `began` is its begin in boot ns.

    `taken` are the time and length (arrays, boot ns and ns) of what zap workers took, which does not count as stolen.
    `stolen` is the total at the end.
    """
    times, ns = taken
    until = np.concatenate([[0], np.cumsum(ns)])[np.searchsorted(times, moments["time"], "right")]
    lost = moments["stolen"] - until
    lost[-1:] = stolen
    # How much of a wait a zap worker took may be known only after the wait: keep the series from falling.
    lost = np.clip(np.minimum.accumulate(lost[::-1])[::-1], 0, stolen)
    had = moments["time"] - began - moments["idle"] - (moments["away"] - moments["stolen"]) - lost
    zero = np.zeros(1, np.int64)
    return StealCurve(np.maximum.accumulate(np.concatenate([zero, had])), np.concatenate([zero, lost]))
