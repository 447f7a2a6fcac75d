# SPDX-License-Identifier: Apache-2.0
"""Diagnoses of recordings that show less, or more at once: several vCPUs, either vendor, a part of a hang, losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from analysis.queries.recorded import stuck_vcpus
from analysis.reading.sources import Recording
from replay.timing.diagnosis import Diagnosis
from tests.replay.recording import TID
from tests.replay.test_apart import AMD, INTEL, MS, TimedGuest
from tests.thinned import thinned
from traces.kernels.vendors import SVM, VMX, Vendor

RIP, SLOT, MMIO = 0x4000, 0x401_000, 0xFE00_0004
READ = {AMD: 4, INTEL: 0x181}
WRITE = {AMD: 6, INTEL: 0x182}
MISCONFIG = 49
TIMER = {AMD: 0x7C, INTEL: 32}  # WRMSR, of the guest's timer interrupt


class Host:
    """A guest of either vendor on some kernel; `fault` and the others are of one vCPU."""

    def __init__(self, cpu: str = AMD, slots: bool = True) -> None:
        self.cpu, self.codes = cpu, self._codes(cpu)
        self.guest = TimedGuest()
        if slots:
            self.guest.slot(0, 512, 0x7F0000000000)
            self.guest.slot(0x400, 256, 0x7F1000000000, number=1)

    @staticmethod
    def _codes(cpu: str) -> Vendor:
        return SVM if cpu == AMD else VMX

    def begin(self, *vcpus: int) -> None:
        for vcpu in vcpus or (0,):
            self.guest.load(vcpu)
            self.enter(vcpu)

    def enter(self, vcpu: int = 0, rip: int = RIP) -> None:
        self.guest.of("kvm_entry", vcpu, root=self.guest.root, w0=rip)

    def fault(self, vcpu: int = 0, gpa: int = SLOT, code: int | None = None, rip: int = RIP) -> None:
        code = READ[self.cpu] if code is None else code
        self.guest.of(
            "kvm_exit", vcpu, w0=self.codes.nested_fault[0], w1=rip, w2=code, w3=gpa if self.cpu == AMD else 0
        )
        self.guest.of("kvm_page_fault", vcpu, w0=gpa, w1=code, w2=rip, root=self.guest.root, role=self.guest.role)

    def served(self, vcpu: int = 0, gpa: int = SLOT) -> None:
        self.fault(vcpu, gpa)
        self.guest.of("kvm_mmu_spte_requested", vcpu, w0=gpa >> 12, level=1, root=self.guest.root)
        self.guest.of("kvm_mmu_set_spte", vcpu, w0=gpa >> 12, level=1, root=self.guest.root, w1=0xE67)
        self.enter(vcpu, RIP + gpa % 512)

    def out(self, reason: int, vcpu: int = 0, error: int = 0, rip: int = RIP) -> None:
        self.guest.of("kvm_userspace_exit", vcpu, w0=reason, n=error)
        self.enter(vcpu, rip)

    def mmio(self, vcpu: int = 0, gpa: int = MMIO, rip: int = RIP) -> None:
        """An access that userspace emulates, and that does not get done."""
        if self.cpu == AMD:
            self.fault(vcpu, gpa, 1 << 32 | 1 << 3 | 4)
        else:
            self.guest.of("kvm_exit", vcpu, w0=MISCONFIG, w1=RIP)
            self.guest.of("handle_mmio_page_fault", vcpu, w0=gpa, w1=gpa >> 12)
        self.out(6, vcpu, rip=rip)

    def tick(self, vcpu: int = 0) -> None:
        """The guest's timer interrupt comes where it stands, and its handler has exits of its own."""
        for at in (0x9000, 0x9040):
            self.guest.exit(TIMER[self.cpu], vcpu, w1=at)
            self.enter(vcpu, at + 2)

    def found(self, path: Path, kernel: str = "6.12.9", **more: Any) -> list[Diagnosis]:
        self.guest.saved(path, kernel=kernel, vendor=self.cpu, **more)
        return stuck_vcpus(Recording.open(path))


