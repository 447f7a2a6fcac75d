# SPDX-License-Identifier: Apache-2.0
"""A thousand mutated traces, and mutated segments: a correct reading or one line, never a traceback, hang or crash."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.traces.hostile import odd_metadata, with_metadata
from tests.traces.making import event, numbered, stream, trace, write
from traces.errors import Problem
from traces.reader import UNKNOWN_CODE, Trace, kind_codes
from traces.recording.compact import compact
from traces.recording.segment_writer import MANIFEST, segment_name
from traces.recording.segments import SegmentReader
from traces.summary import render

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"), [("bytes", 500), ("resealed", 300), ("metadata", 150), ("schema", 50)], ids=str
)
def test_mutated_traces(seed: Path, tmp_path: Path, kind: str, count: int) -> None:
    command = [sys.executable, "-m", "tests.traces.hostile", str(seed), kind, "0", str(count), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr[-2000:])
    assert done.stderr == ""
    pairs = list(zip(lines[:-1:2], lines[1:-1:2], strict=True))
    assert [mutant["mutant"] for mutant, _ in pairs] == list(range(count))
    refused = 0
    for mutant, result in pairs:
        outcome = result["outcome"]
        if outcome == "read":
            # Every byte is under a CRC: what was changed by chance is always seen.
            assert kind != "bytes" or not mutant["changed"], mutant
            continue
        refused += 1
        assert "mutant.parquet: " in outcome, outcome
        assert len(outcome.splitlines()) == 1
        assert outcome.isprintable()
    assert refused > count // 4, "the mutations must bite"
    assert lines[-1]["peak"] < 1 << 30


def test_mutated_segments(tmp_path: Path) -> None:
    directory = write(tmp_path / "a.kvmt", numbered(400))
    path = directory / "seg-00000.arrows"
    whole = path.read_bytes()
    for number in range(400):
        rng = random.Random(number)
        mutant = bytearray(whole)
        for _ in range(rng.choice((1, 2, 6))):
            at = rng.randrange(len(mutant))
            if rng.random() < 0.7:
                mutant[at] = rng.choice((0, 0x7F, 0xFF, rng.randrange(256)))
            elif rng.random() < 0.5:
                mutant[at : at + 8] = rng.choice((b"\xff" * 8, b"\xff\xff\xff\x7f" * 2, b"\0" * 8))
            else:
                del mutant[at : at + rng.randrange(1, 300)]
        path.write_bytes(mutant)
        rows = [int(number) for _, columns in SegmentReader(directory).batches() for number in columns["w0"]]
        assert rows in ([], list(range(400)))


def test_segments_of_another_schema(tmp_path: Path) -> None:
    directory = write(tmp_path / "a.kvmt", numbered(5))
    path = directory / "seg-00001.arrows"
    batch = pa.RecordBatch.from_pydict({"a": ["x"] * 10})
    with pa.ipc.new_stream(str(path), batch.schema) as out:
        out.write_batch(batch)
        out.write_batch(batch)
    summary = compact(directory, tmp_path / "a.parquet")
    assert summary.events == 5
    assert summary.discrepancies[0].startswith("seg-00001.arrows: not a segment of a recording")


@pytest.mark.slow
def test_whatever_the_manifest_says_the_rows_become_a_trace(tmp_path: Path) -> None:
    manifest = {
        "snapshot": {"vms": [{
            "kvm": 5, "tgid": 7, "comm": "qemu", "vcpus": [{"id": 0, "tid": 8}], "roots": [{"table": 9, "role": 1}],
            "slots": [{"slot": 0, "as_id": 0, "gfn": 0, "pages": 8, "hva": 1, "flags": 0}],
        }]},
        "threads": {"8": {"tgid": 7, "comm": "vcpu"}}, "probes": [{"kind": "kvm_entry", "how": "raw"}],
        "clock": {"name": "boottime", "samples": [{"boot": 1, "mono": 1, "real": 10**18}]},
        "host": {"kernel": "6.1", "model": "x"}, "policy": {"name": "async"}, "loss": {},
        "preset": "mmu", "recorder": "0.1", "command": ["a"], "closed": {"rows": 3},
    }  # fmt: skip
    directory = write(tmp_path / "a.kvmt", stream([event("kvm_entry", kvm=5, root=9, tgid=7)] * 3))
    for number in range(120):
        (directory / "manifest.json").write_bytes(odd_metadata(manifest, random.Random(number)))
        assert compact(directory, tmp_path / "a.parquet").events == 3
        opened = Trace.open(tmp_path / "a.parquet")
        assert sum(batch.num_rows for batch in opened.batches()) == 3
        assert opened.roots().height >= 1
        assert render(tmp_path / "a.parquet")
        (tmp_path / "a.parquet").unlink()  # another manifest makes another trace, which does not overwrite it


def _sample(path: Path) -> tuple[pa.Table, dict[str, object]]:
    trace(path, stream([event("kvm_entry", cpu=1, w0=5), event("kvm_exit")]))
    opened = Trace.open(path)
    return pa.Table.from_batches(list(opened.batches())), dict(opened.metadata.raw)


def test_a_newer_major_version_is_refused(tmp_path: Path) -> None:
    table, metadata = _sample(tmp_path / "a.parquet")
    newer = metadata | {"format": {"major": 2, "minor": 3}}
    (tmp_path / "b.parquet").write_bytes(with_metadata(table, [2], json.dumps(newer).encode()))
    with pytest.raises(Problem, match=r"b\.parquet: format 2\.3 is newer than this kvmtrace reads \(1\.x\): upgrade"):
        Trace.open(tmp_path / "b.parquet")


def _with_new_things(path: Path) -> None:
    """A trace of a later minor version: one more column, one more kind, more metadata."""
    table, metadata = _sample(path.with_name("a.parquet"))
    table = table.append_column("cgroup", pa.array(["a", "b"]))
    kinds = table["kind"].combine_chunks()
    kinds = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.uint8()), pa.array(["kvm_entry", "kvm_tdx_seam"]))
    table = table.set_column(6, pa.field("kind", kinds.type, nullable=False), kinds)
    later = metadata | {"format": {"major": 1, "minor": 9}, "kinds": {"kvm_entry": 1, "kvm_tdx_seam": 1}, "new": 5}
    draft = with_metadata(table, [2], json.dumps(later).encode())
    path.write_bytes(draft)
    chunks = pq.read_metadata(path).row_group(0)
    size = sum(chunks.column(index).total_compressed_size for index in range(chunks.num_columns))
    group = later["row_groups"][0] | {"size": size, "crc32": zlib.crc32(draft[4 : 4 + size])}  # type: ignore[index]
    later["row_groups"] = [group]
    path.write_bytes(with_metadata(table, [2], json.dumps(later).encode()))


def test_unknown_columns_kinds_and_metadata_of_a_later_minor_version_are_kept(tmp_path: Path) -> None:
    _with_new_things(tmp_path / "b.parquet")
    opened = Trace.open(tmp_path / "b.parquet")
    rows = [row for batch in opened.batches() for row in batch.to_pylist()]
    assert [(row["kind"], row["cgroup"]) for row in rows] == [("kvm_entry", "a"), ("kvm_tdx_seam", "b")]
    assert next(iter(opened.batches(["cgroup"]))).to_pydict() == {"cgroup": ["a", "b"]}
    assert (opened.metadata.format, opened.metadata.raw["new"]) == ((1, 9), 5)
    assert opened.scan().collect()["kind"].to_list() == ["kvm_entry", "kvm_tdx_seam"]
    assert kind_codes(next(iter(opened.batches()))).tolist() == [20, UNKNOWN_CODE]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"hello", b"PAR1" * 2, b"PAR1" + bytes(100) + b"PAR1", bytes(5000)])
def test_files_that_are_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(Problem, match=r"a\.parquet: (not a kvmtrace trace|damaged)"):
        Trace.open(tmp_path / "a.parquet")


def test_a_parquet_file_of_others(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": np.arange(5)}), tmp_path / "a.parquet")
    with pytest.raises(Problem, match="not a kvmtrace trace"):
        Trace.open(tmp_path / "a.parquet")


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"absent: No such file or directory"):
        Trace.open(tmp_path / "absent")
    with pytest.raises(Problem, match="a directory: give a file"):
        Trace.open(tmp_path)


def test_an_absent_column_is_said(tmp_path: Path) -> None:
    trace(tmp_path / "a.parquet", stream([event("kvm_entry")]))
    with pytest.raises(Problem, match="no column `nonsense`"):
        list(Trace.open(tmp_path / "a.parquet").batches(["seq", "nonsense"]))


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


_STRANGE_FILES: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a directory": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a terabyte": _sparse,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strange"),
    [(name, strange) for name in (MANIFEST, segment_name(0)) for strange in _STRANGE_FILES],
)
def test_strange_files_in_a_recording_are_named_and_do_not_hang(tmp_path: Path, name: str, strange: str) -> None:
    directory = write(tmp_path / "a.kvmt", numbered(20))
    (directory / name).unlink()
    _STRANGE_FILES[strange](directory / name)
    done = subprocess.run(
        [sys.executable, "-c", "import kvmtrace; kvmtrace.main()", "recover", str(directory)],
        cwd=ROOT, capture_output=True, text=True, timeout=1200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert name in done.stderr
    assert all(line.startswith(("kvmtrace: ", str(tmp_path))) for line in done.stderr.splitlines()), done.stderr
    assert Trace.open(tmp_path / "a.parquet").metadata.events == (20 if name == MANIFEST else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "odd",
    [
        {"threads": {"9" * 5000: {"comm": "x"}}},
        {"loss": {"a\nb\x1b[31m": {"emitted": {"0": 3}}}},
        {"closed": {"rows": "a\nb\x1b[31m"}},
        {"host": "\u00e9" * (30 << 20)},  # more than a trace's metadata has room for
        {"host": "\u00e9" * (10 << 20)},  # room only where it is not escaped
    ],
    ids=["thread id", "kind name", "closed", "too long", "long"],
)
def test_odd_manifests_become_readable_traces_and_single_lines(tmp_path: Path, odd: dict[str, Any]) -> None:
    directory = write(tmp_path / "a.kvmt", numbered(20))
    manifest = json.loads((directory / MANIFEST).read_bytes()) | odd
    (directory / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
    summary = compact(directory, tmp_path / "a.parquet")
    assert summary.events == 20
    assert all(line.isprintable() for line in summary.discrepancies), "these are printed as they are"
    assert Trace.open(tmp_path / "a.parquet").metadata.events == 20


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("time", (1 << 63) - 1),
        ("time", 1 << 63),
        *((field, (1 << 64) - 1) for field in ("time", "kvm", "root", "w0", "w1", "w2", "w3")),
        *((field, (1 << 32) - 1) for field in ("tid", "tgid", "role")),
        ("cpu", (1 << 16) - 1),
        ("vcpu", -(1 << 15)),
        ("kind", 255),
    ],
)
def test_records_of_extreme_values_become_a_readable_trace(tmp_path: Path, field: str, value: int) -> None:
    records = stream([event("kvm_mmu_get_page", vcpu=0), event("gap"), event("memslot"), event("table_free")])
    records[field][:2] = value
    assert trace(tmp_path / "a.parquet", records).events == 4
    assert sum(batch.num_rows for batch in Trace.open(tmp_path / "a.parquet").batches()) == 4
    assert render(tmp_path / "a.parquet")


def _forge(path: Path, table: pa.Table, metadata: dict[str, Any], **group: Any) -> None:
    """A trace of one row group with fitting CRCs, whatever the table and the group's other facts are."""
    draft = with_metadata(table, [table.num_rows], b"{}")
    chunks = pq.read_metadata(pa.BufferReader(draft)).row_group(0)
    size = sum(chunks.column(index).total_compressed_size for index in range(chunks.num_columns))
    fitting = {"size": size, "crc32": zlib.crc32(draft[4 : 4 + size])}
    forged = metadata | {"row_groups": [metadata["row_groups"][0] | fitting | group]}
    path.write_bytes(with_metadata(table, [table.num_rows], json.dumps(forged).encode()))


