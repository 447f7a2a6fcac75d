# SPDX-License-Identifier: Apache-2.0
"""What a flight recorder counts for Prometheus, by VM and of itself.

The thread that handles the rows counts them in batches, and publishes the counts once a second; a reader gets the last
second's. What is not recorded at the moment has no sample, rather than one that stands still. A VM's counts are dropped
with it, and beyond `MOST_VMS` VMs share one label, so that no host makes series without end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tracer.flight.alarms import Rows
from tracer.flight.vcpu_time import KINDS as TIME_KINDS
from tracer.flight.vcpu_time import ThreadTime
from tracer.top.meter import Meters, VcpuSecond
from tracer.top.meter_rows import EXIT_EDGES

SECOND: Final = 10**9
MOST_VMS: Final = 256
OTHERS: Final = "others"
BUCKETS: Final = tuple(edge / SECOND for edge in EXIT_EDGES.tolist())  # seconds
STATES: Final = ("guest", "idle", "steal", "other")


@dataclass(frozen=True)
class Family:
    """One metric: its name without `_total`, type, help text, labels, and the kinds of event that it needs."""

    name: str
    type: str  # counter, gauge or histogram
    help: str
    labels: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


_VM: Final = ("vm", "pid")
_BY_LINE: Final = {  # keys: the fields of VcpuSecond that the metrics count
    "faults": Family("kvmtrace_vm_page_faults", "counter", "Page faults of the VM's guest.", _VM, ("kvm_page_fault",)),
    "refaults": Family("kvmtrace_vm_refaults", "counter", "Page faults on a page that the vCPU faulted on in the last "
                       "five seconds.", _VM, ("kvm_page_fault",)),
    "roots": Family("kvmtrace_vm_roots_built", "counter", "MMU roots built.", _VM, ("kvm_mmu_get_page",)),
    "smis": Family("kvmtrace_vm_smis", "counter", "System management interrupts.", _VM, ("kvm_smm_transition",)),
    "zaps": Family("kvmtrace_vm_tables_removed", "counter", "Page tables removed.", _VM, ("kvm_mmu_prepare_zap_page",)),
    "exits": Family("kvmtrace_vm_userspace_exits", "counter", "Exits to the VMM.", _VM, ("kvm_userspace_exit",)),
}  # fmt: skip
_HIDDEN: Final = ("faults", "refaults", "smis")  # not shown of guests whose entries a kernel does not show
_ENTRY: Final = TIME_KINDS[0]
_TIME: Final = Family("kvmtrace_vm_vcpu_seconds", "counter", "Time of the VM's vCPUs: in the guest, idle, waiting for "
                      "a CPU, other. Only of vCPUs of which this is known.", (*_VM, "state"), TIME_KINDS)  # fmt: skip
_EXITS: Final = Family("kvmtrace_vm_exit_seconds", "histogram", "From an exit to the vCPU's next entry, but for idle "
                       "ones.", _VM, TIME_KINDS)  # fmt: skip
_VCPUS: Final = Family(
    "kvmtrace_vm_vcpus", "gauge", "vCPUs that showed themselves in the last second.", _VM, TIME_KINDS
)
_EVENTS: Final = Family("kvmtrace_events", "counter", "Events recorded.", ("kind",))
_LOST: Final = Family("kvmtrace_events_lost", "counter", "Events that the rings refused.", ("kind",))
_DUMPS: Final = Family("kvmtrace_dumps", "counter", "Dumps made.", ("trigger",))
_REFUSED: Final = Family(
    "kvmtrace_dumps_refused", "counter", "Requests that made no dump: the quota was used up.", ("trigger",)
)
_FAILED: Final = Family("kvmtrace_dumps_failed", "counter", "Dumps that could not be written.")
_UPLOADED: Final = Family("kvmtrace_uploads", "counter", "Dumps uploaded (--upload).")
_DROPPED: Final = Family("kvmtrace_uploads_dropped", "counter", "Dumps dropped for want of room to wait (--upload).")
_WAITING: Final = Family("kvmtrace_uploads_waiting", "gauge", "Dumps that wait for their upload (--upload).")
_HELD: Final = Family("kvmtrace_window_bytes", "gauge", "Memory that the window takes.")
_SECONDS: Final = Family("kvmtrace_window_seconds", "gauge", "How far back the window goes.")
_CPU: Final = Family("kvmtrace_recorder_cpu_seconds", "counter", "CPU time of the recorder.")
_OVERHEAD: Final = Family("kvmtrace_overhead_ratio", "gauge", "What recording costs, of all CPUs (--max-overhead).")
_LEVEL: Final = Family("kvmtrace_level", "gauge", "1 for the level that is recorded at (--max-overhead).", ("level",))

FAMILIES: Final = (*_BY_LINE.values(), _TIME, _EXITS, _VCPUS, _EVENTS, _LOST, _DUMPS, _REFUSED, _FAILED,
                   _UPLOADED, _DROPPED, _WAITING, _HELD, _SECONDS, _CPU, _OVERHEAD, _LEVEL)  # fmt: skip


@dataclass
class _Vm:
    """What is counted of one VM since it was first seen."""

    name: str
    pid: int
    shown: int  # boot ns
    counts: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STATES, 0.0))
    vcpus: int = 0
    entered: bool = False  # whether a vCPU ever showed that it entered its guest: a KVM in software shows none

    def add_seconds(self, more: Mapping[str, float]) -> None:
        for state, seconds in more.items():
            self.seconds[state] += seconds


@dataclass(frozen=True)
class Sample:
    """One value of a family; that of a histogram is (counts in each bucket of BUCKETS and beyond, sum in seconds)."""

    family: Family
    labels: tuple[str, ...]
    value: Any


class FlightMetrics:
    """Counts rows by VM: `see` takes rows in order of time, `now` ends a second, any thread reads `samples`."""

    def __init__(self, idle_codes: tuple[int, ...], kinds: frozenset[str], time_of: ThreadTime | None) -> None:
        """`kinds` are those that are recorded; `time_of` reads a thread's CPU time."""
        self._idle_codes, self._kinds, self._time_of = idle_codes, kinds, time_of
        self._meters = Meters(idle_codes, time_of)
        self._vms: dict[int, _Vm] = {}
        self._next = 0
        self._left_out: frozenset[str] = frozenset()
        self._samples: tuple[Sample, ...] = ()
        self.names: dict[str, str] = {}  # of VMs, by their owner's process

    def see(self, rows: Rows) -> None:
        """Count rows."""
        self._meters.see(rows)

    def leave_out(self, kinds: frozenset[str]) -> None:
        """Expect no rows of these kinds from now on: their counts stop, and the vCPUs' states are not known."""
        self._left_out, exit_times = kinds, self._meters.exit_times
        self._meters = Meters(self._idle_codes, self._time_of)
        self._meters.exit_times = exit_times

    def now(self, at: int) -> bool:
        """End a second if one is over by `at` (boot ns), before which no more rows will come; return whether."""
        if at < self._next:
            return False
        began, self._next = self._next - SECOND, at + SECOND
        lines = self._meters.second(at)
        if began > 0:
            self._add(lines, at, (at - began) / SECOND)
        self._samples = tuple(self._of_vms())
        return True

    def samples(self) -> tuple[Sample, ...]:
        """Return the samples of all VMs, as of the last second."""
        return self._samples

    def _add(self, lines: list[VcpuSecond], at: int, seconds: float) -> None:
        for vm in self._vms.values():
            vm.vcpus = 0
        for line in lines:
            vm = self._vms.setdefault(line.pid, _Vm("", line.pid, at))
            vm.name, vm.shown = self.names.get(str(line.pid), line.vm), at
            for name in _BY_LINE:
                vm.counts[name] += getattr(line, name)
            if line.vcpu < 0:
                continue
            vm.vcpus += 1
            if line.guest is not None:
                vm.entered = True
                known = {"guest": line.guest, "idle": line.idle, "steal": line.steal}
                known["other"] = max(1 - sum(known.values()), 0)
                vm.add_seconds({state: share * seconds for state, share in known.items()})
        for pid in [pid for pid, vm in self._vms.items() if at - vm.shown > _FORGOTTEN]:
            del self._vms[pid]
            self._meters.exit_times.pop(pid, None)

    def _of_vms(self) -> Iterator[Sample]:
        shown = sorted(self._vms.values(), key=lambda vm: vm.pid)
        others = _Vm(OTHERS, 0, 0)
        for vm in shown[MOST_VMS:]:
            others.counts.update(vm.counts)
            others.add_seconds(vm.seconds)
            others.entered |= vm.entered
            others.vcpus += vm.vcpus
        for vm in [*shown[:MOST_VMS], *([others] if len(shown) > MOST_VMS else [])]:
            labels = (vm.name, str(vm.pid) if vm.pid else "")
            hidden = _HIDDEN if _ENTRY in self._kinds and not vm.entered else ()
            for name, family in _BY_LINE.items():
                if self._observed(family) and name not in hidden:
                    yield Sample(family, labels, vm.counts[name])
            if self._observed(_TIME):
                yield Sample(_VCPUS, labels, vm.vcpus)
                for state in STATES if any(vm.seconds.values()) else ():
                    yield Sample(_TIME, (*labels, state), vm.seconds[state])
                if (took := self._meters.exit_times.get(vm.pid)) is not None:
                    yield Sample(_EXITS, labels, (tuple(took.counts.tolist()), took.nanoseconds / SECOND))

    def _observed(self, family: Family) -> bool:
        return self._kinds.issuperset(family.needs) and self._left_out.isdisjoint(family.needs)


