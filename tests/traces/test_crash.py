# SPDX-License-Identifier: Apache-2.0
"""What a recording keeps when it is killed, cut, damaged, or when the disk refuses: always a prefix, and which one.

Row number i of these recordings has `time` and `value` i, so whatever a recovery yields can be compared with that.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.waiting import PATIENCE, until
from traces import durable
from traces.errors import Problem
from traces.reader import Trace
from traces.record import RECORD
from traces.recording import segment_writer
from traces.recording.compact import compact
from traces.recording.recording_summary import Summary
from traces.recording.segment_writer import MANIFEST, SegmentWriter, segment_name
from traces.recording.segments import SegmentReader
from traces.schema import BY_NAME

pytestmark = pytest.mark.slow

KILLS = 50
KVM = 0xFFFF888100000000


def numbered(count: int, first: int) -> np.ndarray[Any, Any]:
    """Records number `first` and so on of a stream that two VMs share."""
    records = np.zeros(count, RECORD)
    number = np.arange(first, first + count)
    records["time"] = records["w0"] = number
    records["kvm"] = np.where(number % 2, np.uint64(KVM + 0x10000), np.uint64(KVM))
    records["kind"] = BY_NAME["kvm_mmu_zap_all_fast"].code
    records["vcpu"] = -1
    return records


def recovered(directory: Path, out: Path) -> tuple[Summary, list[int]]:
    """Recover, and check that every row is the record that its number says; the row numbers in order."""
    out.unlink(missing_ok=True)  # a recording is never overwritten
    summary = compact(directory, out)
    rows = sorted(
        row
        for batch in Trace.open(out).batches(["seq", "time", "value", "vm"])
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)
    )
    assert len(rows) == summary.events
    for seq, *found, vm in rows:
        assert found == [seq, seq]
        assert vm is not None
    assert len({(seq % 2, vm) for seq, _, _, vm in rows}) == min(2, len(rows)), "a VM's rows went to another"
    return summary, [seq for seq, *_ in rows]


def record_until_killed(directory: Path, said: Path, seed: int) -> None:
    """Write numbered records for ever, in pieces of any size; append the number of rows to `said` after each flush."""
    segment_writer.SEGMENT_ROWS = 8_000  # type: ignore[misc]
    rng = random.Random(seed)
    say = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    writer = SegmentWriter(directory, {"recorder": "test"})
    while True:
        for _ in range(rng.randrange(1, 5)):
            writer.write(numbered(rng.randrange(1, 3_000), writer.rows))
        writer.flush()
        os.write(say, f"{writer.rows}\n".encode())
        if rng.random() < 0.3:
            writer.update_manifest({"at": writer.rows})


def said_rows(said: Path) -> list[int]:
    """The numbers of rows that were flushed, as far as the writer got to say them."""
    return [int(line) for line in said.read_text().splitlines()] if said.exists() else []


def has_flushed(said: Path, flushes: int, writer: BaseProcess) -> bool:
    """Whether this many flushes are said to be done; an error where the writer will not get that far."""
    assert writer.is_alive(), "the writer ended by itself"
    return len(said_rows(said)) >= flushes


def test_sigkill_at_any_moment_costs_only_what_was_not_flushed(tmp_path: Path) -> None:
    # A fork server imports Arrow once; each writer is a process of its own all the same.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    rng = random.Random(1)
    kept, flushed_total = [], 0
    for kill in range(KILLS):
        directory, said, out = (tmp_path / f"{kill}.{suffix}" for suffix in ("kvmt", "said", "parquet"))
        writer = context.Process(target=record_until_killed, args=(directory, said, kill), daemon=True)
        writer.start()
        flushes, moment = rng.randrange(8), rng.uniform(0, 0.02)
        assert until(partial(has_flushed, said, flushes, writer)), "the writer is stuck"
        time.sleep(moment)
        writer.kill()
        writer.join(PATIENCE)
        assert writer.exitcode == -signal.SIGKILL
        flushed = (said_rows(said) or [0])[-1]
        assert flushes == 0 or flushed
        if not (directory / MANIFEST).exists():
            assert flushed == 0, "killed before the recording began, yet rows were flushed"
            continue
        summary, rows = recovered(directory, out)
        assert rows == list(range(len(rows)))
        assert len(rows) >= flushed
        assert not summary.complete
        assert any("did not end" in line for line in summary.discrepancies)
        first = out.read_bytes()
        compact(directory, out)
        assert out.read_bytes() == first, "a second recovery differs"
        kept.append(len(rows))
        flushed_total += flushed
    assert len(kept) > KILLS // 2
    assert len(set(kept)) > KILLS // 4, "the moments must differ"
    assert flushed_total


def piecewise(directory: Path, pieces: int, rows: int, per_segment: int | None = None) -> list[list[int]]:
    """A closed recording of `pieces` flushes of `rows` rows; for each segment its size after each of its flushes."""
    sizes: list[list[int]] = []
    writer = SegmentWriter(directory, {})
    for piece in range(pieces):
        if piece % (per_segment or pieces) == 0:
            sizes.append([])
        writer.write(numbered(rows, piece * rows))
        writer.flush()
        sizes[-1].append((directory / segment_name(len(sizes) - 1)).stat().st_size)
    writer.close({"loss": {}})
    return sizes


def test_truncation_at_every_byte_leaves_a_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, out = tmp_path / "a.kvmt", tmp_path / "a.parquet"
    [sizes] = piecewise(directory, pieces=2, rows=5)
    path = directory / segment_name(0)
    whole = path.read_bytes()
    monkeypatch.setattr(durable, "sync", lambda fd: None)  # nothing crashes here, and fsync is most of the time
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        expected = 5 * sum(needed <= size for needed in sizes)
        reader = SegmentReader(directory)
        rows = [int(value) for _, columns in reader.batches() for value in columns["time"]]
        assert rows == list(range(expected)), size
        if size % 61 and size not in sizes and size + 1 not in sizes:
            continue  # the whole way to a trace is gone at every 61st byte
        summary, rows = recovered(directory, out)
        assert rows == list(range(expected)), size
        assert not summary.complete, size
        assert any(line.startswith(segment_name(0)) for line in summary.discrepancies), size
    path.write_bytes(whole)
    assert recovered(directory, out)[1] == list(range(10))


def flip_bits(directory: Path, out: Path, bits: Iterable[int], sizes: list[int], rows: int) -> None:
    """Flip bits of the middle segment in turn; what is before the damage, and the other segments, must be left."""
    path = directory / segment_name(1)
    whole = path.read_bytes()
    before = len(sizes) * rows  # rows in each segment
    for bit in bits:
        offset = bit // 8
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << bit % 8
        path.write_bytes(damaged)
        summary, found = recovered(directory, out)
        intact = before + rows * sum(end <= offset for end in sizes)
        lost = set(range(3 * before)) - set(found)
        assert lost <= set(range(intact, 2 * before)), offset
        assert not lost or lost == set(range(min(lost), 2 * before)), offset
        assert summary.complete == (not summary.discrepancies)
        cut = Trace.open(out).metadata.raw["cut"]
        assert cut["rows_missing"] == len(lost), offset
        if lost:
            assert any(line.startswith(segment_name(1)) for line in summary.discrepancies), offset
            assert [segment["name"] for segment in cut["segments"]] == [segment_name(1)], offset
    path.write_bytes(whole)


def test_a_damaged_batch_costs_only_the_rest_of_its_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_writer, "SEGMENT_ROWS", 15)
    monkeypatch.setattr(durable, "sync", lambda fd: None)
    directory, out = tmp_path / "a.kvmt", tmp_path / "a.parquet"
    sizes = piecewise(directory, pieces=9, rows=5, per_segment=3)[1]
    size = (directory / segment_name(1)).stat().st_size
    flip_bits(directory, out, range(0, 8 * size, 411), sizes, 5)
    # The middle of a batch, where the values are: it and what follows in the segment is lost, and nothing else.
    path = directory / segment_name(1)
    damaged = bytearray(path.read_bytes())
    damaged[(sizes[0] + sizes[1]) // 2] ^= 0xFF
    path.write_bytes(damaged)
    summary, rows = recovered(directory, out)
    assert rows == [*range(20), *range(30, 45)]
    assert not summary.complete
    assert re.match(rf"{segment_name(1)}: .+: [\d,]+ bytes not read", summary.discrepancies[0])


def test_a_damaged_seal_never_renumbers_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_writer, "SEGMENT_ROWS", 15)
    monkeypatch.setattr(durable, "sync", lambda fd: None)
    directory, out = tmp_path / "a.kvmt", tmp_path / "a.parquet"
    sizes = piecewise(directory, pieces=9, rows=5, per_segment=3)[1]
    whole = (directory / segment_name(1)).read_bytes()
    seals = list(re.finditer(rb'"first": (\d+), "rows": (\d+), "crc32": (\d+)\}', whole))
    assert [int(seal[1]) for seal in seals] == [15, 20, 25]
    bits = [bit for seal in seals for group in (1, 2) for bit in range(8 * seal.start(group), 8 * seal.end(group))]
    flip_bits(directory, out, bits, sizes, 5)


class Failing:
    """While patched in, lets the n-th write, fsync or rename fail, and knows what a power cut would leave of a file."""

    def __init__(self, patch: pytest.MonkeyPatch, failing: int) -> None:
        self.calls = 0
        self.synced: dict[Path, int] = {}
        self._failing = failing
        for name, error in (("write_all", errno.ENOSPC), ("sync", errno.EIO), ("replace", errno.EIO)):
            # A real fsync would only cost time here: what it confirms is kept in `synced`.
            real = (lambda fd: None) if name == "sync" else getattr(durable, name)
            patch.setattr(durable, name, self._wrapped(name, real, error))

    def _wrapped(self, name: str, real: Callable[..., None], error: int) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            self.calls += 1
            if self.calls == self._failing:
                if name == "write_all":  # the disk fills up in the middle of a write
                    fd, data = arguments
                    real(fd, memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
                raise OSError(error, os.strerror(error))
            real(*arguments)
            if name == "sync":
                file = Path(f"/proc/self/fd/{arguments[0]}").readlink()
                self.synced[file] = file.stat().st_size

        return call

    def cut_power(self, directory: Path) -> None:
        """Take from every segment what no fsync confirmed."""
        for path in directory.glob("seg-*"):
            os.truncate(path, self.synced.get(path, 0))


def record_and_compact(directory: Path, out: Path, flushed: list[int]) -> None:
    writer = SegmentWriter(directory, {})
    for first in range(0, 120, 30):
        writer.write(numbered(30, first))
        writer.flush()
        flushed.append(writer.rows)
        writer.update_manifest({"at": writer.rows})
    writer.close({"loss": {}})
    compact(directory, out)


@pytest.mark.parametrize("power", [True, False], ids=["the power stays", "then the power goes"])
def test_each_write_fsync_and_rename_may_fail_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, power: bool
) -> None:
    monkeypatch.setattr(segment_writer, "SEGMENT_ROWS", 60)
    failing, finished = 0, False
    while not finished:
        failing += 1
        directory, out = tmp_path / f"{failing}.kvmt", tmp_path / f"{failing}.parquet"
        flushed = [0]
        with monkeypatch.context() as patch:
            failures = Failing(patch, failing)
            said = ""
            try:
                record_and_compact(directory, out, flushed)
                finished = True
            except Problem as problem:
                said = str(problem)
        if finished:
            assert failures.calls < failing, "a failure went unnoticed"
        else:
            assert len(said.splitlines()) == 1
            assert str(directory) in said
            assert os.strerror(errno.ENOSPC) in said or os.strerror(errno.EIO) in said
        if not power:
            failures.cut_power(directory)
        if flushed == [0] and not (directory / MANIFEST).exists() and not list(directory.glob("seg-*")):
            continue  # it failed before there was a recording
        assert not list(tmp_path.glob("*.parquet.tmp"))
        _, rows = recovered(directory, out)
        assert rows == list(range(len(rows)))
        assert len(rows) >= flushed[-1]
        assert not finished or rows == list(range(120))
        assert pq.read_metadata(out).num_rows == len(rows)
    assert failing > 30
