"""Guests that are well: no soft-hang, no diagnosis, and no more time on faults and roots than their rows hold.

What the rows hold is counted without the model: from each exit for a fault, or with a root's load or unload in it, to
the entry after it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from analysis.queries.drawn import soft_hangs
from analysis.queries.recorded import stuck
from analysis.recorded_time import of_replay
from analysis.sources import Recording
from replay import plan
from replay.decode.capabilities import Capabilities
from replay.run import replay
from replay.timing.soft_hangs import OF_ROOTS
from replay.timing.timed_run import Settings, VmTime
from tests.corpus import CORPUS
from tests.replay.test_apart import AMD, HLT, INTEL, MS, TimedGuest
from traces.kernels.vendors import SVM, VMX
from traces.reader import Trace
from traces.synth import Parameters, synthesize

MORE = 0.02  # of a vCPU's time, on faults and roots, than its rows hold
OF_MMU = ("kvm_page_fault", "mmu_load", "mmu_unload", "mmu_free_roots", "kvm_mmu_get_page")
# Scenarios whose guests are not held up; the latter where roots are kept: under emulation their loss is a soft-hang.
WELL = ("steady", "huge", "dirty-log", "slot-create", "idle", "bar")
KEPT = tuple(f"{name}-{kernel}." for name in ("mmio", "wp-toggle", "two-vms") for kernel in ("6.1", "6.12", "7.x"))


def held_by_rows(path: Path) -> dict[tuple[int, int], float]:
    """By VM and vCPU, the share of its time that lies between exits with work of the MMU in them and the next entry."""
    rows = (
        pl.scan_parquet(path)
        .filter(pl.col("vcpu").is_not_null(), pl.col("kind").is_in(["kvm_exit", "kvm_entry", *OF_MMU]))
        .select("vm", "vcpu", "time", pl.col("kind").cast(pl.String))
        .collect()
    )
    shares = {}
    for key, of in rows.group_by("vm", "vcpu", maintain_order=True):
        held, left, mmu = 0, None, False
        for time, kind in of.select("time", "kind").iter_rows():
            if kind == "kvm_exit":
                left, mmu = time, False
            elif kind == "kvm_entry":
                held += time - left if left is not None and mmu else 0
                left = None
            else:
                mmu = True
        times = of["time"]
        shares[key[0], key[1]] = held / max(times.max() - times.min(), 1)  # type: ignore[operator]
    return shares


def assert_well(path: Path, *, share: bool = True) -> None:
    """`share`: hold the time on faults and roots against the rows; the lab's switch takes as long as a fault."""
    capabilities = Capabilities(Trace.open(path))
    recording = Recording.open(path)
    times = replay(plan.make(capabilities, [capabilities.own.name]), Settings(parts=400)).times
    recording.times = of_replay(recording.trace, times)
    assert soft_hangs(recording).collect().is_empty()
    assert stuck(recording).collect().is_empty()
    held = held_by_rows(path) if share else None
    for vm in times:
        _is_well(vm, held)


def _is_well(vm: VmTime, held: dict[tuple[int, int], float] | None) -> None:
    assert vm.stuck == []
    (outcome,) = vm.outcomes
    for vcpu in outcome.vcpus:
        assert not vcpu.stalls
        share = sum(vcpu.spent[each] for each in OF_ROOTS) / max(vcpu.wall, 1)
        assert held is None or share <= held.get((vm.vm, vcpu.id), 0.0) + MORE, (vm.vm, vcpu.id)


