# SPDX-License-Identifier: Apache-2.0
"""The governor: steps down where recording costs too much and back up, and what that leaves in dumps."""

from __future__ import annotations

import json
import signal
import subprocess
from itertools import islice, pairwise
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.reading.sources import Recording
from analysis.reading.unseen import lost_windows
from analysis.report_model.trust import loss
from replay.validate.compare import _cut
from tests.flight.rows import KVM, Flight, Rows, entries, row
from tests.flight.test_flight_live import flying
from tests.flight.test_keeper import MS, ask, times
from tests.tracer.test_record_live import run
from tracer.flight.governor import Governor, levels
from tracer.flight.keeper import SECOND
from tracer.flight.verb import _share
from tracer.probing.bpf import kind_mask
from tracer.probing.probes import PRESETS, preset_kinds
from traces.errors import Problem
from traces.reader import Trace

MMU = preset_kinds("mmu")
TIME_ONLY = MMU - preset_kinds("time")


def went(governor: Governor, shares: list[float], start: float = 0.0) -> list[int]:
    return [governor.judge(start + number, share) for number, share in enumerate(shares, 1)]


def test_levels_go_from_what_was_asked_for_down_to_what_is_always_known() -> None:
    assert [level.name for level in levels("all", preset_kinds("all"))] == ["all", "mmu", "time", "roots", "counters"]
    assert [level.name for level in levels("roots", preset_kinds("roots"))] == ["roots", "counters"]
    for preset in PRESETS:
        steps = levels(preset, preset_kinds(preset))
        assert all(after.kinds < before.kinds for before, after in pairwise(steps))
        assert steps[-1].kinds == {"vm_create", "vm_destroy", "memslot", "ioctl", "ioctl_end"}
    listed = levels("list", frozenset({"kvm_exit", "kvm_tdp_mmu_spte_changed", "mmu_load"}))
    assert [level.name for level in listed] == ["list", "time", "roots", "counters"]


def test_a_storm_steps_down_each_second_and_calm_brings_it_back() -> None:
    governor = Governor(4, 0.01)
    assert went(governor, [0.2, 0.1, 0.05, 0.02]) == [1, 2, 3, 3]
    calm = went(governor, [0.001] * 40, 4)
    assert calm == sorted(calm, reverse=True)
    assert calm[-1] == 0
    assert calm.index(2) >= 8, "not before ten seconds at the lowest level"


def test_one_busy_second_is_none_too_much_but_five_are() -> None:
    governor = Governor(4, 0.01)
    assert set(went(governor, [0.005, 0.005, 0.03, 0.005, 0.005] * 4)) == {0}
    assert went(governor, [0.012] * 5, 20)[-1] == 1


def test_a_step_up_that_fails_waits_twice_as_long_before_the_next() -> None:
    governor, now, waits = Governor(2, 0.01), 0.0, []
    for _ in range(8):  # quiet at the lower level, a storm at the upper one
        now += 1
        assert governor.judge(now, 0.3) == 1
        began = now
        while governor.judge(now, 0.001) == 1:
            now += 1
        waits.append(now - began)
    assert waits == [10, 20, 40, 80, 160, 320, 640, 640]
    went(governor, [0.001] * 700, now)
    assert governor.judge(now + 701, 0.3) == 1
    assert went(governor, [0.001] * 10, now + 701)[-1] == 0, "after a long calm it begins anew"


@given(st.lists(st.floats(0, 0.2), max_size=200), st.integers(2, 5))
def test_it_goes_one_step_at_a_time_within_the_levels_and_never_up_while_it_costs_too_much(
    shares: list[float], steps: int
) -> None:
    governor, before = Governor(steps, 0.01), 0
    for number, share in enumerate(shares, 1):
        level = governor.judge(number, share)
        assert 0 <= level < steps
        assert abs(level - before) <= 1
        if level < before:
            assert governor.share <= 0.01
        before = level


def left_out(at: int, since: int, kinds: frozenset[str], level: int = 1) -> Rows:
    return row("left_out", at, w0=since, w1=kind_mask(kinds), w2=level)


