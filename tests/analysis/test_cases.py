# SPDX-License-Identifier: Apache-2.0
"""The cases of docs/cases.md that are answered, each as its user would ask: of a recording made by the lab."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

import kvmtrace
from analysis.queries import exit_times, leaves, mapped_pages, recorded, removed
from analysis.reading.sources import Recording
from tests.corpus import CORPUS
from tests.replay.test_apart import INTEL, TimedGuest
from traces.errors import Problem
from traces.synth import Parameters, synthesize

ROOT = Path(__file__).parents[2]
LIVELOCK = ROOT / "tests" / "recordings" / "lost-idt-livelock-7.x.parquet"


def of(name: str) -> Path:
    return CORPUS / f"{name}.parquet"


@cache
def said(path: Path, *options: str) -> str:
    """What `kvmtrace report` says, in one line."""
    done = CliRunner().invoke(kvmtrace.app, ["report", str(path), *options])
    assert done.exit_code == 0, done.output
    return re.sub(r"\s+", " ", done.stdout)


def why(name: str, cause: str) -> tuple[int, int]:
    """Faults that mapped a page again, and permissions repaired, for a cause."""
    found = removed.refaults(Recording.open(of(name))).collect().filter(cause=cause)
    return found["mapped"].sum(), found["fixes"].sum()


def test_leaves_have_a_memory_type(tmp_path: Path) -> None:
    """A device's pages are uncached, and with a device that snoops nothing the guest's PAT has a say on all."""
    (row,) = leaves.memory_types(Recording.open(of("steady-6.1-ept"))).collect().to_dicts()
    assert (row["type"], row["ignores_pat"], row["leaves"]) == ("WB", True, 513)
    guest = TimedGuest()
    guest.load()
    for gfn, word in ((0x10, 0x337), (0x11, 0x337), (0xC1080, 0x307), (0x12, 0x377), (0x13, 0)):
        guest.of("kvm_mmu_set_spte", w0=gfn, level=1, root=guest.root, w1=word)
    path = guest.saved(tmp_path / "vfio.parquet", INTEL)
    found = leaves.memory_types(Recording.open(path)).collect()
    assert found.select("type", "ignores_pat", "leaves", "low_gfn", "high_gfn").rows() == [
        ("WB", False, 2, 0x10, 0x11), ("UC", False, 1, 0xC1080, 0xC1080), ("WB", True, 1, 0x12, 0x12),
    ]  # fmt: skip
    assert "Memory types of leaves" in said(path, "--no-replay", "--format", "md")
    amd = Recording.open(of("steady-6.1"))
    with pytest.raises(Problem, match="leaves have a memory type in Intel's EPT only"):
        leaves.memory_types(amd)
    assert "memory_types" not in said(of("steady-6.1"), "--no-replay")


@pytest.mark.parametrize("kernel", ["6.1"])
def test_ksm_holds_up_a_guest(kernel: str) -> None:
    text = said(of(f"ksm-{kernel}"))
    assert "that are retried" in text
    assert "invalidations by MMU notifiers" in text
    assert "by ksmd" in text
    assert why(f"ksm-{kernel}", "notifier")[0] > 60


@pytest.mark.parametrize("kernel", ["6.1", "7.x"])
def test_a_notifier_storm_names_its_task(kernel: str) -> None:
    recording = Recording.open(of(f"notifier-storm-{kernel}"))
    (row,) = removed.removals(recording).collect().filter(cause="notifier").head(1).to_dicts()
    assert row["task"].startswith("kvmtrace-vmm")
    assert row["leaves"] > 100
    assert (row["low_gfn"], row["high_gfn"]) == (0x400, 0x41F)
    assert row["longest_ns"] > 0
    mapped, _ = why(f"notifier-storm-{kernel}", "notifier")
    assert mapped == row["leaves"]


def test_ioctls_have_names_and_durations() -> None:
    found = exit_times.ioctls(Recording.open(of("churn-6.1"))).collect()
    create = found.filter(ioctl="KVM_CREATE_VM").row(0, named=True)
    assert 0 < create["p50_ns"] <= create["p99_ns"] <= create["longest_ns"]


@pytest.mark.parametrize("kernel", ["6.1", "7.x"])
def test_nx_recovery_is_a_cause(kernel: str) -> None:
    recording = Recording.open(of(f"nx-recovery-{kernel}"))
    (row,) = removed.removals(recording).collect().filter(cause="nx_recovery").to_dicts()
    assert row["task"].startswith("kvm-nx-lpage")
    assert row["leaves"] > 10
    assert why(f"nx-recovery-{kernel}", "nx_recovery")[0] > 5


def test_a_page_in_a_bar_that_is_emulated() -> None:
    recording = Recording.open(of("bar-6.1"))
    (page,) = mapped_pages.unserved(recording).collect().to_dicts()
    assert (page["gfn"], page["slot"], page["why"]) == (0x208, None, "in no slot: emulated")
    out = exit_times.user_exits(recording).collect().filter(reason="KVM_EXIT_MMIO")
    assert out["returns"].to_list() == [20]
    assert recorded.stuck(recording).collect().is_empty()


def test_kvm_run_that_fails() -> None:
    text = said(of("efault-6.1"))
    assert re.search(r"KVM_RUN fails with EFAULT \(errno 14\), \d+ times: gfn 0x420 of slot 1 has no host page", text)


def test_an_idt_in_mmio_space() -> None:
    text = said(of("lost-idt-6.1"))
    assert re.search(r"is stuck in the recording: 4\d\d exits at RIP 0x1016", text)
    assert "KVM_EXIT_INTERNAL_ERROR (17)" in text
    assert "gpa 0x200018 (gfn 0x200), in no memslot" in text
    text = said(LIVELOCK)
    assert "14,086 exits at RIP 0x1017" in text
    assert "deliver an event" in text


def test_an_instruction_that_is_not_emulated() -> None:
    text = said(of("not-emulated-6.1"))
    assert "KVM_EXIT_INTERNAL_ERROR (17)" in text
    assert "by an instruction that KVM does not emulate" in text


def test_a_device_that_is_polled() -> None:
    text = said(of("mmio-poll-6.1"))
    assert "emulated MMIO at gpa 0x200000 (gfn 0x200), in no memslot" in text
    assert "the guest polls it" in text


@pytest.mark.parametrize("name", ["dirty-log-6.1", "dirty-log-7.x"])
def test_dirty_logging_is_why_pages_fault_twice(name: str) -> None:
    assert why(name, "get_dirty_log")[1] > 100
    rows = recorded.windows(Recording.open(of(name))).collect()
    assert 0 < rows["fixes"].sum() < rows["faults"].sum()


def test_a_triple_fault_is_no_hang() -> None:
    text = said(of("triple-fault-6.1"))
    assert "ends in KVM_EXIT_SHUTDOWN (8): a triple fault of the guest, the last of 10" in text
    assert "is stuck" not in text


@pytest.mark.parametrize("pages", ["4k", "2m"])
def test_a_guest_that_works_is_not_condemned(tmp_path: Path, pages: str) -> None:
    path = tmp_path / "t.parquet"
    synthesize(path, Parameters(policy="preserve", smi_rate=0, working_set=200, page_size=pages, duration=1.0, seed=1))
    text = said(path)
    assert "no soft-hang" in text
    assert re.search(r"spent (0|<0\.1|[01]\.\d) % of", text), text[:200]


def test_smis_are_why_pages_are_mapped_again() -> None:
    assert why("smi-storm-6.1-async", "smi")[0] > 2000
    assert why("smi-storm-6.1", "smi") == (0, 0), "this kernel keeps its roots"


def test_writes_to_flash() -> None:
    recording = Recording.open(of("flash-6.1"))
    pages = mapped_pages.unserved(recording).collect()
    assert set(pages["why"]) == {"writes to a read-only slot"}
    assert len(pages) == 16
    assert exit_times.user_exits(recording).collect().filter(reason="KVM_EXIT_MMIO")["returns"].to_list() == [320]
    assert recorded.stuck(recording).collect().is_empty()


@pytest.mark.parametrize("name", ["slot-delete-6.1", "slot-delete-7.x"])
def test_a_removed_slot_takes_pages(name: str) -> None:
    found = removed.removals(Recording.open(of(name))).collect().filter(cause="memslot")
    assert found["leaves"].sum() > 0
    assert why(name, "memslot")[0] > 0


@pytest.mark.parametrize("name", ["idle-6.1", "idle-how-userspace-6.1", "one-idle-6.1", "cow-6.1", "cow-7.x"])
def test_guests_that_are_well_have_no_diagnosis(name: str) -> None:
    assert recorded.stuck(Recording.open(of(name))).collect().is_empty()


@pytest.mark.parametrize("name", ["cow-6.1", "cow-7.x"])
def test_copy_on_write_is_a_notifier_of_the_vcpus_own(name: str) -> None:
    found = removed.refaults(Recording.open(of(name))).collect().filter(cause="notifier")
    assert found["mapped"].sum() == 512
    assert len(found["tid"].unique()) == 2


def test_the_table_has_all_26_and_names_tests_that_are_there() -> None:
    rows = re.findall(r"^\| (\d+) \|.*\|([^|]*)\|$", (ROOT / "docs" / "cases.md").read_text(), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 27))
    for number, held in rows:
        for name in re.findall(r"`(test_\w+)`", held):
            assert callable(globals().get(name)), (number, name)
        for file in re.findall(r"`(tests/[\w/]+\.py)`", held):
            assert (ROOT / file).is_file(), (number, file)


def test_every_recording_has_a_reason_beside_each_page() -> None:
    """Of what the tests above ask none is 'not explained'."""
    for name in ("ksm-6.1", "notifier-storm-6.1", "nx-recovery-6.1", "cow-6.1", "dirty-log-6.1", "slot-delete-6.1"):
        found = removed.refaults(Recording.open(of(name))).collect()
        assert not found.filter(pl.col("cause").is_in(["unseen", "other"]))["mapped"].sum(), name