def drawn(number: int) -> Parameters:
    """One of the synthetic guests: idle, busy, with sparse faults, streaming, of one vCPU or many."""
    rng = np.random.default_rng([20261126, number])

    def one(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    return Parameters(
        policy=one("preserve", "async"),
        vms=one(1, 1, 1, 2),
        vcpus=one(1, 1, 2, 4, 16),
        smi_rate=one(0, 0, 1, 5),
        working_set=one(1, 8, 64, 200),
        memory=one(64 << 20, 1 << 30),
        locality=one("sequential", "zipf", "uniform", "mixed"),
        page_size=one("4k", "2m", "mixed"),
        memslot_rate=one(0, 0, 0, 2),
        exit_rate=one(0, 0, 50, 1000),
        duration=one(0.3, 1.0),
        seed=number,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", range(160))
def test_a_synthetic_guest_is_well(tmp_path: Path, number: int) -> None:
    path = tmp_path / "well.parquet"
    synthesize(path, drawn(number))
    assert_well(path)


def guest_of(vendor: str, number: int) -> TimedGuest:
    """A guest with either vendor's codes: it faults now and then, is interrupted, halts, and runs."""
    rng = np.random.default_rng([7, number])
    codes = SVM if vendor == AMD else VMX
    guest = TimedGuest(int(rng.integers(200, 2000)))
    guest.load()
    gfn = 16
    idle, rate = rng.random(), int(rng.integers(2_000, 2 * MS))
    for _ in range(int(rng.integers(200, 800))):
        rip = int(rng.choice([0x1000, 0x1004, 0x2000]))
        guest.wait(int(rng.integers(rate)))
        if rng.random() < idle:
            guest.exit(HLT[vendor], w1=rip)
            if rng.random() < 0.3:
                guest.of("kvm_userspace_exit", w0=5)
            guest.wait(int(rng.integers(10 * MS)))
        elif rng.random() < 0.5:
            guest.exit(codes.interrupt[0], w1=rip)
        else:
            gfn += int(rng.integers(1, 4))
            guest.exit(codes.nested_fault[0], w1=rip)
            guest.of("kvm_page_fault", w0=gfn << 12, w1=codes.fault.write, w2=rip, root=guest.root, role=guest.role)
            guest.of("kvm_mmu_spte_requested", w0=gfn, level=1, root=guest.root)
            guest.of("kvm_mmu_set_spte", w0=gfn, level=1, root=guest.root, w1=0xE67)
        guest.of("kvm_entry", root=guest.root, w0=rip)
    return guest


@pytest.mark.slow
@pytest.mark.parametrize("vendor", [AMD, INTEL])
@pytest.mark.parametrize("number", range(20))
def test_a_made_guest_is_well(tmp_path: Path, vendor: str, number: int) -> None:
    assert_well(guest_of(vendor, number).saved(tmp_path / "well.parquet", vendor))


# Recorded while the emulator itself got a tenth of a CPU: one of a hundred faults takes milliseconds there.
STARVED = {f"dirty-log-how-{how}-{kernel}" for how in ("clear", "ring") for kernel in ("6.1", "7.x")}
MOST = 1_000_000  # ns that all but one of a hundred faults take less than, elsewhere 0.2 ms


def corpus() -> list[Path]:
    """Not of Intel's emulator: its 512 first faults take 0.23 ms each, and so hold the guest up for over 100 ms."""
    found = sorted(CORPUS.glob("*.parquet"))
    named = [path for path in found if path.name.startswith((*WELL, *KEPT))]
    return [path for path in named if not path.stem.endswith(("-npt0", "-ept", "-ept0", "-eptad0", "-pml"))]


def all_but_the_longest_hundredth(path: Path) -> int:
    """In ns, from an exit for a fault to the entry after it."""
    kinds = ["kvm_exit", "kvm_page_fault", "kvm_entry"]
    rows = (
        pl.scan_parquet(path)
        .select("time", pl.col("kind").cast(pl.String), by=pl.struct("vm", "vcpu"))
        .filter(pl.col("kind").is_in(kinds))
        .with_columns(pl.col("kind", "time").shift(n).over("by").name.suffix(f"-{n}") for n in (1, 2))
        .filter(*(pl.col(f"kind{ago}") == kind for ago, kind in zip(("-2", "-1", ""), kinds, strict=False)))
    )
    return int(rows.select((pl.col("time") - pl.col("time-2")).quantile(0.99)).collect().item() or 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(STARVED))
def test_a_recording_that_is_left_out_was_starved(name: str) -> None:
    assert all_but_the_longest_hundredth(CORPUS / f"{name}.parquet") > MOST
    assert all_but_the_longest_hundredth(CORPUS / f"dirty-log-{name.rpartition('-')[2]}.parquet") < MOST


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in corpus() if path.stem not in STARVED], ids=lambda path: path.stem)
def test_a_recorded_guest_is_well(path: Path) -> None:
    assert_well(path, share=False)
