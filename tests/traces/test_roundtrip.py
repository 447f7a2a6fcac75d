# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import streams
from tests.profiles import examples
from tests.traces.making import KVM_A, KVM_B, event, stream, trace
from tests.traces.reference import row
from traces.reader import Trace, kind_codes
from traces.record import RECORD
from traces.recording import compact as compaction
from traces.recording import record_buffer
from traces.recording.compact import compact
from traces.recording.segment_writer import SegmentWriter
from traces.schema import COLUMN_TYPES, KINDS

_WORD = st.one_of(st.integers(0, 20), st.integers(0, (1 << 64) - 1))
_FIELDS = {
    "time": st.integers(0, (1 << 63) - 1),
    "kvm": st.sampled_from([0, KVM_A, KVM_B]),
    "root": st.sampled_from([0, 5, 6]),
    **dict.fromkeys(("w0", "w1", "w2", "w3"), _WORD),
    "tid": st.integers(1, (1 << 22)),
    "tgid": st.sampled_from([7, 8]),
    "role": st.integers(0, (1 << 32) - 1),
    "n": st.integers(-(1 << 31), (1 << 31) - 1),
    "cpu": st.integers(0, 9000),
    "vcpu": st.integers(-1, 5000),
    "kind": st.one_of(st.sampled_from([kind.code for kind in KINDS]), st.integers(0, 255)),
    "level": st.integers(0, 5),
    "flags": st.integers(0, 255),
    "as_id": st.integers(0, 1),
}
_RECORDS = st.lists(st.fixed_dictionaries(_FIELDS), min_size=1, max_size=40)


def _records(given_rows: list[dict[str, int]]) -> np.ndarray[Any, Any]:
    records = np.zeros(len(given_rows), RECORD)
    for index, fields in enumerate(given_rows):
        for name, value in fields.items():
            records[name][index] = value
    return records


def _rows(opened: Trace) -> list[dict[str, Any]]:
    rows = [row for batch in opened.batches() for row in batch.to_pylist()]
    return sorted(rows, key=lambda row: int(row["seq"]))


@examples(150)
@given(given_rows=_RECORDS, cuts=st.lists(st.integers(0, 40), max_size=3), group=st.sampled_from([3, 1 << 20]))
def test_events_come_back_as_they_went_in(given_rows: list[dict[str, int]], cuts: list[int], group: int) -> None:
    records = _records(given_rows)
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "ROW_GROUP_ROWS", group)
        writer = SegmentWriter(Path(scratch) / "a.kvmt", {})
        for part in np.split(records, sorted(min(cut, len(records)) for cut in cuts)):
            writer.write(part)
            writer.flush()
        writer.close({"loss": streams.loss_table(records)})
        summary = compact(writer.directory, Path(scratch) / "a.parquet")
        opened = Trace.open(summary.path)
        rows = _rows(opened)
        scanned = opened.scan().sort("seq").collect().to_dicts()
    assert summary.complete, summary.discrepancies
    assert summary.events == len(records)
    assert [{name: row[name] for name in row if name not in ("vm", "root")} for row in rows] == [
        row(record, seq) for seq, record in enumerate(records)
    ]
    assert scanned == rows  # what polars reads without our code is the same
    assert sum(opened.counts().values()) == len(records)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three VMs' recording in row groups of 5,000 rows."""
    path = tmp_path_factory.mktemp("several") / "a.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "ROW_GROUP_ROWS", 5_000)
        patch.setattr(compaction, "BUFFERED_ROWS", 12_000)
        patch.setattr(record_buffer, "BATCH_ROWS", 1_000)
        parts = [streams.smi_storm(600, vm=vm) for vm in (1, 2)] + [streams.emulator_storm(400, vm=3)]
        trace(path, streams.interleave(parts))
    return path


def test_rows_of_a_vm_are_in_ring_order_and_row_groups_of_one_vm(several: Path) -> None:
    opened = Trace.open(several)
    assert len(opened.metadata.row_groups) > 4
    whole = pl.concat([pl.from_arrow(batch) for batch in opened.batches()])
    assert isinstance(whole, pl.DataFrame)
    assert whole["seq"].sort().to_list() == list(range(opened.metadata.events))
    for vm in opened.metadata.vms:
        rows = pl.concat([pl.from_arrow(batch) for batch in opened.batches(vm=vm["id"])])
        assert isinstance(rows, pl.DataFrame)
        assert rows["seq"].is_sorted()
        assert rows.equals(whole.filter(pl.col("vm") == vm["id"]))


@pytest.mark.parametrize("size", [1, 777, 1 << 16])
def test_batches_keep_to_size_and_columns(several: Path, size: int) -> None:
    opened = Trace.open(several)
    columns = ["rip", "seq", "vm", "kind"]
    count = 0
    for batch in opened.batches(columns, vm=1, size=size):
        assert batch.schema.names == columns
        assert 0 < batch.num_rows <= size
        count += batch.num_rows
        if size == 1 and count > 300:
            return
    assert count == sum(group.rows for group in opened.metadata.row_groups if group.vm == 1)


