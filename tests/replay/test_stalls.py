# SPDX-License-Identifier: Apache-2.0
"""Soft-hangs in progress, and vCPUs stuck at an instruction."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.decode.batch import COLUMNS, Batch
from replay.decode.same_rip import RipRuns
from replay.timing.stalls import RCU_STALL, SOFT_LOCKUP, Rule, stalls, watchdogs
from replay.timing.stuck_rip import RipRun, longest_runs
from traces.reader import Trace

CORPUS = Path(__file__).parents[2] / "traces" / "corpus"
MS = 1_000_000


def progress(*periods: tuple[int, float]) -> tuple[Any, Any]:
    """Moments 1 ms apart through periods of (ms, guest share)."""
    time, guest = [0], [0.0]
    for ms, share in periods:
        for _ in range(ms):
            time.append(time[-1] + MS)
            guest.append(guest[-1] + share * MS)
    return np.array(time, np.int64), np.array(guest).astype(np.int64)


def test_a_stall_is_found_where_it_is() -> None:
    (found,) = stalls(*progress((500, 0.9), (300, 0.01), (500, 0.9)), Rule())
    # A window may reach a little beyond the stall: 10 % of 100 ms is 11 ms of a guest that runs 90 % of the time.
    assert 489 * MS <= found.begin <= 500 * MS
    assert 800 * MS <= found.end <= 811 * MS
    assert found.guest < 0.1 * found.ns


@pytest.mark.parametrize(("ms", "share", "count"), [(300, 0.05, 1), (300, 0.2, 0), (80, 0.0, 0), (120, 0.0, 1)])
def test_what_is_too_short_or_not_slow_enough_is_none(ms: int, share: float, count: int) -> None:
    assert len(stalls(*progress((300, 1.0), (ms, share), (300, 1.0)), Rule())) == count


def test_the_rule_is_adjustable() -> None:
    slow = progress((300, 1.0), (300, 0.2), (300, 1.0))
    assert not stalls(*slow, Rule())
    assert len(stalls(*slow, Rule(share=0.3))) == 1
    assert not stalls(*slow, Rule(share=0.3, window=1_000 * MS))


def test_two_stalls_apart_are_two() -> None:
    assert len(stalls(*progress((300, 1.0), (200, 0.0), (400, 1.0), (200, 0.0), (300, 1.0)), Rule())) == 2


@given(st.lists(st.tuples(st.integers(1, 300), st.floats(0, 1)), min_size=1, max_size=8))
def test_stalls_are_stalls_in_order_and_apart(periods: list[tuple[int, float]]) -> None:
    time, guest = progress(*periods)
    rule = Rule()
    found = stalls(time, guest, rule)
    for stall in found:
        assert stall.ns >= rule.window
    for one, other in itertools.pairwise(found):
        assert one.end < other.begin
    # A whole window of nothing is never missed.
    still = np.flatnonzero(guest[100:] == guest[:-100]) if len(guest) > 100 else []
    for at in still:
        assert any(stall.begin <= time[at] and time[at + 100] <= stall.end for stall in found)


def test_watchdogs_of_the_guest() -> None:
    assert watchdogs(SOFT_LOCKUP - 1) == []
    assert watchdogs(SOFT_LOCKUP) == ["soft lockup"]
    assert watchdogs(RCU_STALL) == ["soft lockup", "RCU stall"]


def longest(trace: Trace, size: int, events: list[dict[str, Any]] | None = None) -> RipRun:
    """vCPU 0's longest run of exits at one RIP, in a trace or in these rows of one vCPU."""
    runs = RipRuns(1)
    numbers = np.array([0, -1], np.int32)
    for rows in trace.batches(COLUMNS, vm=1, size=size) if events is None else made(trace, events, size):
        runs.feed(Batch(rows, numbers))
    runs.finish()
    return longest_runs(runs, [0])[0]


def made(trace: Trace, events: list[dict[str, Any]], size: int) -> Iterator[pa.RecordBatch]:
    for at in range(0, len(events), size):
        part = events[at : at + size]
        kinds = pa.array([each["kind"] for each in part]).dictionary_encode()
        data = {
            name: pa.array([each.get(name, 0) for each in part], trace.schema.field(name).type)
            for name in COLUMNS
            if name != "kind"
        }
        yield pa.RecordBatch.from_pydict(data | {"kind": kinds})


@pytest.mark.parametrize("size", [7, 1000])
def test_a_run_has_what_is_in_its_rows_wherever_batches_are_cut(size: int) -> None:
    events: list[dict[str, Any]] = [{"kind": "kvm_exit", "rip": 1}]
    for _ in range(200):
        events += [{"kind": "kvm_entry", "rip": 7}, {"kind": "kvm_exit", "rip": 7, "code": 0x400}]
        events += [{"kind": kind, "addr": 0x5000, "code": 6} for kind in ("kvm_page_fault", "kvm_mmio")]
        events += [{"kind": kind} for kind in ("kvm_mmu_spte_requested", "kvm_mmu_set_spte", "mmu_load")]
        events += [{"kind": "kvm_userspace_exit", "ret": -14}, {"kind": "kvm_unmap_hva_range"}]
    events += [{"kind": "kvm_entry", "rip": 9}, {"kind": "kvm_exit", "rip": 9}]
    for seq, event in enumerate(events):
        event |= {"seq": seq, "time": 1000 + seq}
    run = longest(Trace.open(CORPUS / "steady-6.1.parquet"), size, events)
    assert (run.rip, run.exits, run.seq, run.still, run.addr) == (7, 200, 2, 200, 0x5000)
    counts = (run.faults, run.requested, run.installed, run.loads, run.errors, run.writes, run.notified)
    assert counts == (200,) * 7
    assert (run.error, run.moves, run.fresh, run.guest) == (14, 0, 1, 199)
    assert run.last - run.before == 9
    assert run.certain()
    assert run.certain(2009), "where KVM_RUN fails a tenth is enough"
    assert not run.certain(2010)
    works = replace(run, errors=99)
    assert works.certain()
    assert not works.certain(201)


def test_a_loop_of_one_instruction_is_progress() -> None:
    """512 pages are touched by one instruction: that is not its vCPU's longest run without progress."""
    assert longest(Trace.open(CORPUS / "steady-6.1.parquet"), 1 << 16).exits < 10