_FORGOTTEN: Final = 300 * SECOND  # ns after a VM's last row until its counts are dropped


@dataclass(frozen=True)
class RecorderFacts:
    """A recorder's own figures at one moment."""

    events: Mapping[str, int]
    lost: Mapping[str, int]
    dumps: Mapping[str, int]
    refused: Mapping[str, int]
    failed: int
    window_bytes: int
    window_seconds: float
    cpu_seconds: float
    overhead: float | None = None  # None: there is no bound on it
    level: str = ""
    levels: tuple[str, ...] = ()
    uploads: tuple[int, int, int] | None = None  # uploaded, dropped, waiting; None: nothing is to be uploaded

    def samples(self) -> Iterator[Sample]:
        """Yield these figures as samples of their families."""
        for family, values in (
            (_EVENTS, self.events),
            (_LOST, self.lost),
            (_DUMPS, self.dumps),
            (_REFUSED, self.refused),
        ):
            yield from (Sample(family, (label,), value) for label, value in values.items())
        yield Sample(_FAILED, (), self.failed)
        if self.uploads is not None:
            yield from (
                Sample(each, (), n) for each, n in zip((_UPLOADED, _DROPPED, _WAITING), self.uploads, strict=True)
            )
        yield Sample(_HELD, (), self.window_bytes)
        yield Sample(_SECONDS, (), self.window_seconds)
        yield Sample(_CPU, (), self.cpu_seconds)
        if self.overhead is not None:
            yield Sample(_OVERHEAD, (), self.overhead)
            yield from (Sample(_LEVEL, (level,), float(level == self.level)) for level in self.levels)
