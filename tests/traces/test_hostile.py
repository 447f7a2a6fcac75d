"""A thousand mutated traces, and mutated segments: a correct reading or one line, never a traceback, hang or crash."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import streams
from tests.traces.hostile import odd_metadata, with_metadata
from tests.traces.making import event, numbered, stream, trace, write
from traces.compact import compact
from traces.errors import Problem
from traces.reader import UNKNOWN_CODE, Trace, kind_codes
from traces.segments import SegmentReader
from traces.summary import render

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seed") / "seed.parquet"
    trace(path, streams.interleave([streams.smi_storm(40, vm=1), streams.emulator_storm(30, vm=2)]))
    return path


@pytest.mark.parametrize(
    ("kind", "count"), [("bytes", 500), ("resealed", 300), ("metadata", 150), ("schema", 50)], ids=str
)
def test_mutated_traces(seed: Path, tmp_path: Path, kind: str, count: int) -> None:
    command = [sys.executable, "-m", "tests.traces.hostile", str(seed), kind, "0", str(count), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
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
    with pytest.raises(Problem, match="Is a directory"):
        Trace.open(tmp_path)


def test_an_absent_column_is_said(tmp_path: Path) -> None:
    trace(tmp_path / "a.parquet", stream([event("kvm_entry")]))
    with pytest.raises(Problem, match="no column `nonsense`"):
        list(Trace.open(tmp_path / "a.parquet").batches(["seq", "nonsense"]))
