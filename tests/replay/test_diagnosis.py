# SPDX-License-Identifier: Apache-2.0
"""A vCPU that gets no further is diagnosed by what its rows show, with these rows; one that goes on is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvmtrace
from replay import plan
from replay.decode.capabilities import Capabilities
from replay.run import replay
from replay.timing.diagnosis import Diagnosis, plainly, summed_up
from replay.timing.reference_clock import TimeCategory
from replay.timing.timed_run import Settings
from tests.replay.recording import TID
from tests.replay.test_apart import AMD, INTEL, MS, TimedGuest
from tests.traces.making import KVM_A, event
from traces.reader import Trace

REPEATS = 300
RIP = 0x4000
WRITE, RESERVED, GUEST = 1 << 1, 1 << 3, 1 << 32
READ_ONLY_SLOT = 2
Step = Callable[[TimedGuest, int], None]


def found(
    tmp_path: Path, step: Step, kernel: str = "6.12.9", times: int = REPEATS, slow: int = 0, cpu: str = AMD
) -> list[Diagnosis]:
    guest = TimedGuest()
    guest.slot(0, 512, 0x7F0000000000)
    guest.slot(0x400, 256, 0x7F1000000000, number=1)
    guest.slot(0x800, 256, 0x7F2000000000, number=2, flags=READ_ONLY_SLOT)
    guest.load()
    guest.fault(4)
    guest.exit(0x60, w1=0x3000)  # the RIP of an interrupt, elsewhere
    guest.of("kvm_entry", root=guest.root, w0=RIP)
    for i in range(times):
        guest.wait(slow)
        step(guest, i)
    guest.exit(0x60, w1=0x5000)
    guest.of("kvm_entry", root=guest.root, w0=0x5000)
    path = guest.saved(tmp_path / "t.parquet", kernel=kernel, vendor=cpu)
    capabilities = Capabilities(Trace.open(path))
    (vm,) = replay(plan.make(capabilities, [capabilities.own.name]), Settings()).times
    return vm.stuck


def fault(guest: TimedGuest, gpa: int, code: int = 4) -> None:
    guest.of("kvm_exit", w0=0x400, w1=RIP, w2=code, w3=gpa)
    guest.of("kvm_page_fault", w0=gpa, w1=code, w2=RIP, root=guest.root, role=guest.role)


def out(guest: TimedGuest, reason: int, error: int = 0, entry: int = RIP) -> None:
    guest.of("kvm_userspace_exit", w0=reason, n=error)
    guest.of("kvm_entry", root=guest.root, w0=entry)


def enter(guest: TimedGuest, rip: int = RIP) -> None:
    guest.of("kvm_entry", root=guest.root, w0=rip)


def fails(guest: TimedGuest, _: int) -> None:
    fault(guest, 0x400_000)
    out(guest, 0, -14)


def polls(guest: TimedGuest, _: int) -> None:
    fault(guest, 0xFE00_0004, GUEST | RESERVED | 4)
    out(guest, 6, entry=RIP + 6)


def stands_at_mmio(guest: TimedGuest, _: int) -> None:
    fault(guest, 0xFE00_0004, GUEST | RESERVED | 4)
    out(guest, 6)


def not_emulated(guest: TimedGuest, _: int) -> None:
    fault(guest, 0x4000_0000, GUEST | RESERVED | 4)
    guest.of("kvm_userspace_exit", w0=17)
    guest.of("kvm_inj_exception", w0=6)
    enter(guest)


def internal_error(guest: TimedGuest, _: int) -> None:
    guest.of("kvm_exit", w0=0x40, w1=RIP)
    out(guest, 17)


def resets(guest: TimedGuest, _: int) -> None:
    guest.of("kvm_exit", w0=0x7F, w1=RIP)
    out(guest, 8)


def served_again(guest: TimedGuest, _: int) -> None:
    fault(guest, 0x401_000)
    guest.of("kvm_mmu_spte_requested", w0=0x401, level=1, root=guest.root)
    guest.of("kvm_tdp_mmu_spte_changed", w0=0x401, w2=0xE67, level=1, root=guest.root)
    guest.of("kvm_mmu_set_spte", w0=0x401, level=1, root=guest.root, w1=0xE67)
    guest.vm("kvm_unmap_hva_range", w0=0x7F1000001000, w1=0x7F1000002000)
    guest.rows[-1]["tid"] = TID + 40
    guest.vm("kvm_tdp_mmu_spte_changed", w0=0x401, w1=0xE67, level=1, root=guest.root)
    enter(guest)


def invalidated(guest: TimedGuest, _: int) -> None:
    fault(guest, 0x401_000)
    guest.vm("kvm_unmap_hva_range", w0=0x7F1000001000, w1=0x7F1000002000)
    enter(guest)


def nothing_mapped(guest: TimedGuest, _: int) -> None:
    fault(guest, 0x401_000)
    enter(guest)


def reserved(guest: TimedGuest, _: int) -> None:
    fault(guest, 0x401_000, RESERVED | 4)
    enter(guest)


def uncached(guest: TimedGuest, _: int) -> None:
    fault(guest, 0xFE00_0004)
    guest.of("mark_mmio_spte", w0=0xFE000, root=guest.root)
    out(guest, 6)


def read_only(guest: TimedGuest, _: int) -> None:
    fault(guest, 0x800_000, WRITE)
    out(guest, 6)


def loads(guest: TimedGuest, _: int) -> None:
    fault(guest, 0x401_000)
    guest.of("kvm_mmu_set_spte", w0=0x401, level=1, root=guest.root, w1=0xE67)
    guest.of("mmu_load", root=guest.root, role=guest.role)
    enter(guest)


def strange(guest: TimedGuest, _: int) -> None:
    guest.of("kvm_exit", w0=0x72, w1=RIP)
    enter(guest)


def undefined(guest: TimedGuest, _: int) -> None:
    guest.of("kvm_exit", w0=0x46, w1=RIP)
    guest.of("kvm_inj_exception", w0=6)
    enter(guest)


def undelivered(guest: TimedGuest, _: int) -> None:
    guest.of("kvm_exit", w0=0x400, w1=RIP, w2=GUEST | RESERVED | 4, w3=0x4000_0018)
    enter(guest)


def undelivered_by_intel(guest: TimedGuest, _: int) -> None:
    guest.of("kvm_exit", w0=49, w1=RIP, w3=1 << 31 | 0x30E)
    enter(guest)


@pytest.mark.parametrize(
    ("step", "kernel", "kind", "says"),
    [
        (fails, "6.12.9", "run_error", "EFAULT (errno 14), 300 times: gfn 0x400 of slot 1 has no host page"),
        (stands_at_mmio, "6.12.9", "mmio", "gpa 0xfe000004 (gfn 0xfe000), in no memslot: each exit ends in"),
        (not_emulated, "6.12.9", "internal_error", "KVM_EXIT_INTERNAL_ERROR (17), 300 times, with #UD queued"),
        (internal_error, "6.12.9", "internal_error", "its suberror is in no row"),
        (resets, "6.12.9", "shutdown", "KVM_EXIT_SHUTDOWN (8), 300 times: a triple fault"),
        (served_again, "6.12.9", "served_again", "served and come again, 300 invalidations by MMU notifiers"),
        (invalidated, "6.12.9", "invalidated", "300 invalidations by MMU notifiers go on meanwhile"),
        (invalidated, "6.1.20", "invalidated", "300 invalidations by MMU notifiers go on meanwhile"),
        (nothing_mapped, "6.1.20", "mmu_seq", "2^31 invalidations"),
        (nothing_mapped, "5.19.0", "mmu_seq", "2^31 invalidations"),
        (nothing_mapped, "6.1.50", "unexplained", "not explained"),
        (nothing_mapped, "6.12.9", "unexplained", "not explained"),
        (nothing_mapped, "5.15.100", "unexplained", "not explained"),
        (reserved, "6.12.9", "reserved_bits", "reserved bit"),
        (uncached, "6.12.9", "mmio_uncached", "made anew for each access"),
        (read_only, "6.12.9", "read_only", "writes to the read-only slot 2"),
        (loads, "6.12.9", "roots", "loads a root again and again"),
        (strange, "6.12.9", "unexplained", "not explained"),
        (undefined, "6.12.9", "undefined", "KVM injects #UD each time"),
        (undelivered, "6.12.9", "event_delivery", "at gpa 0x40000018 (gfn 0x40000), in no memslot"),
        (invalidated, "6.12.9", "invalidated", f"; by {TID - 1}: kvm_unmap_hva_range"),
    ],
)  # fmt: skip
def test_the_cause_is_what_the_rows_show(tmp_path: Path, step: Step, kernel: str, kind: str, says: str) -> None:
    (one,) = found(tmp_path, step, kernel)
    assert one.kind == kind
    assert says in one.why
    assert (one.exits, one.rip) == (REPEATS, RIP)
    assert any("kvm_exit" in row for row in one.rows)
    seqs = [int(row.split()[1].replace(",", "")) for row in one.rows]
    assert seqs == sorted(seqs)
    assert all(seq >= one.seq for seq in seqs)


def test_an_event_that_cannot_be_delivered_on_intel(tmp_path: Path) -> None:
    (one,) = found(tmp_path, undelivered_by_intel, cpu=INTEL)
    assert one.kind == "event_delivery"
    assert "while an event is delivered to the guest" in one.why


@pytest.mark.parametrize("step", [fails, stands_at_mmio, nothing_mapped, undelivered])
@pytest.mark.parametrize("pages", [30, 170])
def test_one_that_is_held_up_for_a_part_of_a_loop_only(tmp_path: Path, step: Step, pages: int) -> None:
    """The loop is of one instruction: it goes on before, and after."""
    (one,) = found(tmp_path, lambda guest, i: (moves_on if not pages <= i < pages + 250 else step)(guest, i), times=500)
    assert 250 <= one.exits <= 252
    assert one.seq > 4 * (pages - 2)


def test_a_page_that_is_served_again_comes_with_its_history(tmp_path: Path) -> None:
    (one,) = found(tmp_path, served_again)
    shown = "\n".join(one.rows)
    assert "kvm_tdp_mmu_spte_changed gfn=0x401" in shown
    assert "kvm_unmap_hva_range" in shown
    assert f"[{TID + 40}]" in shown


def test_a_guest_that_polls_for_long_is_named_as_that(tmp_path: Path) -> None:
    def slowly(guest: TimedGuest, _: int) -> None:
        fault(guest, 0xFE00_0004, GUEST | RESERVED | 4)
        guest.of("kvm_userspace_exit", w0=6)
        guest.wait(MS)
        enter(guest, RIP + 6)

    (one,) = found(tmp_path, slowly)
    assert one.kind == "mmio"
    assert "polls" in one.why
    (tmp_path / "short").mkdir()
    assert not found(tmp_path / "short", polls), "300 reads of a device's register are no hang"
    (tmp_path / "busy").mkdir()
    assert not found(tmp_path / "busy", polls, slow=MS), "nor are they where the guest works between them"


def test_a_host_that_is_slow_with_a_page(tmp_path: Path) -> None:
    def waits(guest: TimedGuest, _: int) -> None:
        fault(guest, 0x401_000)
        guest.wait(3 * MS)
        enter(guest)

    (one,) = found(tmp_path, waits)
    assert one.kind == "host_page"


def moves_on(guest: TimedGuest, i: int) -> None:
    fault(guest, (16 + i) << 12)
    guest.of("kvm_mmu_set_spte", w0=16 + i, level=1, root=guest.root, w1=0xE67)
    enter(guest)


def copies_to_a_device(guest: TimedGuest, i: int) -> None:
    fault(guest, 0xFE00_0000 + 8 * i, GUEST | RESERVED | WRITE)
    out(guest, 6)


def halts(guest: TimedGuest, _: int, rip: int = RIP) -> None:
    guest.of("kvm_exit", w0=0x78, w1=rip)
    enter(guest, rip)


def halts_outside(guest: TimedGuest, _: int) -> None:
    guest.of("kvm_exit", w0=0x78, w1=RIP)
    out(guest, 5)


def writes_a_port(guest: TimedGuest, _: int) -> None:
    guest.of("kvm_exit", w0=0x7B, w1=RIP)
    out(guest, 2)


def runs(guest: TimedGuest, _: int) -> None:
    guest.wait(MS)
    guest.of("kvm_exit", w0=0x60, w1=RIP)
    enter(guest)


def asks_cpuid(guest: TimedGuest, _: int) -> None:
    guest.exit(0x72, w1=RIP)
    guest.wait(MS)
    enter(guest, RIP + 2)


def goes_round(guest: TimedGuest, i: int) -> None:
    moves_on(guest, i % 7)


def writes_flash(guest: TimedGuest, i: int) -> None:
    fault(guest, 0x800_000 + (i % 16 << 12), WRITE)
    out(guest, 6, entry=RIP + 3)


GOING = (moves_on, copies_to_a_device, halts, halts_outside, writes_a_port, runs, asks_cpuid, goes_round, writes_flash)


@pytest.mark.parametrize("step", GOING)
@pytest.mark.parametrize("times", [REPEATS, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_loop_that_goes_on_is_not_stuck(tmp_path: Path, step: Step, times: int) -> None:
    assert not found(tmp_path, step, times=times)


def test_a_long_loop_that_goes_on_does_not_hide_a_short_hang(tmp_path: Path) -> None:
    def both(guest: TimedGuest, i: int) -> None:
        if i < 1500:
            halts(guest, i, 0x7000)
        else:
            fails(guest, i)

    (one,) = found(tmp_path, both, times=1800)
    assert (one.kind, one.exits) == ("run_error", 300)


@pytest.mark.parametrize(("reason", "name"), [(8, "shutdown"), (9, "fail_entry"), (17, "internal_error")])
def test_a_vcpu_that_ends_so_is_named_from_one_row_on(tmp_path: Path, reason: int, name: str) -> None:
    guest = TimedGuest()
    guest.load()
    guest.fault(4)
    guest.exit(0x7F, w1=0x4005)
    guest.of("kvm_userspace_exit", w0=reason)
    guest.rows.append(event("zap_all", kvm=KVM_A, tid=TID - 1, tgid=TID - 1))
    capabilities = Capabilities(Trace.open(guest.saved(tmp_path / "t.parquet")))
    (vm,) = replay(plan.make(capabilities, [capabilities.own.name]), Settings()).times
    (one,) = vm.stuck
    assert (one.kind, one.exits, one.rip) == (name, 1, 0x4005)
    assert "ends in KVM_EXIT_" in one.said(plainly)
    assert not vm.outcomes[0].vcpus[0].stalls


FIELD = Path(__file__).parents[1] / "recordings" / "field-6.1.parquet"


def test_26_vms_of_a_real_kernel() -> None:
    """6.1: an IDT in MMIO (VM 4), triple faults (5 to 9), a polled device (25), halts (2, 3), EFAULT (26)."""
    capabilities = Capabilities(Trace.open(FIELD))
    times = replay(plan.make(capabilities, [capabilities.own.name]), Settings()).times
    kinds = {vm.vm: [each.kind for each in vm.stuck] for vm in times if vm.stuck}
    assert kinds == {
        4: ["internal_error"],
        **{vm: ["shutdown"] for vm in range(5, 10)},
        25: ["mmio"],
        26: ["run_error"],
    }
    said = summed_up([each for vm in times for each in vm.stuck])
    assert len(said) == 4
    assert "ends in KVM_RUN failing with EFAULT (errno 14): gfn 0x426 of slot 1 has no host page" in said[3]
    assert "KVM_EXIT_INTERNAL_ERROR (17), 287 times, with #UD queued" in said[0]
    assert "gpa 0xe000000c (gfn 0xe0000), in no memslot: each exit ends in KVM_EXIT_MMIO (6)" in said[1]
    assert "the guest polls it" in said[1]
    assert said[2] == "5 vCPUs (VMs 5 to 9) end in KVM_EXIT_SHUTDOWN (8): a triple fault of the guest"
    for vm in times:
        stalled = [stall for outcome in vm.outcomes for vcpu in outcome.vcpus for stall in vcpu.stalls]
        assert not stalled or vm.vm in (4, 25, 26), vm.vm
        if vm.vm in (2, 3):
            assert vm.recorded[0][TimeCategory.IDLE] > 0.9 * sum(vm.recorded[0])


def test_the_command_line_finds_it_without_being_asked() -> None:
    said = CliRunner().invoke(kvmtrace.app, ["replay", str(FIELD)]).stdout
    assert "vCPU 0 of VM 4 is stuck in the recording: 288 exits at RIP 0x4000" in said
    assert "row 1,768 +1.39 s kvm_userspace_exit KVM_EXIT_INTERNAL_ERROR (17)" in said
    (found,) = (
        each["stuck"]
        for each in json.loads(CliRunner().invoke(kvmtrace.app, ["replay", str(FIELD), "--json"]).stdout)["time"]["vms"]
        if each["vm"] == 4
    )
    assert found[0]["kind"] == "internal_error"
    assert len(found[0]["rows"]) > 4
