# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.traces.making import numbered, numbers_read, write
from traces import durable
from traces.errors import Problem
from traces.reader import Trace
from traces.recording import segment_writer
from traces.recording.compact import compact
from traces.recording.record_buffer import BATCH_ROWS
from traces.recording.segment_writer import MANIFEST, SegmentWriter
from traces.recording.segments import RECORD_SCHEMA, SegmentReader


def test_rows_come_back_in_order_over_several_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_writer, "SEGMENT_ROWS", BATCH_ROWS)
    writer = SegmentWriter(tmp_path / "a.kvmt", {"recorder": "test"})
    for first, count in ((0, 10), (10, 3 * BATCH_ROWS), (10 + 3 * BATCH_ROWS, 7)):
        writer.write(numbered(count, first))
    writer.close({"more": 1})
    reader = SegmentReader(tmp_path / "a.kvmt")
    assert numbers_read(tmp_path / "a.kvmt") == list(range(17 + 3 * BATCH_ROWS))
    assert len(list((tmp_path / "a.kvmt").glob("seg-*.arrows"))) == 4
    assert reader.manifest == {"recorder": "test", "more": 1, "closed": {"rows": 17 + 3 * BATCH_ROWS}}


def test_a_segment_is_an_ordinary_arrow_stream(tmp_path: Path) -> None:
    directory = write(tmp_path / "a.kvmt", numbered(100))
    table = pa.ipc.open_stream(directory / "seg-00000.arrows").read_all()
    assert table.schema == RECORD_SCHEMA
    assert table["w0"].to_pylist() == list(range(100))


def test_the_caller_may_reuse_its_memory(tmp_path: Path) -> None:
    records = numbered(50)
    writer = SegmentWriter(tmp_path / "a.kvmt", {})
    writer.write(records)
    records["w0"] = 7
    writer.close({})
    assert numbers_read(tmp_path / "a.kvmt") == list(range(50))


def test_nothing_is_written_over_an_earlier_recording(tmp_path: Path) -> None:
    write(tmp_path / "a.kvmt", numbered(5))
    with pytest.raises(Problem, match=r"a\.kvmt is what an earlier recording left: run `kvmtrace recover"):
        SegmentWriter(tmp_path / "a.kvmt", {})


def test_flushed_rows_are_there_without_close(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path / "a.kvmt", {})
    writer.write(numbered(30))
    writer.flush()
    writer.write(numbered(30, 30))
    assert numbers_read(tmp_path / "a.kvmt") == list(range(30))


@pytest.mark.slow
def test_truncation_at_every_byte_leaves_a_prefix(tmp_path: Path) -> None:
    directory = tmp_path / "a.kvmt"
    writer = SegmentWriter(directory, {})
    flushed = [0]  # rows that are durable once the segment has a given size
    sizes = [0]
    for first in range(0, 90, 30):
        writer.write(numbered(30, first))
        writer.flush()
        flushed.append(first + 30)
        sizes.append((directory / "seg-00000.arrows").stat().st_size)
    whole = (directory / "seg-00000.arrows").read_bytes()
    for size in range(len(whole)):
        (directory / "seg-00000.arrows").write_bytes(whole[:size])
        expected = max(rows for rows, needed in zip(flushed, sizes, strict=True) if needed <= size)
        reader = SegmentReader(directory)
        rows = [int(number) for _, columns in reader.batches() for number in columns["w0"]]
        assert rows == list(range(expected)), size
        assert reader.segments[0].why, "a cut must be noticed"


@pytest.mark.slow
def test_a_damaged_batch_is_never_taken_for_data(tmp_path: Path) -> None:
    directory = tmp_path / "a.kvmt"
    writer = SegmentWriter(directory, {})
    for first in range(0, 90, 30):
        writer.write(numbered(30, first))
        writer.flush()
    writer.close({})
    path = directory / "seg-00000.arrows"
    whole = path.read_bytes()
    rng = random.Random(1)
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        rows = numbers_read(directory)
        assert rows == list(range(len(rows)))
        assert len(rows) in (0, 30, 60, 90)