def efault(host: Host, vcpu: int = 0) -> None:
    host.fault(vcpu, 0x400_000)
    host.out(0, vcpu, -14)


def retried(host: Host, vcpu: int = 0) -> None:
    host.fault(vcpu)
    host.enter(vcpu)


def internal(host: Host, vcpu: int = 0) -> None:
    host.guest.exit(0x40 if host.cpu == AMD else 33, vcpu, w1=RIP)
    host.out(17, vcpu)


def invalidated(host: Host, vcpu: int = 0) -> None:
    host.fault(vcpu)
    host.guest.vm("kvm_unmap_hva_range", w0=0x7F1000001000, w1=0x7F1000002000)
    host.enter(vcpu)


Step = Callable[[Host, int], None]
KINDS: dict[str, tuple[Step, str]] = {
    "run_error": (efault, "EFAULT (errno 14)"),
    "mmio": (Host.mmio, "each exit ends in KVM_EXIT_MMIO (6)"),
    "internal_error": (internal, "KVM_EXIT_INTERNAL_ERROR (17)"),
    "invalidated": (invalidated, "invalidations by MMU notifiers"),
    "unexplained": (retried, "not explained"),
}


def assert_shown(found: Diagnosis) -> None:
    """A diagnosis stands on rows of its own run."""
    assert any("kvm_exit" in row for row in found.rows)
    assert all(int(row.split()[1].replace(",", "")) >= found.seq for row in found.rows)


@pytest.mark.parametrize("cpu", [AMD, INTEL])
@pytest.mark.parametrize("kind", thinned(4, KINDS))
def test_either_vendors_codes(tmp_path: Path, cpu: str, kind: str) -> None:
    step, says = KINDS[kind]
    host = Host(cpu)
    host.begin()
    for _ in range(300):
        step(host, 0)
    (one,) = host.found(tmp_path / "t.parquet")
    assert (one.kind, one.exits) == (kind, 300)
    assert says in one.why
    assert_shown(one)


@pytest.mark.parametrize("cpu", [AMD, INTEL])
def test_two_vcpus_are_stuck_for_two_reasons_and_a_third_goes_on(tmp_path: Path, cpu: str) -> None:
    host = Host(cpu)
    host.begin(0, 1, 2)
    for i in range(400):
        host.fault(2)
        host.guest.vm("kvm_unmap_hva_range", w0=0x7F1000001000, w1=0x7F1000002000)
        efault(host, 0)
        host.served(1, 0x10_000 + i * 4096)
        host.enter(2)
    found = {each.vcpu: each for each in host.found(tmp_path / "t.parquet")}
    assert {vcpu: each.kind for vcpu, each in found.items()} == {0: "run_error", 2: "invalidated"}
    assert "served" not in found[2].why
    for each in found.values():
        assert_shown(each)


@pytest.mark.parametrize("cpu", [AMD, INTEL])
@pytest.mark.parametrize("kind", ["run_error", "invalidated", "unexplained", "internal_error"])
@pytest.mark.parametrize("each", [20, pytest.param(90, marks=pytest.mark.slow)])
def test_the_guests_own_timer_does_not_hide_it(tmp_path: Path, cpu: str, kind: str, each: int) -> None:
    """An interrupt comes between two tries; its handler has exits elsewhere, and comes back to the same instruction."""
    step, says = KINDS[kind]
    host = Host(cpu)
    host.begin()
    for i in range(600):
        step(host, 0)
        if i % each == each - 1:
            host.tick()
    (one,) = host.found(tmp_path / "t.parquet")
    assert one.kind == kind
    assert one.exits > 500
    assert says in one.why
    assert_shown(one)


