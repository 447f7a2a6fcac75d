"""vCPUs that do not get past an instruction, in a recording: the same RIP over many exits, and why.

Not every hang is of roots. Maintainers take the same RIP over 100,000 exits for certainly stuck; what happened in these
exits tells which hang it is, or that a loop of one instruction did go on, as its faults' addresses show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

from replay.decode.same_rip import RipRuns

CERTAIN: Final = 100_000  # exits at one RIP, by default


@dataclass(frozen=True)
class RipRun:
    """Exits of one vCPU at one RIP, without another between them; counts are of rows among them."""

    vcpu: int
    rip: int
    since: int  # ns, boot clock
    until: int
    seq: int  # row of the first exit
    exits: int
    faults: int = 0
    requested: int = 0
    installed: int = 0
    mmio: int = 0
    loads: int = 0
    moves: int = 0  # faults on another page than the one before

    def certain(self, exits: int = CERTAIN) -> bool:
        """Stuck, as maintainers judge it, by so many exits."""
        return self.exits >= exits and self.moves * 100 < self.exits

    @property
    def why(self) -> str:
        """What kind of hang this is, as far as its events tell."""
        if self.moves * 2 >= self.exits:
            return "one instruction in a loop, page after page: progress"
        if self.loads * 4 >= self.exits:
            return "roots: it loads a root again and again, and refills it"
        if self.mmio * 2 >= self.exits:
            return "emulated MMIO: the guest polls a device; no matter of roots"
        if self.faults * 2 >= self.exits and self.requested * 100 < self.faults:
            return (
                "faults that are always taken for stale and retried, as with the mmu_seq sign bug "
                "(5.17 to 6.2; 6.1.y before 6.1.50); no matter of roots"
            )
        if self.faults * 2 >= self.exits and self.installed * 100 < self.faults:
            return "faults that wait for the host's page (userfaultfd, swap, async faults); no matter of roots"
        if self.faults * 2 >= self.exits:
            return "faults that are served and come again"
        return "exits of another kind; no matter of roots"


_COUNTED: Final = tuple(field.name for field in fields(RipRun) if field.name != "vcpu")


def longest_runs(runs: RipRuns, ids: Sequence[int]) -> list[RipRun]:
    """Each vCPU's longest run; `ids` are their recorded ids."""
    longest = zip(ids, runs.longest, strict=False)  # of a VM without vCPUs there is one that has none
    return [RipRun(vcpu, *(int(run[name]) for name in _COUNTED)) for vcpu, run in longest if run["exits"]]