@pytest.mark.slow
def test_a_dump_says_what_was_left_out_and_when(tmp_path: Path) -> None:
    flight = Flight(tmp_path)
    flight.give(entries(SECOND, 100, MS), 2 * SECOND)
    flight.give(left_out(3 * SECOND, 3 * SECOND - MS, TIME_ONLY), 3 * SECOND)
    flight.give(left_out(5 * SECOND, 5 * SECOND - MS, MMU - preset_kinds("roots"), 2), 5 * SECOND)
    asked = ask(flight, 6 * SECOND)
    flight.give(entries(6 * SECOND, 10, MS), 7 * SECOND)
    asked.answer.result(60)
    flight.give(left_out(8 * SECOND, 8 * SECOND - MS, frozenset(), 0), 8 * SECOND)
    flight.give(entries(9 * SECOND, 10, MS), 10 * SECOND)
    ask(flight, 10 * SECOND)
    first, second = (Trace.open(path).metadata for path in flight.close())
    for meta in (first, second):
        assert meta.complete, meta.discrepancies
        assert (meta.lost, meta.gap_count) == (0, 0)
        assert [each["since"] for each in meta.left_out] == [3 * SECOND - MS, 5 * SECOND - MS]
    assert [each["until"] for each in first.left_out] == [5 * SECOND, None]
    assert [each["until"] for each in second.left_out] == [5 * SECOND, 8 * SECOND]
    assert second.left_out_of("kvm_tdp_mmu_spte_changed") == [
        (3 * SECOND - MS, 5 * SECOND),
        (5 * SECOND - MS, 8 * SECOND),
    ]
    assert second.left_out_of("kvm_entry") == [(5 * SECOND - MS, 8 * SECOND)]
    assert second.left_out_of("mmu_load") == []
    assert second.may_lack("kvm_entry")
    assert not second.may_lack("mmu_load")
    recording = Recording.open(flight.thread.dumps.made[1])
    assert lost_windows(recording, "kvm_entry", SECOND).tolist() == [3, 4, 5, 6, 7], "counted from the first row"
    assert lost_windows(recording, "mmu_load", SECOND).tolist() == []
    assert "left out for up to" in loss(recording, None)
    assert _cut(second)[0] == 3 * SECOND - MS, "what is validated ends there"


def test_a_window_within_a_stretch_says_so_from_its_beginning(tmp_path: Path) -> None:
    flight = Flight(tmp_path, seconds=1e-9)
    flight.thread._manifest["probes"] = [
        {"kind": kind, "point": kind, "how": "tp", "why": ""} for kind in ("kvm_entry", "mmu_load")
    ]
    flight.give(left_out(2 * SECOND, 2 * SECOND, MMU - preset_kinds("roots"), 2), 3 * SECOND)
    flight.checkpoint(4 * SECOND, 4 * SECOND + MS)
    flight.give(row("mmu_load", 5 * SECOND, kvm=KVM, vcpu=0), 6 * SECOND)
    ask(flight, 6 * SECOND)
    (dump,) = flight.close()
    meta = Trace.open(dump).metadata
    begins = meta.raw["flight"]["begins"]
    assert begins >= 4 * SECOND
    assert times(dump)[0] == begins
    assert meta.left_out_of("kvm_entry") == [(2 * SECOND, meta.span[1])]
    how = {probe["kind"]: probe["how"] for probe in meta.probes}
    assert how == {"kvm_entry": "none", "mmu_load": "tp"}, "not observable in this window, by any reader"


def test_a_trigger_that_is_not_watched_says_nothing_and_begins_anew(tmp_path: Path) -> None:
    flight = Flight(tmp_path, triggers=["same-gfn > 100"])

    def faults(at: int, count: int) -> None:
        made = entries(at, count)
        made["kind"], made["w0"] = 19, 0x5000
        flight.give(made, at + count * 1000)

    faults(SECOND, 80)
    flight.give(left_out(2 * SECOND, 2 * SECOND, MMU - preset_kinds("roots"), 2), 2 * SECOND)
    flight.give(left_out(3 * SECOND, 3 * SECOND, frozenset(), 0), 3 * SECOND)
    faults(4 * SECOND, 80)
    assert flight.thread.dumps.made == []
    faults(5 * SECOND, 80)
    (dump,) = flight.close()
    assert "same-gfn" in dump.name


@pytest.mark.parametrize("text", ["1", "0%", "101%", "-1%", "one%", "1 %%"])
def test_what_is_no_share_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(Problem, match=r"--max-overhead .*: not a share of the host's CPUs; write it like 1% or 0\.5%"):
        _share(text)


@pytest.mark.live
@pytest.mark.usefixtures("live")
def test_live_it_falls_back_to_the_least_and_the_dump_has_no_row_of_what_was_left_out(tmp_path: Path, vmm: str) -> None:
    """A bound that nothing can keep: everything goes, in steps."""
    directory = tmp_path / "d"
    guest = subprocess.Popen([vmm, "storm", "--loops", "1000000"], stdout=subprocess.DEVNULL)
    try:
        with flying(directory, "--max-overhead", "0.001%") as flight:
            assert flight.stderr is not None
            changes = list(islice((line for line in flight.stderr if " now at the level " in line), 3))
            names = [line.split(" now at the level ")[1].split(";")[0].strip() for line in changes]
            assert names == ["time", "roots", "counters"]
            done = run("dump", directory, "--json")
            assert done.returncode == 0, done.stderr
            flight.send_signal(signal.SIGINT)
            said = flight.communicate(timeout=300)[1]
    finally:
        guest.kill()
        guest.wait()
    assert "recorded were mmu for " in said
    path = Path(json.loads(done.stdout)["path"])
    meta = Trace.open(path).metadata
    assert meta.complete, meta.discrepancies
    assert len(meta.left_out) == 3
    for stretch in meta.left_out:
        until = stretch["until"] or meta.span[1]
        rows = pl.scan_parquet(path).filter(
            pl.col("time") > stretch["since"] + 10**9, pl.col("time") < until, pl.col("kind").is_in(stretch["kinds"])
        )
        assert rows.select(pl.len()).collect().item() == 0
    report = run("report", path)
    assert "left out for up to" in report.stdout, report.stdout + report.stderr
