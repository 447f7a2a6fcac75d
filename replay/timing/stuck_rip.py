# SPDX-License-Identifier: Apache-2.0
"""vCPUs that make no progress in a recording: each vCPU's longest run of exits at one RIP, and how its last exit ended.

Not every hang is caused by roots, and not every loop is a hang. `diagnosis` finds the cause from the counts of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

from replay.decode.same_rip import RipRuns

CERTAIN: Final = 200  # exits at one RIP after which a vCPU counts as stuck, by default
_FAILING: Final = 10  # a tenth of them is enough where KVM_RUN fails, since no healthy guest repeats that
LASTING: Final = 100_000_000  # ns for which a guest may poll a device, completing each access, without being stuck


@dataclass(frozen=True)
class RipRun:
    """Consecutive exits of one vCPU at one RIP, with counts of the rows among
    them (`same_rip.RipRun` explains each count).
    """

    vcpu: int
    rip: int
    since: int  # ns, boot clock
    until: int
    seq: int  # row of the first exit
    exits: int
    still: int = 0  # exits at the RIP with which the vCPU had entered: no instruction was completed
    guest: int = 0  # ns in the guest
    faults: int = 0
    requested: int = 0
    installed: int = 0
    fixed: int = 0
    marked: int = 0
    mmio: int = 0
    loads: int = 0
    moves: int = 0  # faults on another page than the one before
    fresh: int = 0  # accesses below or above all earlier addresses of the run
    halts: int = 0
    ports: int = 0
    unasked: int = 0
    nested: int = 0
    vectoring: int = 0
    errors: int = 0
    error: int = 0  # the last errno
    internal: int = 0
    shutdowns: int = 0
    failed: int = 0
    undefined: int = 0
    reserved: int = 0
    writes: int = 0
    present: int = 0
    addr: int = 0
    notified: int = 0
    before: int = 0
    last: int = 0

    def certain(self, exits: int = CERTAIN) -> bool:
        """Whether the vCPU is stuck: `exits` exits without progress, or as many
        that poll a device for long enough to be a hang.
        """
        failures = self.errors + self.internal + self.failed
        least = max(exits // _FAILING, 1) if failures * 2 >= self.exits else exits
        if self.exits < least or self.moves * 100 >= self.exits or self.halts * 2 >= self.exits:
            return False
        if (failures + self.shutdowns) * 2 >= self.exits or not self.polls:
            return True
        if self.mmio * 2 < self.exits:  # CPUID, RDMSR, hypercalls: the guest continues with their results
            return False
        took = self.until - self.since
        # Only a fault's code tells reads from writes. Without faults, at least half the time must be outside the guest.
        reads = self.writes * 2 <= self.faults if self.faults else self.guest * 2 < took
        return took >= LASTING and self.guest * 4 < 3 * took and reads

    @property
    def accesses(self) -> bool:
        """Whether any row of the run has an address."""
        return self.fresh > 0

    @property
    def polls(self) -> bool:
        """Whether the guest mostly completes the instruction, and comes back to it."""
        return self.still * 2 < self.exits


@dataclass(frozen=True)
class RipEnd:
    """How a vCPU left for userspace for the last time.

    `ended` is the row of that exit to userspace, with its `reason` (KVM_EXIT_*), `error` and `time`; `exit` and `at`
    are the row and the RIP of the vCPU's last exit. `shutdowns` is how often it left for KVM_EXIT_SHUTDOWN in all.
    """

    vcpu: int
    ended: int
    reason: int
    error: int
    time: int
    shutdowns: int
    exit: int
    at: int


_COUNTED: Final = tuple(field.name for field in fields(RipRun) if field.name != "vcpu")
_ENDED: Final = tuple(field.name for field in fields(RipEnd) if field.name != "vcpu")


def longest_runs(runs: RipRuns, ids: Sequence[int]) -> list[RipRun]:
    """Return the longest run of each vCPU that has one; `ids` are the recorded vCPU ids."""
    longest = zip(ids, runs.longest, strict=False)  # for a VM without vCPUs, `runs` has room for one
    return [RipRun(vcpu, *(int(run[name]) for name in _COUNTED)) for vcpu, run in longest if run["exits"]]


def last_exits(runs: RipRuns, ids: Sequence[int]) -> list[RipEnd]:
    """Return the last exit to userspace of each vCPU that has not entered its guest since.

    `ids` are the recorded vCPU ids.
    """
    ends = zip(ids, runs.ends, strict=False)
    return [RipEnd(vcpu, *(int(end[name]) for name in _ENDED)) for vcpu, end in ends if end["ended"] >= 0]