@pytest.mark.slow
@pytest.mark.parametrize("each", [1, 2, 3, 5])
def test_a_loop_that_goes_on_with_exits_elsewhere_is_not_stuck(tmp_path: Path, each: int) -> None:
    """Its instruction gets done: what comes after an entry there is the exit of the next one."""
    host = Host()
    host.begin()
    for i in range(2000):
        host.fault()
        host.guest.of("kvm_mmu_set_spte", w0=0x401, level=1, root=host.guest.root, w1=0xE67)
        host.enter()
        if i % each == 0:
            host.tick()
        host.guest.exit(0x72, w1=RIP + 0x10)
        host.enter(rip=RIP + 0x12)
    assert not host.found(tmp_path / "t.parquet")


@pytest.mark.parametrize("kind", ["run_error", "mmio", "invalidated"])
def test_a_recording_that_begins_within_a_hang(tmp_path: Path, kind: str) -> None:
    """Of a VM that ran before: its slots are the snapshot's, and the first row is the middle of an exit."""
    step, _ = KINDS[kind]
    host = Host(slots=False)
    host.guest.rows.clear()
    host.guest.of("kvm_page_fault", w0=SLOT, w1=4, w2=RIP, root=host.guest.root, role=host.guest.role)
    host.enter()
    for _ in range(250):
        step(host, 0)
    slots = [{"slot": 1, "as_id": 0, "gfn": 0x400, "pages": 256, "hva": 0x7F1000000000, "flags": 0}]
    vm = {"kvm": int(host.guest.rows[0]["kvm"][0]), "tgid": TID - 1, "comm": "vmm", "vcpus": [{"id": 0, "tid": TID}],
          "slots": slots, "roots": []}  # fmt: skip
    (one,) = host.found(tmp_path / "t.parquet", snapshot={"vms": [vm]})
    assert one.kind == kind
    assert one.exits == 250
    assert ("in no memslot" in one.why) == (kind == "mmio")
    assert "slot 1" in one.why or kind == "mmio"


@pytest.mark.parametrize(
    ("step", "lacking", "kernel", "kind", "says"),
    [
        # Without userspace's exits: who emulates is not known, and EFAULT looks like a fault that is retried.
        (Host.mmio, ["kvm_userspace_exit"], "6.12.9", "mmio", "by KVM or by userspace: its exits are not in"),
        (retried, ["kvm_userspace_exit"], "6.1.20", "unexplained", "kvm_userspace_exit not recorded"),
        (retried, ["kvm_unmap_hva_range"], "6.1.20", "unexplained", "kvm_unmap_hva_range not recorded"),
        (retried, ["kvm_mmu_set_spte"], "6.1.20", "unexplained", "whether anything is mapped for them is not recorded"),
        (retried, [], "6.1.20", "mmu_seq", "2^31"),
    ],
)
def test_nothing_is_said_of_what_was_not_recorded(
    tmp_path: Path, step: Step, lacking: Collection[str], kernel: str, kind: str, says: str
) -> None:
    host = Host()
    host.begin()
    for _ in range(300):
        step(host, 0)
    rows = [row for row in host.guest.rows if not any(row["kind"] == code_of(name) for name in lacking)]
    host.guest.rows = rows
    path = tmp_path / "t.parquet"
    host.guest.saved(path, kernel=kernel, vendor=host.cpu)
    recording = Recording.open(path)
    meta = recording.metadata
    probes = tuple({**probe, "how": "none"} if probe["kind"] in lacking else probe for probe in meta.probes)
    recording.trace.metadata = dataclasses.replace(meta, probes=probes)
    (one,) = stuck_vcpus(recording)
    assert one.kind == kind
    assert says in one.why


def code_of(name: str) -> int:
    from traces.schema import BY_NAME

    return BY_NAME[name].code


