# SPDX-License-Identifier: Apache-2.0
"""vCPUs that make no progress, in a recording: each one's longest run of exits at one RIP, and how its last exit ended.

Not every hang is of roots, and not every loop is a hang. `diagnosis` says which one this is, by what the run has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

from replay.decode.same_rip import RipRuns

CERTAIN: Final = 200  # exits at one RIP, by default
_FAILING: Final = 10  # of those, one in so many is enough where KVM_RUN fails, which no healthy guest tries again
LASTING: Final = 100_000_000  # ns; a guest that polls a device ends each access, and may do so for a while


@dataclass(frozen=True)
class RipRun:
    """Exits of one vCPU at one RIP, without another between them; counts are of rows among them (`same_rip.RipRun`)."""

    vcpu: int
    rip: int
    since: int  # ns, boot clock
    until: int
    seq: int  # row of the first exit
    exits: int
    still: int = 0  # exits at the RIP that it had entered with: no instruction ended
    guest: int = 0  # ns
    faults: int = 0
    requested: int = 0
    installed: int = 0
    fixed: int = 0
    marked: int = 0
    mmio: int = 0
    loads: int = 0
    moves: int = 0  # faults on another page than the one before
    fresh: int = 0  # accesses beyond the addresses until then
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
        """Whether it got no further for this many exits, or polled for this many, and long enough to be a hang."""
        failures = self.errors + self.internal + self.failed
        least = max(exits // _FAILING, 1) if failures * 2 >= self.exits else exits
        if self.exits < least or self.moves * 100 >= self.exits or self.halts * 2 >= self.exits:
            return False
        if (failures + self.shutdowns) * 2 >= self.exits or not self.polls:
            return True
        if self.mmio * 2 < self.exits:  # CPUID, RDMSR, hypercalls: it continues with what they return
            return False
        took = self.until - self.since
        # Whether an access reads is in a fault's code only: without it, more of the time must be lost.
        reads = self.writes * 2 <= self.faults if self.faults else self.guest * 2 < took
        return took >= LASTING and self.guest * 4 < 3 * took and reads

    @property
    def accesses(self) -> bool:
        """Whether any row of it has an address."""
        return self.fresh > 0

    @property
    def polls(self) -> bool:
        """Whether the guest ends the instruction each time, and comes back to it."""
        return self.still * 2 < self.exits


@dataclass(frozen=True)
class RipEnd:
    """How a vCPU left for userspace for the last time: the row, its reason (KVM_EXIT_*), error, time, and the RIP.

    `shutdowns`: how often it has left for KVM_EXIT_SHUTDOWN, in all.
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
    """Each vCPU's longest run; `ids` are their recorded ids."""
    longest = zip(ids, runs.longest, strict=False)  # of a VM without vCPUs there is one that has none
    return [RipRun(vcpu, *(int(run[name]) for name in _COUNTED)) for vcpu, run in longest if run["exits"]]


def last_exits(runs: RipRuns, ids: Sequence[int]) -> list[RipEnd]:
    """How each vCPU went to userspace that has not entered its guest since."""
    ends = zip(ids, runs.ends, strict=False)
    return [RipEnd(vcpu, *(int(end[name]) for name in _ENDED)) for vcpu, end in ends if end["ended"] >= 0]