def test_a_seal_that_lies_about_its_rows_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "a.kvmt", numbered(30))
    path = directory / "seg-00000.arrows"
    whole = path.read_bytes()
    assert whole.count(b'"first": 0') == 1
    for lie in (b'"first": 8', b'"first": 9'):
        path.write_bytes(whole.replace(b'"first": 0', lie))
        assert numbers_read(directory) == []


def test_damage_costs_one_segment_and_row_numbers_stay_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_writer, "SEGMENT_ROWS", 40)
    directory = tmp_path / "a.kvmt"
    writer = SegmentWriter(directory, {})
    for first in range(0, 120, 40):
        writer.write(numbered(40, first))
        writer.flush()
    writer.close({"loss": {}})
    path = directory / "seg-00001.arrows"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    summary = compact(directory, tmp_path / "a.parquet")
    seq = [n for batch in Trace.open(tmp_path / "a.parquet").batches(["seq"]) for n in batch.column(0).to_pylist()]
    assert seq == [*range(40), *range(80, 120)]
    assert not summary.complete
    assert Trace.open(tmp_path / "a.parquet").metadata.raw["cut"]["rows_missing"] == 40


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"[" * 100_000, b"\xff\xfe"])
def test_without_a_sound_manifest_rows_are_recovered_all_the_same(tmp_path: Path, content: bytes) -> None:
    directory = write(tmp_path / "a.kvmt", numbered(20))
    (directory / MANIFEST).write_bytes(content)
    summary = compact(directory, tmp_path / "a.parquet")
    assert summary.events == 20
    assert not summary.complete
    assert summary.discrepancies[0].startswith(f"{MANIFEST}: ")


def test_a_directory_without_a_recording(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="no recording in here"):
        SegmentReader(tmp_path)
    with pytest.raises(Problem, match="cannot read it"):
        SegmentReader(tmp_path / "absent")


def _record_until_killed(directory: Path, acknowledge: int) -> None:
    """Write and flush numbered records for ever; after each flush, tell how many rows are durable."""
    writer = SegmentWriter(directory, {})
    rng = random.Random(os.getpid())
    rows = 0
    while True:
        for _ in range(rng.randrange(1, 6)):
            count = rng.randrange(1, 3000)
            writer.write(numbered(count, rows))
            rows += count
        writer.flush()
        writer.update_manifest({"progress": rows})
        os.write(acknowledge, f"{rows}\n".encode())


@pytest.mark.slow
def test_a_kill_at_any_moment_costs_no_flushed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_writer, "SEGMENT_ROWS", 20_000)
    rng = random.Random(3)
    for round_ in range(50):
        directory = tmp_path / f"{round_}.kvmt"
        output, acknowledge = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(output)
                _record_until_killed(directory, acknowledge)
            finally:
                os._exit(1)
        os.close(acknowledge)
        with os.fdopen(output) as stream:
            durable_rows = [int(stream.readline()) for _ in range(rng.randrange(12))]
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            durable_rows += [int(line) for line in stream.read().splitlines()]
        if not (directory / MANIFEST).exists():
            assert not durable_rows  # killed before the recording began
            continue
        rows = numbers_read(directory)
        assert rows == list(range(len(rows)))
        assert len(rows) >= (durable_rows or [0])[-1]
        manifest = json.loads((directory / MANIFEST).read_bytes())
        assert manifest.get("progress", 0) in (0, *durable_rows, len(rows))
        for _ in range(2):  # as often as you like
            summary = compact(directory, tmp_path / f"{round_}.parquet")
            assert summary.events == len(rows)
            assert not summary.complete
        assert Trace.open(tmp_path / f"{round_}.parquet").metadata.events == len(rows)
        shutil.rmtree(directory)


