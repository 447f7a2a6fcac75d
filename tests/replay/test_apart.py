# SPDX-License-Identifier: Apache-2.0
"""Time that is the guest's, and time that is nobody's: halts, sleeps of the host, waits for a CPU, pauses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from replay import plan
from replay.decode.capabilities import Capabilities
from replay.decode.spans.suspends import Suspend, _gaps, _times, suspends
from replay.run import replay
from replay.timing.reference_clock import TimeCategory
from replay.timing.timed_run import Settings, VmTime
from tests import corpus
from tests.replay.recording import TID, Guest, manifest
from tests.traces.making import KVM_A, event, trace
from traces.reader import Trace
from traces.synth import Parameters, synthesize

MS = 1_000_000
AMD, INTEL = "AuthenticAMD", "GenuineIntel"
HLT = {AMD: 0x78, INTEL: 12}


class TimedGuest(Guest):
    """Rows with times: each comes `step` ns after the one before, or where `wait` puts it."""

    def __init__(self, step: int = 1000) -> None:
        super().__init__()
        self.step, self._waits = step, dict[int, int]()

    def wait(self, ns: int) -> None:
        """The next row comes so much later."""
        self._waits[len(self.rows)] = ns

    def saved(self, path: Path, vendor: str = AMD, **more: Any) -> Path:
        records = np.concatenate(self.rows)
        gaps = np.full(len(records), self.step)
        for at, ns in self._waits.items():
            gaps[at] += ns
        records["time"] = np.cumsum(gaps)
        given = manifest(**{"kernel": "6.12.9", "policy": "preserve", **more})
        given["host"]["vendor"] = vendor
        given["probes"] += [{"kind": kind, "how": "raw"} for kind in ("sched_in", "kvm_userspace_exit")]
        trace(path, records, given)
        return path


def timed(path: Path) -> VmTime:
    capabilities = Capabilities(Trace.open(path))
    return replay(plan.make(capabilities, [capabilities.own.name, "async"]), Settings()).times[0]


def spent(vm: VmTime, on: TimeCategory) -> int:
    return vm.recorded[0][on]


def stalls(vm: VmTime) -> list[Any]:
    return [stall for outcome in vm.outcomes for vcpu in outcome.vcpus for stall in vcpu.stalls]


@pytest.mark.parametrize("vendor", [AMD, INTEL])
@pytest.mark.parametrize("where", ["kernel", "userspace", "userspace with ioctls"])
def test_a_guest_that_halts_is_idle(tmp_path: Path, vendor: str, where: str) -> None:
    guest = TimedGuest()
    guest.load()
    guest.fault(4)
    for _ in range(20):
        guest.wait(50_000)
        guest.exit(HLT[vendor])
        if where != "kernel":
            guest.of("kvm_userspace_exit", w0=5)
        if where == "userspace with ioctls":
            guest.of("ioctl", w0=0x8090AE81)
            guest.of("ioctl_end", w0=0x8090AE81)
        guest.wait(100 * MS)
        guest.of("kvm_entry", root=guest.root)
    vm = timed(guest.saved(tmp_path / "t.parquet", vendor))
    assert abs(spent(vm, TimeCategory.IDLE) - 2_000 * MS) < 1 * MS
    assert spent(vm, TimeCategory.GUEST) >= 19 * 50_000
    assert not stalls(vm)
    for outcome in vm.outcomes:
        assert outcome.vcpus[0].spent[TimeCategory.IDLE] == spent(vm, TimeCategory.IDLE), "kept under every policy"


@pytest.mark.parametrize(("reason", "error"), [(8, 0), (24, 0), (10, -4)], ids=["SHUTDOWN", "SYSTEM_EVENT", "EINTR"])
def test_what_userspace_holds_back_is_paused(tmp_path: Path, reason: int, error: int) -> None:
    guest = TimedGuest()
    guest.load()
    for gfn in range(4, 40):
        guest.fault(gfn)
    guest.exit(0x7F)
    guest.of("kvm_userspace_exit", w0=reason, n=error)
    guest.wait(700 * MS)
    guest.of("kvm_entry", root=guest.root)
    guest.fault(50)
    vm = timed(guest.saved(tmp_path / "t.parquet"))
    assert abs(spent(vm, TimeCategory.PAUSED) - 700 * MS) < 1 * MS
    assert not stalls(vm)
    assert vm.fitted.costs.fault < 10_000


def test_userspace_that_emulates_slowly_is_no_pause(tmp_path: Path) -> None:
    guest = TimedGuest()
    guest.load()
    guest.fault(4)
    guest.exit(0x7B)
    guest.of("kvm_userspace_exit", w0=2)
    guest.wait(700 * MS)
    guest.of("kvm_entry", root=guest.root)
    guest.fault(50)
    vm = timed(guest.saved(tmp_path / "t.parquet"))
    assert spent(vm, TimeCategory.OTHER) > 699 * MS
    assert stalls(vm)


def test_a_thread_that_waits_for_a_cpu_is_stolen_from(tmp_path: Path) -> None:
    """In each fault the thread is off its CPU, and runnable; the fault costs what it took without."""
    guest = TimedGuest()
    guest.load()
    for gfn in range(4, 204):
        guest.fault(gfn, enter=False)
        guest.wait(3 * MS)
        guest.of("sched_in", w1=3 * MS)
        guest.of("kvm_entry", root=guest.root)
    vm = timed(guest.saved(tmp_path / "t.parquet"))
    assert spent(vm, TimeCategory.STEAL) == 200 * 3 * MS
    assert not stalls(vm)
    assert vm.fitted.costs.fault < 10_000
    for outcome in vm.outcomes:
        # What takes longer is stolen more from.
        assert outcome.vcpus[0].spent[TimeCategory.STEAL] == pytest.approx(200 * 3 * MS, rel=0.01)


def slept(tmp_path: Path, where: str, **more: Any) -> Path:
    guest = TimedGuest(10_000)
    guest.load()
    for gfn in range(4, 204):
        guest.fault(gfn, enter=gfn != 100)
        if gfn == 100:
            if where == "guest":
                guest.of("kvm_entry", root=guest.root)
                guest.exit(0x60)
            guest.wait(86_400 * 1000 * MS)
            guest.of("kvm_entry", root=guest.root)
    return guest.saved(tmp_path / "t.parquet", **more)


def test_a_silence_within_a_fault_is_no_fault(tmp_path: Path) -> None:
    """Without samples of the clocks a day's silence in the kernel can only be the host's."""
    path = slept(tmp_path, "fault")
    (found,) = suspends(Trace.open(path))
    assert found.assumed
    vm = timed(path)
    assert sum(vm.recorded[0]) < 100 * MS
    assert vm.fitted.costs.fault < 50_000
    assert "the host slept" in vm.marked
    assert not stalls(vm)


def test_samples_of_the_clocks_say_how_long_the_host_slept(tmp_path: Path) -> None:
    day = 86_400 * 1000 * MS
    clock = {"name": "boottime", "samples": [{"boot": 5_000, "mono": 5_000}, {"boot": day + 90_000, "mono": 90_000}]}
    path = slept(tmp_path, "guest", clock=clock)
    (found,) = suspends(Trace.open(path))
    assert (found.slept, found.assumed) == (day, False)
    assert sum(timed(path).recorded[0]) < 100 * MS


def test_where_the_clocks_agree_nothing_slept(tmp_path: Path) -> None:
    clock = {"name": "boottime", "samples": [{"boot": 5_000, "mono": 5_000}, {"boot": 90_000, "mono": 90_001}]}
    path = slept(tmp_path, "fault", clock=clock)
    assert not suspends(Trace.open(path))
    assert stalls(timed(path))


def test_a_row_of_the_recorder_says_when_the_host_slept(tmp_path: Path) -> None:
    guest = TimedGuest()
    guest.load()
    for gfn in range(4, 104):
        guest.fault(gfn)
    guest.wait(300 * MS)
    guest.exit(0x60)
    guest.rows.append(event("host_suspend", w0=400_000, w1=250 * MS))
    guest.of("kvm_entry", root=guest.root)
    path = guest.saved(tmp_path / "t.parquet")
    (found,) = suspends(Trace.open(path))
    assert found.slept == 250 * MS
    assert 50 * MS <= spent(timed(path), TimeCategory.GUEST) < 52 * MS


def test_a_silence_of_one_vm_is_not_the_hosts(tmp_path: Path) -> None:
    guest = TimedGuest(10_000)
    guest.load()
    guest.fault(4, enter=False)
    for _ in range(30):
        guest.wait(1_000 * MS)
        guest.rows.append(event("vm_create", kvm=KVM_A + 0x10000, tid=TID + 50, tgid=TID + 50))
    guest.of("kvm_entry", root=guest.root)
    assert not suspends(Trace.open(guest.saved(tmp_path / "t.parquet")))


def test_a_guest_may_run_and_halt_as_long_as_it_wants(tmp_path: Path) -> None:
    """A silence of a minute is the host's only where a vCPU would be in the kernel all that time."""
    guest = TimedGuest()
    guest.load()
    guest.wait(60_000 * MS)
    guest.exit(HLT[AMD])
    guest.wait(60_000 * MS)
    guest.of("kvm_entry", root=guest.root)
    path = guest.saved(tmp_path / "t.parquet")
    assert all(isinstance(each, Suspend) and each.assumed for each in suspends(Trace.open(path)))
    vm = timed(path)
    assert abs(spent(vm, TimeCategory.GUEST) - 60_000 * MS) < MS
    assert abs(spent(vm, TimeCategory.IDLE) - 60_000 * MS) < MS