def test_only_constant_columns(several: Path) -> None:
    assert {value for batch in Trace.open(several).batches(["vm"], vm=2) for value in batch["vm"].to_pylist()} == {2}


def test_polars_reads_the_file_pleasantly(several: Path) -> None:
    schema = pl.scan_parquet(several).collect_schema()
    assert isinstance(schema["kind"], pl.Enum)
    assert list(schema) == list(COLUMN_TYPES)
    faults = pl.scan_parquet(several).filter(pl.col("kind") == "kvm_page_fault").select("vm", "addr", "rip").collect()
    assert faults.height == Trace.open(several).counts()["kvm_page_fault"]
    assert faults["addr"].min() != 0


def test_kind_codes(several: Path) -> None:
    opened = Trace.open(several)
    names = {kind.code: kind.name for kind in KINDS}
    for batch in opened.batches(["kind"], size=100):
        assert [names[code] for code in kind_codes(batch).tolist()] == batch["kind"].to_pylist()
        break


def test_a_recording_larger_than_memory_needs_a_few_row_groups_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "ROW_GROUP_ROWS", 1_000)
    monkeypatch.setattr(compaction, "BUFFERED_ROWS", 2_000)
    held = []
    real = compaction._Compaction._partition

    def watch(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        held.append(self._buffered)

    monkeypatch.setattr(compaction._Compaction, "_partition", watch)
    monkeypatch.setattr(record_buffer, "BATCH_ROWS", 500)
    trace(tmp_path / "a.parquet", streams.interleave([streams.smi_storm(300, vm=vm) for vm in range(1, 9)]))
    assert len(held) > 10
    assert max(held) <= 2_000


def test_loss_is_balanced_by_kind(tmp_path: Path) -> None:
    records = stream([event("kvm_entry", cpu=1)] * 3 + [event("kvm_exit")])
    writer = SegmentWriter(tmp_path / "a.kvmt", {})
    writer.write(records)
    table = {
        "kvm_entry": {"emitted": {"1": 5}, "lost": {"1": 2}},
        "kvm_exit": {"emitted": {"0": 1}, "lost": {}},
        "kvm_pio": {"emitted": {"0": 7}, "lost": {"0": 7}},
    }
    writer.close({"loss": table})
    summary = compact(writer.directory, tmp_path / "a.parquet")
    meta = Trace.open(summary.path).metadata
    assert (summary.complete, summary.lost) == (True, 9)
    assert (meta.emitted, meta.lost, meta.events) == (13, 9, 4)
    assert meta.loss["kvm_entry"] == {"emitted": {"1": 5}, "lost": {"1": 2}, "stored": {"1": 3}}


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ({"kvm_entry": {"emitted": {"0": 4}, "lost": {}}}, "kvm_entry: 4 emitted, but 3 stored and 0 lost"),
        ({"kvm_entry": {"emitted": {"0": 3}, "lost": {"0": 1}}}, "kvm_entry: 3 emitted, but 3 stored and 1 lost"),
        ({}, "kvm_entry: 0 emitted, but 3 stored and 0 lost"),
        (None, "the recorder left no loss counts"),
        ({"kvm_entry": 5}, "kvm_entry: 0 emitted, but 3 stored and 0 lost"),
    ],
)
def test_loss_that_does_not_balance_is_said(tmp_path: Path, table: Any, line: str) -> None:
    writer = SegmentWriter(tmp_path / "a.kvmt", {})
    writer.write(stream([event("kvm_entry")] * 3))
    writer.close({"loss": table})
    summary = compact(writer.directory, tmp_path / "a.parquet")
    assert not summary.complete
    assert summary.discrepancies == (line,)
    assert not Trace.open(summary.path).metadata.complete


def test_what_the_recorder_says_is_carried_through(tmp_path: Path) -> None:
    manifest = {"host": {"kernel": "6.1"}, "policy": {"name": "async", "why": "date"}, "later": [{"x": 1}]}
    trace(tmp_path / "a.parquet", stream([event("kvm_entry")]), manifest)
    meta = Trace.open(tmp_path / "a.parquet").metadata
    assert (meta.kernel, meta.policy, meta.raw["later"]) == ("6.1", "async", [{"x": 1}])


def test_an_empty_recording(tmp_path: Path) -> None:
    summary = trace(tmp_path / "a.parquet", np.zeros(0, RECORD))
    opened = Trace.open(tmp_path / "a.parquet")
    assert (summary.events, list(opened.batches()), opened.scan().collect().height) == (0, [], 0)
    assert opened.roots().height == 0
