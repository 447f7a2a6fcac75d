# SPDX-License-Identifier: Apache-2.0
"""Guests that are well: no soft-hang, no diagnosis, and no more time on faults and roots than their rows hold.

What the rows hold is counted without the model: from each exit for a fault, or with a root's load or unload in it, to
the entry after it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from analysis.queries.drawn import soft_hangs
from analysis.queries.recorded import stuck
from analysis.reading.recorded_time import of_replay
from analysis.reading.sources import Recording
from replay import plan
from replay.decode.capabilities import Capabilities
from replay.run import replay
from replay.timing.reference_clock import TimeCategory
from replay.timing.soft_hangs import OF_ROOTS
from replay.timing.stalls import Rule
from replay.timing.timed_run import Settings, VmTime
from tests.corpus import CORPUS
from tests.replay.test_apart import AMD, HLT, INTEL, MS, TimedGuest
from traces.kernels import at
from traces.kernels.vendors import SVM, VMX
from traces.reader import Trace
from traces.synth import Parameters, kvm_rows, life, mmu, source, synthesize

MORE = 0.02  # of a vCPU's time, on faults and roots, than its rows hold
OF_MMU = ("kvm_page_fault", "mmu_load", "mmu_unload", "mmu_free_roots", "kvm_mmu_get_page")
# Scenarios whose guests are not held up; the latter where roots are kept: under emulation their loss is a soft-hang.
WELL = ("steady", "huge", "dirty-log", "slot-create", "idle", "bar")
KEPT = tuple(f"{name}-{kernel}." for name in ("mmio", "wp-toggle", "two-vms") for kernel in ("6.1", "6.12", "7.x"))


def held_by_rows(path: Path) -> dict[tuple[int, int], int]:
    """By VM and vCPU, the ns that lie between exits with work of the MMU in them and the next entry."""
    rows = (
        pl.scan_parquet(path)
        .filter(pl.col("vcpu").is_not_null(), pl.col("kind").is_in(["kvm_exit", "kvm_entry", *OF_MMU]))
        .select("vm", "vcpu", "time", pl.col("kind").cast(pl.String))
        .collect()
    )
    found = {}
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
        found[key[0], key[1]] = held
    return found


def assert_well(path: Path, *, window_ms: int = 100, of: Collection[TimeCategory] = OF_ROOTS) -> None:
    """`window_ms`: how long a soft-hang is at least; `of`: what is compared with the rows."""
    capabilities = Capabilities(Trace.open(path))
    recording = Recording.open(path)
    rule = Rule(window=window_ms * MS)
    times = replay(plan.make(capabilities, [capabilities.own.name]), Settings(rule=rule, parts=400)).times
    recording.times = of_replay(recording.trace, times)
    assert soft_hangs(recording).filter(pl.col("length_ns") >= rule.window).collect().is_empty()
    assert stuck(recording).collect().is_empty()
    held = held_by_rows(path)
    for vm in times:
        _is_well(vm, held, of)


def _is_well(vm: VmTime, held: dict[tuple[int, int], int], of: Collection[TimeCategory]) -> None:
    assert vm.stuck == []
    (outcome,) = vm.outcomes
    for vcpu in outcome.vcpus:
        assert not vcpu.stalls
        spent = sum(vcpu.spent[each] for each in of)
        assert spent <= held.get((vm.vm, vcpu.id), 0) + MORE * vcpu.wall, (vm.vm, vcpu.id)


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
@pytest.mark.parametrize("vendor", [AMD, INTEL])
@pytest.mark.parametrize("number", range(80))
def test_a_synthetic_guest_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, number: int) -> None:
    path = tmp_path / "well.parquet"
    if vendor == INTEL:
        as_intels(monkeypatch)
    synthesize(path, drawn(number))
    assert Capabilities(Trace.open(path)).kernel.vendor.cpu == vendor
    assert_well(path)


def as_intels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`synth` makes what kvm_intel shows: VMX's exit reasons, EPT's qualifications, and SPTEs of EPT."""
    codes = {
        "EXIT_INTR": VMX.interrupt[0], "EXIT_CR0_WRITE": VMX.cr, "EXIT_RSM": VMX.rsm[0], "EXIT_IO": VMX.io[0],
        "EXIT_NPF": VMX.nested_fault[0], "READ": 0x181, "WRITE": 0x182, "FETCH": 0x184, "IO_INFO": 0xE00000,
    }  # fmt: skip
    for name, code in codes.items():
        for module in (kvm_rows, life):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, code)
    words = at("6.1").spte
    own = words.host_writable[1] | words.mmu_writable[1] | VMX.accessed | VMX.dirty | 6 << 3  # write-back
    monkeypatch.setattr(mmu, "_LINK", words.present | 7)
    monkeypatch.setattr(mmu, "_LEAF", words.present | own | 7)
    told = source.manifest

    def manifest(parameters: Parameters) -> dict[str, Any]:
        found = told(parameters)
        return found | {"host": found["host"] | {"vendor": INTEL}}

    monkeypatch.setattr(source, "manifest", manifest)


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
    """On Intel with EPT, too; not those whose guest pages itself in KVM's shadow MMU (npt=0, ept=0)."""
    found = sorted(CORPUS.glob("*.parquet"))
    named = [path for path in found if path.name.startswith((*WELL, *KEPT))]
    return [path for path in named if not path.stem.endswith(("-npt0", "-ept0"))]


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
    """A fault takes Intel's emulator 0.23 ms, ten times what it takes AMD's, and so long a soft-hang has to be.

    An exit and an entry take both as long as a fault: what lies between an entry and the next exit is in no fault.
    """
    intel = Trace.open(path).metadata.raw["host"]["vendor"] == INTEL
    beside_switches = [each for each in OF_ROOTS if each is not TimeCategory.SWITCH]
    assert_well(path, window_ms=1000 if intel else 100, of=beside_switches)


def test_there_are_as_many_as_there_should_be() -> None:
    vendors = Counter(Trace.open(path).metadata.raw["host"]["vendor"] for path in corpus())
    assert vendors.total() - len(STARVED) >= 50
    assert vendors[INTEL] >= 10