@pytest.mark.parametrize("page_size", ["4k", "2m"])
def test_work_between_sparse_faults_is_the_guests(tmp_path: Path, page_size: str) -> None:
    path = tmp_path / "sparse.parquet"
    synthesize(
        path,
        Parameters(memory=1 << 30, smi_rate=0, locality="uniform", working_set=1, page_size=page_size, duration=2.0),
    )
    vm = timed(path)
    assert not stalls(vm)
    for outcome in vm.outcomes:
        (vcpu,) = outcome.vcpus
        assert vcpu.spent[TimeCategory.GUEST] > 0.99 * vcpu.wall
        assert vcpu.spent[TimeCategory.SWITCH] < 0.001 * vcpu.wall


@pytest.mark.parametrize("least", [100_000, MS, 100 * MS])
def test_silence_is_found_without_reading_rows_that_have_no_room_for_it(least: int) -> None:
    """The same as in all rows, on recordings of one VM and of several."""
    for path in corpus.RECORDINGS[::20]:
        recording = Trace.open(path)
        for vm in recording.metadata.vms:
            rows = (batch.column("time").to_numpy() for batch in recording.batches(["time"], vm=vm["id"]))
            assert _gaps(_times(recording, vm["id"], least), least) == _gaps(rows, least), path.name
