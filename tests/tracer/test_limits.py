# SPDX-License-Identifier: Apache-2.0
"""--max-events and --max-size hold, the books balance, and a host that slept shows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tracer import recorder
from tracer.probing import host
from tracer.probing.bpf import loss_table
from tracer.probing.program import COUNTERS
from tracer.recorder import SUSPEND, Recorder
from tracer.writer import SegmentThread
from traces.reader import Trace
from traces.record import RECORD
from traces.recording.compact import compact
from traces.recording.record_buffer import BATCH_ROWS
from traces.schema import BY_NAME

ENTRY, GAP = BY_NAME["kvm_entry"].code, BY_NAME["gap"].code


def records(count: int, cpu: int, first: int = 0, step: int = 2) -> np.ndarray[Any, Any]:
    """Entries at times first, first + step, ... (ns) on one CPU."""
    made = np.zeros(count, RECORD)
    made["time"] = 10**9 + first + step * np.arange(count)
    made["kind"], made["cpu"], made["w0"] = ENTRY, cpu, np.arange(count)
    return made


def emitted(*batches: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The probes' counters for these records."""
    counters = np.zeros(2, COUNTERS)
    for batch in batches:
        for record in batch[batch["kind"] != GAP]:
            counters["emitted"][record["cpu"], record["kind"]] += 1
    return counters


def test_the_first_events_in_order_of_time_are_kept(tmp_path: Path) -> None:
    """Each CPU's ring is read in turn: the limit must not keep one CPU's events and drop the other's."""
    even, odd = records(5000, 0), records(5000, 1, first=1)
    gap = records(1, 1, first=9001)
    gap["kind"], gap["w0"] = GAP, 0
    writer = SegmentThread(tmp_path / "a.kvmt", {}, max_events=3000)
    writer.write([even, np.concatenate([odd, gap])], 10**18)
    writer.close(lambda: {"loss": loss_table(emitted(even, odd), writer.turned_away)})
    assert writer.full == "3,000 events reached"
    compact(tmp_path / "a.kvmt", tmp_path / "a.parquet")
    trace = Trace.open(tmp_path / "a.parquet")
    rows = [row for batch in trace.batches(["time", "cpu", "kind"]) for row in batch.to_pylist()]
    kept = sorted(row["time"] - 10**9 for row in rows if row["kind"] != "gap")
    assert kept == list(range(3000))
    assert len(rows) == 3001, "gaps come on top: what was lost is said whatever the limit"
    assert trace.metadata.complete, trace.metadata.discrepancies


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_a_size_holds_within_one_batch(tmp_path: Path, limit: int) -> None:
    batches = [records(100_000, 0, first=200_000 * i) for i in range(8)]
    for batch in batches:
        batch["w1"] = np.random.default_rng(1).integers(0, 1 << 62, len(batch))  # does not compress
    writer = SegmentThread(tmp_path / "a.kvmt", {}, max_bytes=limit)
    for batch in batches:
        writer.write([batch], 10**18)
    writer.close(lambda: {"loss": loss_table(emitted(*batches), writer.turned_away)})
    assert writer.full == f"{limit:,} bytes reached"
    compact(tmp_path / "a.kvmt", tmp_path / "a.parquet")
    metadata = Trace.open(tmp_path / "a.parquet").metadata
    assert metadata.complete, metadata.discrepancies
    size = sum(path.stat().st_size for path in (tmp_path / "a.kvmt").iterdir())
    assert limit <= size <= limit + 2 * BATCH_ROWS * RECORD.itemsize
    assert 0 < metadata.events < 800_000


def test_without_a_limit_everything_is_kept(tmp_path: Path) -> None:
    writer = SegmentThread(tmp_path / "a.kvmt", {})
    writer.write([records(1000, 0)], 10**18)
    writer.close(lambda: {"loss": loss_table(emitted(records(1000, 0)), writer.turned_away)})
    assert writer.full == ""
    assert compact(tmp_path / "a.kvmt", tmp_path / "a.parquet").events == 1000


def test_a_manifest_counts_once_however_often_it_is_written(tmp_path: Path) -> None:
    writer = SegmentThread(tmp_path / "a.kvmt", {"much": "x" * 10_000})
    for _ in range(50):
        writer.flush(dict)
    writer.close(dict)
    assert 10_000 < writer.bytes_written < 20_000


def test_a_host_that_slept_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that loses its CPU between two clocks is no suspend; 9 s that only the boot clock has are."""
    looks = iter([(10, 0, 0), (20, 0, 4_000_000), (30, 0, 7_000_000), (40, 9_000_000_000, 9_000_000_050)])
    monkeypatch.setattr(host, "suspended", lambda: host.Suspended(*next(looks)))
    written: list[Any] = []
    fake = SimpleNamespace(
        _awake=host.suspended(), writer=SimpleNamespace(write=lambda batches, _: written.extend(batches))
    )
    for _ in range(3):
        Recorder._look_at_clocks(cast("Recorder", fake))
    ((row,),) = written
    assert (row["kind"], row["time"], row["w0"], row["vcpu"]) == (SUSPEND, 40, 30, -1)
    assert row["w1"] == 9_000_000_000 - 7_000_000
    assert row["w1"] >= recorder.SUSPENDED


def test_the_clocks_of_this_host_agree() -> None:
    look = host.suspended()
    assert 0 <= look.least <= look.most or look.least <= 0 <= look.most
