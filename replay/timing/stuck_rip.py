"""vCPUs that do not get past an instruction, in a recording: the same RIP over many exits, and why.

Not every hang is of roots. Maintainers take the same RIP over 100,000 exits for certainly stuck; what happened in these
exits tells which hang it is, or that a loop of one instruction did go on, as its faults' addresses show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from traces.reader import Trace, kind_codes
from traces.schema import BY_NAME

CERTAIN: Final = 100_000  # exits at one RIP, by default
_COLUMNS: Final = ("seq", "time", "vcpu", "kind", "rip", "addr")
_EXIT, _FAULT, _REQUESTED, _SET, _MMIO, _LOAD = (
    BY_NAME[name].code
    for name in ("kvm_exit", "kvm_page_fault", "kvm_mmu_spte_requested", "kvm_mmu_set_spte", "kvm_mmio", "mmu_load")
)
_COUNTED: Final = (_FAULT, _REQUESTED, _SET, _MMIO, _LOAD)


@dataclass
class Run:
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


def longest_runs(trace: Trace, vm: int) -> dict[int, Run]:
    """Each vCPU's longest run of exits at one RIP."""
    found: dict[int, Run] = {}
    going: dict[int, Run] = {}
    for batch in trace.batches(_COLUMNS, vm=vm):
        codes = kind_codes(batch)
        column = batch.column("vcpu").fill_null(-1).to_numpy()
        times, seqs, rips, addrs = (batch.column(name).to_numpy() for name in ("time", "seq", "rip", "addr"))
        for vcpu in np.unique(column[column >= 0]).tolist():
            mine = np.flatnonzero(column == vcpu)
            pages = _moved(codes[mine], addrs[mine])
            _follow(vcpu, codes[mine], times[mine], seqs[mine], rips[mine], pages, going, found)
    for vcpu, run in going.items():
        _keep(found, vcpu, run)
    return found


def _follow(
    vcpu: int,
    codes: NDArray[np.uint8],
    times: NDArray[np.int64],
    seqs: NDArray[np.int64],
    rips: NDArray[np.uint64],
    moved: NDArray[np.bool_],
    going: dict[int, Run],
    found: dict[int, Run],
) -> None:
    exits = np.flatnonzero(codes == _EXIT)
    run = going.get(vcpu)
    if not len(exits):
        if run is not None:
            _count(run, codes, moved)
        return
    if run is not None:
        _count(run, codes[: exits[0]], moved[: exits[0]])
    at = rips[exits]
    starts = np.flatnonzero(np.append(True, at[1:] != at[:-1]))
    ends = np.append(starts[1:], len(exits))
    longest = int(np.argmax(ends - starts))
    for i in dict.fromkeys((0, longest, len(starts) - 1)):  # the first may go on from before, the last go on after
        first, last = int(exits[starts[i]]), int(exits[ends[i] - 1])
        stop = int(exits[ends[i]]) if ends[i] < len(exits) else len(codes)
        rip, count = int(at[starts[i]]), int(ends[i] - starts[i])
        if i == 0 and run is not None and run.rip == rip:
            run.exits += count
            run.until = int(times[last])
        else:
            if i == 0 and run is not None:
                _keep(found, vcpu, run)
            run = Run(vcpu, rip, int(times[first]), int(times[last]), int(seqs[first]), count)
        _count(run, codes[first:stop], moved[first:stop])
        _keep(found, vcpu, run)
    assert run is not None
    going[vcpu] = run


def _moved(codes: NDArray[np.uint8], addrs: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which rows are faults on another page than the fault before them."""
    faults = np.flatnonzero(codes == _FAULT)
    page = addrs[faults] >> np.uint64(12)
    moved = np.zeros(len(codes), np.bool_)
    moved[faults[1:]] = page[1:] != page[:-1]
    return moved


def _count(run: Run, codes: NDArray[np.uint8], moved: NDArray[np.bool_]) -> None:
    run.moves += int(moved.sum())
    counts: Any = np.bincount(codes, minlength=256)
    faults, requested, installed, mmio, loads = (int(counts[code]) for code in _COUNTED)
    run.faults += faults
    run.requested += requested
    run.installed += installed
    run.mmio += mmio
    run.loads += loads


def _keep(found: dict[int, Run], vcpu: int, run: Run) -> None:
    best = found.get(vcpu)
    if best is None or run.exits > best.exits:
        found[vcpu] = run
