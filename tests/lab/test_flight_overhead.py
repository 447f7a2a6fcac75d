# SPDX-License-Identifier: Apache-2.0
"""What the comparison of flight recorders says of runs, and what it reads of the other recorders."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import flight_overhead, flight_recorders
from benchmarks.flight_recorders import SCENARIOS, flight
from benchmarks.measure import Run
from benchmarks.recorders import Kept
from tracer.probing import tracefs


def pair(bare: float, recorded: float, **facts: Any) -> list[dict[str, Any]]:
    runs = (
        Run("bare", guest_seconds=2 * bare, work_cpu_seconds=bare),
        Run("a recorder", guest_seconds=3 * recorded, work_cpu_seconds=recorded, recorder_cpu_seconds=1.0, **facts),
    )
    return [asdict(run) for run in runs]


def document(**pairs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    facts = {"date": "2026-11-27", "kernel": "6.1.0", "cpu": "AMD", "cpus": 1, "lab": "6.1-async", "load": 0.0}
    return {**facts, "scenario": "smi-storm", "loops": 20, "pairs": pairs}


def test_each_recorder_has_the_median_of_its_pairs_and_the_targets_are_compared() -> None:
    kept = Kept(1000, 5, 0)
    pairs = {
        flight("mmu"): [pair(1.0, 3.0, kept=kept), pair(2.0, 4.0, kept=kept), pair(1.0, 2.5, kept=kept)],
        flight("roots"): [pair(1.0, 1.0, kept=kept), pair(1.0, 0.5, why="refused")],
        "perf": [pair(1.0, 6.0, kept=Kept(10, None, 0))],
        "perf kvm stat live": [pair(1.0, 2.0, kept=Kept(0, None, 0))],
        "trace-cmd": [pair(1.0, 0.0, why="trace-cmd is not installed")],
    }
    said = flight_overhead.text(document(**pairs))
    assert "2026-11-27, kernel 6.1.0 (6.1-async, amd-icount of the lab), AMD, 1 CPU; smi-storm of 20 loops" in said
    assert "| --flight --events mmu | 2.50 (2.00 to 3.00) | 3.75 (3.00 to 4.50) | 1.0 | 1,000 | 5 |" in said
    assert "| --flight --events roots | 1.00 | 1.50 | 1.0 | 1,000 | 5 |" in said
    assert "| perf | 6.00 | 9.00 | 1.0 | 10 | the rest, overwritten |" in said
    assert "| perf kvm stat live | 2.00 | 3.00 | 1.0 | none |  |" in said
    assert "| trace-cmd | trace-cmd is not installed |" in said
    assert said.endswith("mmu: 2.50x of bare (wanted: at most 2.5x)\n\nroots: 1.00x of bare (wanted: at most 1.05x)")


def test_the_others_record_the_tracepoints_of_the_preset_that_this_kernel_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("kvm/kvm_exit", "kvm/kvm_emulate_insn", "kvmmmu/kvm_mmu_get_page"):
        directory = tmp_path / "events" / name
        directory.mkdir(parents=True)
        (directory / "format").write_text("")
    monkeypatch.setattr(tracefs, "MOUNT_POINTS", (tmp_path,))
    assert sorted(SCENARIOS["smi-storm"].tracepoints()) == ["kvm:kvm_exit", "kvmmmu:kvm_mmu_get_page"]
    commands = {
        recorder.program: recorder.command(tmp_path, ["vmm"])
        for recorder in flight_recorders.recorders(("kvm:kvm_exit",))
        if "kvm stat" not in recorder.name
    }
    assert "kvm:kvm_exit" in commands["perf"]
    assert "-e kvm:kvm_exit" in commands["trace-cmd"][2]
    assert commands["trace-cmd"][-1] == commands["perf"][-1] == "vmm"


def test_what_perf_kvm_stat_live_counted_is_added_up(tmp_path: Path) -> None:
    (tmp_path / "live").write_text("10:00:01\nTotal Samples:120, Total events handled time:1us.\nTotal Samples:3, \n")
    live = next(each for each in flight_recorders.recorders(()) if each.name == "perf kvm stat live")
    assert live.read(tmp_path) == Kept(123, None, 0)
