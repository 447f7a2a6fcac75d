# SPDX-License-Identifier: Apache-2.0
"""What each vCPU did in each second, counted from batches of rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np

from tracer.flight.vcpu_time import GUEST, IDLE, OUT, Rows, ThreadTime
from tracer.top.meter_rows import EXIT_EDGES, METERED, MeterRows

KINDS: Final = (
    "kvm_entry", "kvm_exit", "kvm_userspace_exit", "sched_in", "kvm_page_fault", "kvm_mmu_get_page",
    "kvm_mmu_prepare_zap_page", "kvm_smm_transition",
)  # fmt: skip
COUNTS: Final = ("faults", "refaults", "roots", "smis", "zaps", "exits")
_SILENT: Final = 5  # seconds after which a vCPU without rows is dropped
_SHORT: Final = 10**8  # ns without a row, below which a thread is not looked up
_HALF: Final = 0.5
_ENDLESS: Final = (1 << 63) - 1


@dataclass(frozen=True)
class VcpuSecond:
    """What one vCPU did in one second; vCPU -1 stands for other threads of the host that act on that VM.

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
    longest_ns: int  # of the exits that ended in this time
    verdict: str

    def document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class ExitTimes:
    """How long a VM's vCPUs were out of their guests: exits up to each of EXIT_EDGES and beyond, and ns in all."""

    counts: Rows = field(default_factory=lambda: np.zeros(len(EXIT_EDGES) + 1, np.int64))
    nanoseconds: int = 0


class Meters:
    """All vCPUs that had rows: `see` takes rows in order of time, `second` ends a second."""

    def __init__(self, idle_codes: tuple[int, ...], time_of: ThreadTime | None = None) -> None:
        """`time_of` reads the CPU time of a thread without rows; None where rows are from the past."""
        self._rows, self._time_of = MeterRows(np.array(idle_codes, np.uint64)), time_of
        self._began: int | None = None
        self._ran: dict[int, int] = {}  # by thread without rows: ns of CPU time at the last second's end
        self.names: dict[int, str] = {}  # of VMs, by address of struct kvm
        self.exit_times: dict[int, ExitTimes] = {}  # since the beginning, by process

    def see(self, rows: Rows) -> None:
        """Take rows, in order of time."""
        self.see_until([rows], _ENDLESS)

    def see_until(self, parts: list[Rows], until: int) -> list[int]:
        """Take rows up to `until` (boot ns) of parts each in order of time; return how many of each part."""
        if self._began is None:
            self._began = min((int(part["time"][0]) for part in parts if len(part)), default=None)
        return self._rows.take(parts, until)

    def second(self, at: int) -> list[VcpuSecond]:
        """End a second at `at` (boot ns); return what each vCPU did since the last one ended."""
        began, self._began = self._began, at
        vcpus = self._rows.vcpus()
        self._account(vcpus, at)
        self._add_exits(vcpus)
        lines = []
        if began is not None and at > began:
            counted = np.any([vcpus[name] for name in COUNTS], axis=0)
            for meter in vcpus[(vcpus["vcpu"] >= 0) | counted].tolist():
                lines.append(self._line(dict(zip(METERED.names or (), meter, strict=True)), at - began))
        kept = (at - vcpus["shown"] <= _SILENT * 10**9) | (vcpus["state"] != OUT)
        self._rows.keep(kept)
        return sorted(lines, key=lambda line: (line.vm, line.vcpu))

    def _account(self, vcpus: Rows, at: int) -> None:
        """Account the time since each vCPU's last row; out of the guest, its thread tells work from sleep."""
        passed = np.maximum(at - vcpus["last"], 0)
        passed[vcpus["vcpu"] < 0] = 0
        for state, name in ((GUEST, "guest"), (IDLE, "idle")):
            vcpus[name] += np.where(vcpus["state"] == state, passed, 0)
        looked: dict[int, int] = {}
        for place in np.flatnonzero((vcpus["state"] == OUT) & (passed > _SHORT)).tolist():
            pid, tid = int(vcpus["pid"][place]), int(vcpus["tid"][place])
            read = self._time_of(pid, tid) if self._time_of is not None else None
            ran = self._ran.get(tid)
            if read is None or ran is None:
                vcpus["unknown"][place] += passed[place]
            elif not read[1]:
                vcpus["idle"][place] += max(int(passed[place]) - max(read[0] - ran, 0), 0)
            if read is not None:
                looked[tid] = read[0]
        self._ran = looked
        vcpus["last"] += passed

    def _add_exits(self, vcpus: Rows) -> None:
        took = self._rows.exits_took()
        for place in np.flatnonzero(took.any(axis=1)).tolist():
            times = self.exit_times.setdefault(int(vcpus["pid"][place]), ExitTimes())
            times.counts += took[place]
            times.nanoseconds += int(vcpus["out"][place])

    def _line(self, meter: dict[str, int], passed: int) -> VcpuSecond:
        guest, idle, steal = (min(meter[name] / passed, 1.0) for name in ("guest", "idle", "steal"))
        unseen = not meter["entered"] or meter["unknown"] > _HALF * passed
        counts = {name: meter[name] for name in COUNTS}
        verdict = _verdict(None if unseen else guest, idle, steal, counts) if meter["vcpu"] >= 0 else "host"
        name = self.names.get(meter["kvm"], f"process {meter['pid']}")
        return VcpuSecond(name, meter["pid"], meter["vcpu"], guest if meter["entered"] else None, idle, steal,
                    counts["faults"], counts["refaults"], counts["roots"], counts["smis"], counts["zaps"],
                    counts["exits"], meter["longest"], verdict)  # fmt: skip


def _verdict(guest: float | None, idle: float, steal: float, counts: dict[str, int]) -> str:
    """Return one word that says what a person would look at first."""
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
