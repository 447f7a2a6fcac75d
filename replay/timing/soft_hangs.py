# SPDX-License-Identifier: Apache-2.0
"""Soft-hangs in virtual time, each with the cause that emptied the vCPU's root slots and with its time breakdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from replay.simulate.operations import Cause
from replay.timing.reference_clock import TimeCategory
from replay.timing.stalls import Rule, Stall, stalls

OF_ROOTS: Final = (TimeCategory.FAULT, TimeCategory.LOAD, TimeCategory.UNLOAD, TimeCategory.WAIT, TimeCategory.SWITCH)
_SAID: Final = {
    Cause.FIRST: "initial faults",
    Cause.SMI: "an SMI",
    Cause.RSM: "an SMI",  # its end, after which the guest's own working set is due
    Cause.CR0_WP: "a write of CR0.WP",
    Cause.CR0: "a write of CR0",
    Cause.CR4: "a write of CR4",
    Cause.EFER: "a write of EFER",
    Cause.SREGS: "userspace setting registers",
    Cause.CPUID: "userspace setting CPUID",
    Cause.EXIT: "an exit that resets the MMU",
    Cause.MEMSLOT: "an invalidation of all roots",
    Cause.VM_END: "the VM's end",
    Cause.OTHER: "a root given up",
    Cause.POLICY: "a root given up by the policy",
}


@dataclass(frozen=True)
class SoftHang:
    """One soft-hang of a vCPU.

    `cause` is the cause that applied to most of its progress samples; `spent` is its time in ns by TimeCategory.
    """

    begin: int  # ns of virtual time
    end: int
    cause: Cause
    spent: tuple[int, ...]

    @property
    def ns(self) -> int:
        return self.end - self.begin

    @property
    def of_roots(self) -> bool:
        """Whether at least half of the time was spent on faults and roots, which root policies decide."""
        return 2 * sum(self.spent[each] for each in OF_ROOTS) >= self.ns

    @property
    def why(self) -> str:
        """The cause in words."""
        return _SAID[self.cause] if self.of_roots else "exits for other than faults and roots"


def soft_hangs(progress: NDArray[np.int64], rule: Rule) -> list[SoftHang]:
    """Return the soft-hangs in a vCPU's progress, given as rows of (clock,
    Cause of the last unload, *spent until then).
    """
    clock, spent = progress[:, 0], progress[:, 2:]
    return [
        _explained(each, clock, progress[:, 1], spent)
        for each in stalls(clock, spent[:, TimeCategory.GUEST] + spent[:, TimeCategory.IDLE], rule)
    ]


def _explained(stall: Stall, clock: NDArray[np.int64], causes: NDArray[np.int64], spent: NDArray[np.int64]) -> SoftHang:
    first, last = np.searchsorted(clock, [stall.begin, stall.end])
    cause = np.bincount(causes[first + 1 : last + 1]).argmax()  # a row has the cause that applied up to its time
    return SoftHang(stall.begin, stall.end, Cause(int(cause)), tuple((spent[last] - spent[first]).tolist()))


def causes(hangs: Iterable[SoftHang]) -> str:
    """Return the causes of soft-hangs as a phrase: `cause: an SMI`, or the number of hangs by cause."""
    counts = Counter(each.why for each in hangs)
    if len(counts) == 1:
        (why,) = counts
        return f"cause{' of each' if counts[why] > 1 else ''}: {why}"
    return "causes: " + ", ".join(f"{why} ({count:,})" for why, count in counts.most_common())