def test_a_type_of_a_foreign_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    table, metadata = _sample(tmp_path / "a.parquet")
    table = table.set_column(1, "time", pa.nulls(2, pa.struct({"a\nb\x1b[31m": pa.int32()})))
    _forge(tmp_path / "b.parquet", table, metadata)
    with pytest.raises(Problem, match=r"column `time` is ") as caught:
        Trace.open(tmp_path / "b.parquet")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "constants",
    [
        {"kind": 0},
        {"kind": None},
        {"seq": None},
        {"vm": 1 << 40},
        {"time": -1 << 70},
    ],
    ids=str,
)
def test_constants_that_no_column_can_hold(tmp_path: Path, constants: dict[str, int | None]) -> None:
    table, metadata = _sample(tmp_path / "a.parquet")
    _forge(tmp_path / "b.parquet", table, metadata, constants=constants)
    with pytest.raises(Problem, match=r"b\.parquet: damaged: row group 0") as caught:
        list(Trace.open(tmp_path / "b.parquet").batches())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("metadata", "group"),
    [
        ({"events": 3}, {}),
        ({"kinds": {"kvm_entry": 1 << 40}}, {}),
        ({}, {"rows": 1 << 40}),
        ({}, {"offset": 0}),
        ({}, {"size": 1}),
        ({}, {"size": 1 << 62}),
        ({"events": 1 << 40, "kinds": {"kvm_entry": 1 << 40}}, {"rows": 1 << 40}),
    ],
    ids=str,
)
def test_declared_numbers_that_the_file_does_not_bear_out(
    tmp_path: Path, metadata: dict[str, Any], group: dict[str, int]
) -> None:
    table, sound = _sample(tmp_path / "a.parquet")
    _forge(tmp_path / "b.parquet", table, sound)
    assert Trace.open(tmp_path / "b.parquet").metadata.events == 2
    _forge(tmp_path / "b.parquet", table, sound | metadata, **group)
    with pytest.raises(Problem, match=r"b\.parquet: damaged: its row groups are not what its metadata says"):
        Trace.open(tmp_path / "b.parquet")