@pytest.mark.parametrize("kind", ["run_error", "mmio", "unexplained"])
def test_what_shows_no_memslots_does_not_say_that_there_is_none(tmp_path: Path, kind: str) -> None:
    """As texts do not, unless somebody gives them."""
    step, _ = KINDS[kind]
    host = Host(slots=False)
    host.begin()
    for _ in range(300):
        step(host, 0)
    path = tmp_path / "t.parquet"
    host.guest.saved(path, kernel="6.1.20", vendor=host.cpu)
    recording = Recording.open(path)
    probes = tuple(
        {**probe, "how": "none"} if probe["kind"] == "memslot" else probe for probe in recording.metadata.probes
    )
    recording.trace.metadata = dataclasses.replace(recording.metadata, probes=probes)
    (one,) = stuck_vcpus(recording)
    assert "no memslot" not in one.why
    assert one.kind == kind, "and no kernel's bug where a device's register may be meant"


def test_losses_within_it_are_said(tmp_path: Path) -> None:
    host = Host()
    host.begin()
    for _ in range(300):
        retried(host)
    path = tmp_path / "t.parquet"
    (before,) = host.found(path, kernel="6.1.20")
    assert before.kind == "mmu_seq"
    recording = Recording.open(path)
    for kinds, kind in ((["kvm_entry"], "mmu_seq"), (["kvm_unmap_hva_range"], "unexplained")):
        gap = {"since": before.since + 1000, "until": before.since + 2000, "lost": 7, "cpu": 0, "kinds": kinds}
        loss = {name: {"lost": {"0": 7}} for name in kinds}
        recording.trace.metadata = dataclasses.replace(recording.metadata, gaps=(gap,), gap_count=1, loss=loss)
        (one,) = stuck_vcpus(Recording(recording.trace))
        assert one.kind == kind
        assert "events were lost meanwhile" in one.why
    gap |= {"since": before.until + 10**9, "until": before.until + 2 * 10**9}
    recording.trace.metadata = dataclasses.replace(recording.metadata, gaps=(gap,))
    (one,) = stuck_vcpus(Recording(recording.trace))
    assert "lost" not in one.why


@pytest.mark.parametrize(("error", "named"), [(-14, True), (-22, True), (-4, False), (-11, False)])
def test_a_vcpu_that_userspace_runs_no_more_after_an_error(tmp_path: Path, error: int, named: bool) -> None:
    """QEMU says `kvm run failed Bad address`, and stops the guest: there is one such row."""
    host = Host()
    host.begin()
    for i in range(50):
        host.served(0, 0x10_000 + i * 4096)
    host.fault(0, 0x400_000)
    host.guest.of("kvm_userspace_exit", w0=0, n=error)
    host.guest.wait(500 * MS)
    host.guest.vm("kvm_unmap_hva_range", w0=0x7F1000001000, w1=0x7F1000002000)
    found = host.found(tmp_path / "t.parquet")
    assert [each.kind for each in found] == (["run_error"] if named else [])
    if named:
        assert found[0].ended
        assert ("gfn 0x400 of slot 1 has no host page" in found[0].why) == (error == -14)
        assert "kvm_page_fault" in found[0].rows[0]


def test_memory_that_userspace_is_asked_for_is_no_failure(tmp_path: Path) -> None:
    """KVM_EXIT_MEMORY_FAULT comes with EFAULT, and userspace goes on after it."""
    host = Host()
    host.begin()
    host.fault(0, 0x400_000)
    host.guest.of("kvm_userspace_exit", w0=39, n=-14)
    assert not host.found(tmp_path / "t.parquet")


def test_a_hang_in_the_middle_between_work_and_work(tmp_path: Path) -> None:
    host = Host()
    host.begin()
    for i in range(400):
        host.served(0, 0x10_000 + i % 200 * 4096)
    for _ in range(260):
        efault(host)
    for i in range(400):
        host.served(0, 0x10_000 + i % 200 * 4096)
    (one,) = host.found(tmp_path / "t.parquet")
    assert one.kind == "run_error"
    assert 260 <= one.exits <= 262
