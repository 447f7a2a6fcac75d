# SPDX-License-Identifier: Apache-2.0
"""Rows are booked to what they are about, whichever thread shows them: vCPU, VM, address space, root.

Three scenarios in which the acting thread says the wrong thing: vCPU threads that act for each other and for the root
that is not loaded, one change of memory that two VMs share a process and a mapping for, and a vCPU thread whose page
faults zap in another VM. And one in which a vCPU comes late, as by hotplug.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from replay import plan
from replay.decode.capabilities import Capabilities
from replay.own_policy import Agreement
from replay.run import replay
from replay.validate.compare import validate
from replay.validate.validate_text import render
from tracer.lab import fetch, matrix, session
from tracer.lab.lab_kernels import Bootable
from traces.errors import ENVIRONMENT
from traces.metadata import Metadata
from traces.reader import Trace

pytestmark = pytest.mark.lab

SCENARIOS = ("other-thread", "one-mapping", "cross-fault", "late-vcpu", "churn")
_CREATE_VCPU = 0xAE41


def booking(kernel: str) -> object:
    """All tests of a kernel on one worker, which boots it once."""
    return pytest.param(kernel, marks=pytest.mark.xdist_group(f"booking-{kernel}"))


@pytest.fixture(scope="module", params=[booking("6.1"), booking("7.x")])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the scenarios' recordings, all of one boot."""
    fetch.fetch(request.param)
    directory = tmp_path_factory.mktemp(f"booking-{request.param}")
    rows, problems = matrix.record([matrix.Cell(scenario, (), request.param) for scenario in SCENARIOS], directory)
    assert not problems
    assert len(rows) == len(SCENARIOS)
    return directory


def rows(directory: Path, scenario: str) -> tuple[pl.DataFrame, Metadata]:
    (path,) = directory.glob(f"{scenario}-*.parquet")
    frame = pl.read_parquet(path).with_columns(pl.col("kind").cast(pl.String)).sort("seq")
    return frame, Trace.open(path).metadata


def of(frame: pl.DataFrame, *kinds: str) -> pl.DataFrame:
    return frame.filter(pl.col("kind").is_in(kinds))


def own_threads(frame: pl.DataFrame) -> dict[int, tuple[int, int]]:
    """The vCPU (VM, index) that each vCPU thread runs: by its entries, of which no other thread has any."""
    entries = of(frame, "kvm_entry").select("tid", "vm", "vcpu").unique()
    assert entries["tid"].is_unique().all()
    return {tid: (vm, vcpu) for tid, vm, vcpu in entries.rows()}


