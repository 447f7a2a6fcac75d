# SPDX-License-Identifier: Apache-2.0
"""What each vCPU did in each second, counted from batches of rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np

from tracer.flight.counting import faults, roots
from tracer.flight.vcpu_time import ENTRY, EXIT, GUEST, IDLE, OUT, Rows, ThreadTime, by_vcpu, grouped, off_cpu, states
from traces.record import RECORD
from traces.schema import BY_NAME

KINDS: Final = (
    "kvm_entry", "kvm_exit", "kvm_userspace_exit", "sched_in", "kvm_page_fault", "kvm_mmu_get_page",
    "kvm_mmu_prepare_zap_page", "kvm_smm_transition",
)  # fmt: skip
_ZAP, _SMM = BY_NAME["kvm_mmu_prepare_zap_page"].code, BY_NAME["kvm_smm_transition"].code
_REMEMBERED: Final = 5  # seconds in which a fault on the same gfn is one again
_SILENT: Final = 5  # seconds after which a vCPU that shows nothing is no more
_SHORT: Final = 10**8  # ns for which nobody is looked up
_HALF: Final = 0.5
_TOGETHER: Final = 1 << 17  # rows
EXIT_EDGES: Final = 10 ** np.arange(3, 11)  # ns: 1 us to 10 s


@dataclass(frozen=True)
class VcpuSecond:
    """One vCPU in one second; vCPU -1 is what other threads of the host do in that VM.

    Shares are of that time; None is not known, as on a kernel that shows no entries.
    """

    vm: str
    pid: int
    vcpu: int
    guest: float | None
    idle: float
    steal: float
    faults: int
    refaults: int
    roots: int
    smis: int
    zaps: int
    exits: int  # to userspace
    longest_ns: int  # exit from which it came back in this time
    verdict: str

    def document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class ExitTimes:
    """How long a VM's vCPUs were out of their guests: how often up to each of EXIT_EDGES and beyond, and ns in all."""

    counts: Rows = field(default_factory=lambda: np.zeros(len(EXIT_EDGES) + 1, np.int64))
    nanoseconds: int = 0

    def add(self, took: Rows) -> None:
        """Exits that took so long (ns)."""
        self.counts += np.bincount(np.searchsorted(EXIT_EDGES, took), minlength=len(self.counts))
        self.nanoseconds += int(took.sum())


class _Meter:
    def __init__(self, last: int) -> None:
        self.last, self.state = last, OUT
        self.pid = self.tid = 0
        self.entered, self.shown = False, last
        self.left: int | None = None  # when it left its guest, unless to idle
        self.ran: int | None = None  # ns of its thread's CPU time at the last second's end
        self.counts: dict[str, int] = {}
        self.spent = dict.fromkeys(("guest", "idle", "steal", "unknown"), 0)
        self.longest = 0
        self.seen: list[Rows] = []  # gfns that it faulted on, by second