class _Faults:
    """Makes the n-th write, fsync or rename fail; counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
        self.calls = 0
        self._failing = failing
        for name in ("write_all", "sync", "replace"):
            monkeypatch.setattr(durable, name, self._wrap(getattr(durable, name), name == "write_all"))

    def _wrap(self, real, is_write):  # type: ignore[no-untyped-def]
        def call(target, data):  # type: ignore[no-untyped-def]
            self.calls += 1
            if self.calls == self._failing:
                if is_write:
                    real(target, bytes(data)[: len(bytes(data)) // 2])  # a disk fills up in the middle of a write
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(target, data)

        return call if is_write else lambda *arguments: self._plain(real, arguments)

    def _plain(self, real, arguments):  # type: ignore[no-untyped-def]
        self.calls += 1
        if self.calls == self._failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)


def test_each_write_fsync_and_rename_may_fail_while_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_writer, "SEGMENT_ROWS", 60)
    failing, finished = 0, False
    said: list[str] = []
    while not finished:
        failing += 1
        directory = tmp_path / f"{failing}.kvmt"
        flushed = 0
        writer = None
        with monkeypatch.context() as patch:
            faults = _Faults(patch, failing)
            try:
                writer = SegmentWriter(directory, {})
                for first in range(0, 120, 30):
                    writer.write(numbered(30, first))
                    writer.flush()
                    flushed = first + 30
                    writer.update_manifest({"at": flushed})
                writer.close({})
                finished = faults.calls < failing
                assert finished, "a failure went unnoticed"
            except Problem as problem:
                said.append(str(problem))
                if writer is None:
                    assert not directory.exists()
                    continue
                with pytest.raises(Problem):
                    writer.write(numbered(BATCH_ROWS, flushed))
        rows = numbers_read(directory)
        assert rows == list(range(len(rows)))
        assert len(rows) >= flushed
    assert failing > 20
    assert len(said) == failing - 1
    for number, line in enumerate(said, 1):
        assert re.fullmatch(rf"{tmp_path}/{number}\.kvmt: .*run `kvmtrace recover {tmp_path}/{number}\.kvmt`", line), (
            line
        )


@pytest.mark.slow
def test_each_write_fsync_and_rename_may_fail_while_compacting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(tmp_path / "a.kvmt", numbered(500))
    out = tmp_path / "a.parquet"
    failing, finished = 0, False
    said: list[str] = []
    while not finished:
        failing += 1
        with monkeypatch.context() as patch:
            faults = _Faults(patch, failing)
            try:
                compact(directory, out)
                finished = faults.calls < failing
                assert finished, "a failure went unnoticed"
            except Problem as problem:
                said.append(str(problem))
        assert numbers_read(directory) == list(range(500))
        assert not list(tmp_path.glob("*.tmp"))
        if out.exists():  # only the rename's own fsync can fail once the name is there
            assert Trace.open(out).metadata.events == 500
            out.unlink()
    assert failing > 5
    assert len(said) == failing - 1
    assert all(f"kvmtrace recover {directory}" in line for line in said)


def test_unwritable_places(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="cannot create it: No such file"):
        SegmentWriter(tmp_path / "absent" / "a.kvmt", {})
    directory = write(tmp_path / "a.kvmt", numbered(5))
    with pytest.raises(Problem, match=r"no such directory: the recording is safe in .*a\.kvmt"):
        compact(directory, tmp_path / "absent" / "a.parquet")


def test_records_beyond_one_batch_are_split(tmp_path: Path) -> None:
    directory = write(tmp_path / "a.kvmt", numbered(2 * BATCH_ROWS + 5))
    sizes = [len(columns["time"]) for _, columns in SegmentReader(directory).batches()]
    assert sizes == [BATCH_ROWS, BATCH_ROWS, 5]
    assert np.array_equal(numbers_read(directory), np.arange(2 * BATCH_ROWS + 5))