@pytest.mark.parametrize("scenario", SCENARIOS[:4])
def test_the_model_agrees_row_for_row(recorded: Path, scenario: str) -> None:
    (path,) = recorded.glob(f"{scenario}-*.parquet")
    report = validate(path)
    assert report.holds, render(report)
    assert report.complete, report.notes
    assert report.expected > 500


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_vm_begins_and_ends_in_a_thread_of_its_process(recorded: Path, scenario: str) -> None:
    """No reference of the recorder's is the last one: KVM would then destroy the VM in the recorder's context."""
    frame, metadata = rows(recorded, scenario)
    process = {thread["tid"]: thread["tgid"] for thread in metadata.threads}
    made, ended = (of(frame, kind) for kind in ("vm_create", "vm_destroy"))
    expected = {"other-thread": 1, "one-mapping": 2, "cross-fault": 2, "late-vcpu": 1, "churn": 3}[scenario]
    assert len(metadata.vms) == len(made) == len(ended) == expected
    assert {vm["origin"] for vm in metadata.vms} == {"created"}
    assert {vm["comm"] for vm in metadata.vms} == {"kvmtrace-vmm"}
    owners = {vm["id"]: vm["pid"] for vm in metadata.vms}
    assert [(vm, process[tid]) for vm, tid in ended.select("vm", "tid").rows()] == [
        (vm, owners[vm]) for vm in ended["vm"]
    ]
    loose = frame.filter(pl.col("vm").is_null())["kind"].unique().to_list()
    assert set(loose) <= {"ioctl", "ioctl_end"}, "only what is about /dev/kvm is about no VM"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_changed_spte_has_a_root_of_its_address_space_and_vm(recorded: Path, scenario: str) -> None:
    frame, metadata = rows(recorded, scenario)
    shift, width = metadata.raw["layout"]["role"]["smm"]
    changed = of(frame, "kvm_tdp_mmu_spte_changed")
    assert len(changed) > 500
    assert (changed["root"] > 0).all()
    roles = of(frame, "root_get").select(
        "vm", "root", space=(pl.col("role").cast(pl.Int64) // (1 << shift)) % (1 << width)
    )
    known = {(vm, root, space) for vm, root, space in roles.unique().rows()}
    assert set(changed.select("vm", "root", "as_id").unique().rows()) <= known


def test_vcpus_reset_unloaded_and_destroyed_by_another_vcpus_thread(recorded: Path) -> None:
    frame, _ = rows(recorded, "other-thread")
    threads = own_threads(frame)
    assert len(threads) == 2
    resets = of(frame, "mmu_reset", "mmu_unload").filter(pl.col("tid").is_in(list(threads)))
    foreign = [kind for kind, tid, vcpu in resets.select("kind", "tid", "vcpu").rows() if threads[tid][1] != vcpu]
    assert foreign.count("mmu_reset") >= 2
    assert foreign.count("mmu_unload") >= 1
    # What follows such a row in its thread is about the same vCPU.
    for kind in ("mmu_reset", "mmu_unload"):
        for seq, tid, vcpu in of(resets, kind).select("seq", "tid", "vcpu").rows():
            after = frame.filter(pl.col("seq") > seq, pl.col("tid") == tid).head(1)
            if after["kind"][0] == "mmu_free_roots":
                assert after["vcpu"][0] == vcpu
    notified = of(frame, "kvm_unmap_hva_range").filter(pl.col("tid").is_in(list(threads)))
    assert len(notified) >= 4
    assert all(threads[tid][1] == vcpu for tid, vcpu in notified.select("tid", "vcpu").rows())


def test_the_smm_roots_sptes_change_while_the_normal_root_is_loaded(recorded: Path) -> None:
    frame, _ = rows(recorded, "other-thread")
    smm = of(frame, "kvm_tdp_mmu_spte_changed").filter(pl.col("as_id") == 1)
    normal = of(frame, "kvm_tdp_mmu_spte_changed").filter(pl.col("as_id") == 0)
    assert set(smm["root"]).isdisjoint(normal["root"])
    entered = of(frame, "kvm_entry", "kvm_tdp_mmu_spte_changed").sort("seq")
    loaded: dict[int, int] = {}
    while_normal = 0
    for kind, tid, root, as_id in entered.select("kind", "tid", "root", "as_id").rows():
        if kind == "kvm_entry":
            loaded[tid] = root
        elif as_id == 1 and loaded.get(tid) in set(normal["root"]):
            while_normal += 1
    assert while_normal >= 2


def test_a_vcpu_that_comes_late_is_its_vms_and_finds_the_root(recorded: Path) -> None:
    frame, _ = rows(recorded, "late-vcpu")
    assert sorted(own_threads(frame).values()) == [(1, 0), (1, 1)]
    created = of(frame, "ioctl").filter(pl.col("code") == _CREATE_VCPU)["seq"].to_list()
    running = of(frame, "kvm_entry", "kvm_exit").filter(pl.col("vcpu") == 0)["seq"]
    assert len(created) == 2
    assert running.min() < created[1] < running.max(), "while the other one ran"
    assert created[1] < frame.filter(pl.col("vcpu") == 1)["seq"].min()
    assert of(frame, "root_get").select("vcpu", "root").rows() == [(0, 1), (1, 1)]
    (path,) = recorded.glob("late-vcpu-*.parquet")
    capabilities = Capabilities(Trace.open(path))
    replayed = replay(plan.make(capabilities, [capabilities.own.name]))
    (check,) = replayed.checks
    assert check.agreement is Agreement.AGREES
    found = {reading.count: reading.replayed for reading in check.readings}
    assert (found["roots created"], found["roots found"]) == (1, 1)


def test_one_change_of_memory_is_each_vms_own(recorded: Path) -> None:
    frame, _ = rows(recorded, "one-mapping")
    both = of(frame, "kvm_entry").group_by("vm").agg(pl.col("seq").min())["seq"].max()
    ranges = of(frame, "kvm_unmap_hva_range").filter(
        pl.col("seq") > both, pl.col("value") - pl.col("addr") > 4 << 20
    )  # of the guests' memory, while both have some
    by_vm = {
        vm: sorted(ranges.filter(pl.col("vm") == vm).select("addr", "value").rows()) for vm in ranges["vm"].unique()
    }
    assert len(by_vm) == 2
    assert len(set(map(tuple, by_vm.values()))) == 1, "both are notified of the same ranges"
    (count,) = {len(of(frame, "kvm_tdp_mmu_spte_changed").filter(pl.col("vm") == vm)) for vm in by_vm}
    assert count > 500, "and both lose the same pages"
    outside = of(frame, "kvm_tdp_mmu_spte_changed").filter(pl.col("vcpu").is_null())
    assert outside["vm"].value_counts()["count"].n_unique() == 1


def test_faults_of_one_vms_vcpu_thread_zap_in_the_other(recorded: Path) -> None:
    frame, _ = rows(recorded, "cross-fault")
    threads = own_threads(frame)
    (writer,) = [tid for tid, (vm, _) in threads.items() if vm == min(vm for vm, _ in threads.values())]
    zaps = of(frame, "kvm_tdp_mmu_spte_changed").filter(pl.col("tid") == writer, pl.col("vm") != threads[writer][0])
    assert len(zaps) >= 64
    assert zaps["vcpu"].null_count() == len(zaps), "the thread is no vCPU of that VM"
    notified = of(frame, "kvm_unmap_hva_range").filter(pl.col("tid") == writer)
    for vm, vcpu in notified.select("vm", "vcpu").unique().rows():
        assert vcpu == (threads[writer][1] if vm == threads[writer][0] else None)
    assert notified["vm"].n_unique() == 2


@pytest.mark.parametrize("lab_kernel", ["6.1"], indirect=True)
def test_a_kvm_without_btf_is_refused_with_the_reason(lab_kernel: Bootable, tmp_path: Path) -> None:
    """Its structs may lie anywhere: nothing is recorded by guesswork, and the user is told what is wrong."""
    (home,) = lab_kernel.modules
    for name in ("kvm.ko", "kvm_amd.ko"):
        (module,) = home.rglob(name)
        subprocess.run(["objcopy", "--remove-section", ".BTF", module, tmp_path / name], check=True)
    changed = replace(lab_kernel, modules=(*lab_kernel.modules, tmp_path))
    done = session.boot(changed, session.recorder(["true"], "mmu"))
    assert done.code == ENVIRONMENT
    assert len(done.stderr.splitlines()) == 1
    assert "the layout of struct kvm_mmu_page is not known: the kvm module loaded here has no BTF" in done.stderr