class Meters:
    """All vCPUs that showed themselves; `see` rows in the order of time, then `second` ends one."""

    def __init__(self, idle_codes: tuple[int, ...], time_of: ThreadTime | None = None) -> None:
        """`time_of` looks a silent thread up; None where what is shown is long past."""
        self._idle_codes, self._time_of = np.array(idle_codes, np.uint64), time_of
        self._vcpus: dict[tuple[int, int], _Meter] = {}
        self._began: int | None = None
        self._waiting: list[Rows] = []
        self.names: dict[int, str] = {}  # of VMs, by their pointer
        self.exit_times: dict[int, ExitTimes] = {}  # since the beginning, by process

    def see(self, rows: Rows) -> None:
        """Take rows. They are looked at together: what it costs is by vCPU and batch more than by row."""
        if len(rows) and self._began is None:
            self._began = int(rows["time"][0])
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= _TOGETHER:
            self._look()

    def _look(self) -> None:
        rows = np.concatenate([np.empty(0, RECORD), *self._waiting])
        self._waiting = []
        for key, mine in by_vcpu(rows):
            self._follow(self._meter(key, mine), mine)
        smis = (rows["kind"] == _SMM) & (rows["flags"] & 1 != 0)
        for name, mask in (("faults", faults(rows)), ("roots", roots(rows)), ("zaps", rows["kind"] == _ZAP),
                           ("smis", smis), ("exits", rows["kind"] == BY_NAME["kvm_userspace_exit"].code)):  # fmt: skip
            counted = rows[mask & (rows["kvm"] != 0)]
            for key, mine in grouped(counted):
                meter = self._meter(key, mine)
                meter.counts[name] = meter.counts.get(name, 0) + len(mine)
                if name == "faults":
                    self._again(meter, mine["w0"] >> np.uint64(12))

    def second(self, at: int) -> list[VcpuSecond]:
        """End a second at `at` (boot ns): what each vCPU did since the last one ended."""
        self._look()
        began, self._began = self._began, at
        lines = []
        for key, meter in list(self._vcpus.items()):
            if key[1] >= 0:
                self._account(meter, at)
            if began is not None and at > began and (key[1] >= 0 or meter.counts):
                lines.append(self._line(key, meter, at - began))
            meter.counts, meter.longest = {}, 0
            meter.spent = dict.fromkeys(meter.spent, 0)
            meter.seen = [*meter.seen, np.empty(0, np.uint64)][-_REMEMBERED:]
            if at - meter.shown > _SILENT * 10**9 and meter.state == OUT:
                del self._vcpus[key]
        return sorted(lines, key=lambda line: (line.vm, line.vcpu))

    def _meter(self, key: tuple[int, int], rows: Rows) -> _Meter:
        meter = self._vcpus.get(key)
        if meter is None:
            meter = self._vcpus[key] = _Meter(int(rows["time"][0]))
        meter.pid, meter.tid, meter.shown = int(rows["tgid"][-1]), int(rows["tid"][-1]), int(rows["time"][-1])
        return meter

    def _follow(self, meter: _Meter, rows: Rows) -> None:
        times = rows["time"].astype(np.int64)
        after, before = states(meter.state, rows, self._idle_codes)
        passed = np.maximum(np.diff(times, prepend=meter.last), 0)
        asleep, waited = off_cpu(rows, before, passed)
        meter.spent["guest"] += int(passed[before == GUEST].sum())
        meter.spent["idle"] += int(passed[before == IDLE].sum() + asleep.sum())
        meter.spent["steal"] += int(waited.sum())
        meter.entered |= bool((rows["kind"] == ENTRY).any())
        took = self._took(meter, rows, after)
        if len(took):
            meter.longest = max(meter.longest, int(took.max()))
            self.exit_times.setdefault(meter.pid, ExitTimes()).add(took)
        meter.last, meter.state = int(times[-1]), int(after[-1])

    @staticmethod
    def _took(meter: _Meter, rows: Rows, after: Rows) -> Rows:
        """How long each exit took that ends in these rows, ns; the one that goes on stays in the meter."""
        at = np.flatnonzero((rows["kind"] == ENTRY) | (rows["kind"] == EXIT))
        if not len(at):
            return np.empty(0, np.int64)
        exits = (rows["kind"][at] == EXIT) & (after[at] == OUT)
        entries, times = rows["kind"][at] == ENTRY, rows["time"][at].astype(np.int64)
        if meter.left is not None:
            exits, entries = np.append(True, exits), np.append(False, entries)
            times = np.append(meter.left, times)
        meter.left = int(times[-1]) if exits[-1] else None
        took: Rows = np.diff(times)[exits[:-1] & entries[1:]]
        return took

    def _again(self, meter: _Meter, gfns: Rows) -> None:
        """Count faults on gfns that were faulted on before."""
        if not meter.seen:
            meter.seen = [np.empty(0, np.uint64)]
        unique = np.unique(gfns)
        known = np.zeros(len(unique), np.bool_)
        for before in meter.seen:  # each is sorted
            if len(before):
                known |= before[np.minimum(np.searchsorted(before, unique), len(before) - 1)] == unique
        again = len(gfns) - len(unique) + int(np.count_nonzero(known))
        meter.counts["refaults"] = meter.counts.get("refaults", 0) + again
        meter.seen[-1] = np.union1d(meter.seen[-1], unique) if len(meter.seen[-1]) else unique

    def _account(self, meter: _Meter, at: int) -> None:
        """The time since its last row: out of its guest it may be at work or asleep, which only its thread can tell."""
        passed = max(at - meter.last, 0)
        if meter.state != OUT:
            meter.spent["guest" if meter.state == GUEST else "idle"] += passed
        elif passed > _SHORT:
            read = self._time_of(meter.pid, meter.tid) if self._time_of is not None else None
            if read is None or meter.ran is None:
                meter.spent["unknown"] += passed
            elif not read[1]:
                meter.spent["idle"] += max(passed - max(read[0] - meter.ran, 0), 0)
            meter.ran = read[0] if read is not None else None
        meter.last = max(meter.last, at)

    def _line(self, key: tuple[int, int], meter: _Meter, passed: int) -> VcpuSecond:
        if key[1] < 0:
            meter.spent = dict.fromkeys(meter.spent, 0)
        guest, idle, steal = (min(meter.spent[name] / passed, 1.0) for name in ("guest", "idle", "steal"))
        counts = {name: meter.counts.get(name, 0) for name in ("faults", "refaults", "roots", "smis", "zaps", "exits")}
        unseen = not meter.entered or meter.spent["unknown"] > _HALF * passed
        verdict = _verdict(None if unseen else guest, idle, steal, counts) if key[1] >= 0 else "host"
        name = self.names.get(key[0], f"process {meter.pid}")
        return VcpuSecond(name, meter.pid, key[1], guest if meter.entered else None, idle, steal,
                    counts["faults"], counts["refaults"], counts["roots"], counts["smis"], counts["zaps"],
                    counts["exits"], meter.longest, verdict)  # fmt: skip


def _verdict(guest: float | None, idle: float, steal: float, counts: dict[str, int]) -> str:
    """One word: what a person would look at first."""
    busy = 1 - idle - steal
    if idle > _HALF:
        return "idle"
    if steal > _HALF:
        return "starved"
    if guest is None:
        return "unseen"
    if guest >= _HALF * busy:
        return "runs"
    if counts["faults"] and counts["refaults"] >= _HALF * counts["faults"]:
        return "refaults"
    if guest < 0.1 * busy:
        return "hangs"
    return "exits"
