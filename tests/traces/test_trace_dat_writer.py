# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace export --trace-dat`: what is written, import reads, and trace-cmd prints."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.corpus import CORPUS
from tests.verbs import invoke
from traces import kernels
from traces.columns import SCHEMA
from traces.errors import Problem
from traces.imports.other_events import OtherTexts
from traces.imports.source_bytes import SourceBytes
from traces.imports.trace_dat import TraceDat
from traces.imports.trace_dat_writer import write_trace_dat, written_events
from traces.kernels.vendors import VMX
from traces.reader import Trace
from traces.record import RECORD
from traces.schema import BY_CODE, BY_NAME, COLUMN_TYPES

SIMULTANEOUS = Path(__file__).parents[2] / "traces" / "simultaneous"
KERNEL = kernels.at("6.12.9", kernels.Facts(cpu=VMX.cpu))
RECORDINGS = [SIMULTANEOUS / f"{name}.parquet" for name in ("smi-both-5.10", "slot-delete-6.1", "churn-7.x")]
RECORDINGS += [CORPUS / f"{name}.parquet" for name in ("two-vms-6.12", "roots-6.1-npt0", "huge-7.x")]
NUMBERS = (
    "role",
    "level",
    "as_id",
    "gfn",
    "old",
    "new",
    "table",
    "addr",
    "code",
    "value",
    "rip",
    "refs",
    "ret",
    "flags",
)


def _most(column: str) -> int:
    bits = {"int8": 7, "uint8": 8, "int32": 31, "uint32": 32, "int64": 63, "uint64": 64}[COLUMN_TYPES[column]]
    return (1 << bits) - 1


@st.composite
def rows(draw: Any) -> dict[str, Any]:
    """A row of a kind that a trace.dat has, or a loss, after the row before by `later` ns."""
    kind = draw(st.sampled_from([*written_events(), "gap"]))
    row: dict[str, Any] = dict.fromkeys(NUMBERS, 0) | {"kind": kind, "vcpu": None}
    row["cpu"], row["tid"] = draw(st.integers(0, 2)), draw(st.integers(1, 1 << 22))
    row["later"] = draw(st.one_of(st.integers(0, 1000), st.integers(-5, 1 << 40)))
    if kind == "gap":
        return row | {"value": draw(st.integers(0, 1 << 40)), "tid": 0}
    for field in written_events()[kind].fields:
        if field.column == "vcpu":
            row["vcpu"] = draw(st.one_of(st.none(), st.integers(0, 4095)))
        elif field.column != "isa":
            most = min(_most(field.column) >> max(field.shift, 0), field.mask, (1 << 8 * field.size) - 1)
            value = draw(st.integers(0, most >> max(-field.shift, 0)))
            row[field.column] |= value << max(field.shift, 0)
            if field.signed and draw(st.booleans()):
                row[field.column] = -row[field.column]
    if "role" in BY_NAME[kind].columns and kind != "kvm_page_fault":
        row["level"] = row["role"] & 15  # as the kernel's word has it
    return row


class _Rows:
    """Stands where a trace does for the writer."""

    def __init__(self, made: list[dict[str, Any]]) -> None:
        columns = {name: [row.get(name, 0) for row in made] for name in SCHEMA.names if name not in ("seq", "vm")}
        columns |= {"seq": list(range(len(made))), "vm": [None] * len(made)}
        arrays = [pa.array(columns[name], pa.string()).dictionary_encode() if name == "kind"
                  else pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names]  # fmt: skip
        self.table = pa.RecordBatch.from_arrays(arrays, SCHEMA.names)
        self.schema = SCHEMA
        groups = [type("Group", (), {"vm": None})]
        self.metadata = type("Metadata", (), {
            "kinds": {row["kind"]: 1 for row in made}, "threads": [{"tid": 7, "tgid": 3, "comm": "CPU 0/KVM"}],
            "kernel": "6.12.9", "raw": {"clock": {"name": "mono"}}, "row_groups": groups,
        })()  # fmt: skip

    def batches(self, names: list[str], **_: Any) -> list[pa.RecordBatch]:
        return [self.table.select(names)]


@pytest.mark.slow
@given(st.lists(rows(), min_size=1, max_size=400), st.integers(0, 1 << 60))
def test_what_is_written_is_read(made: list[dict[str, Any]], begin: int) -> None:
    now = begin
    for row in made:
        now = max(now + row.pop("later"), 0)
        row["time"] = now
    sink = io.BytesIO()
    assert write_trace_dat(_Rows(made), KERNEL, sink.write) == {}  # type: ignore[arg-type]
    reader = TraceDat(SourceBytes(sink), OtherTexts())
    assert reader.facts.release == "6.12.9"
    assert reader.facts.clock == "mono"
    assert reader.threads == {7: (3, b"CPU 0/KVM")}
    found: dict[int, list[dict[str, Any]]] = {}
    for batch in reader.batches():
        for record in batch:
            values = dict(zip(RECORD.names or (), record.item(), strict=True))
            found.setdefault(values["cpu"], []).append(_named(values))
    assert reader.decoder.odd == reader.odd_pages == 0
    for cpu in {row["cpu"] for row in made}:
        mine = [row for row in made if row["cpu"] == cpu]
        expected = [_shown(row) for row in sorted(mine, key=lambda row: row["time"])]
        assert [_shown(row) for row in sorted(found[cpu], key=lambda row: row["time"])] == expected


def _named(record: dict[str, Any]) -> dict[str, Any]:
    kind = BY_CODE[record["kind"]]
    row: dict[str, Any] = {name: record[name] for name in ("time", "cpu", "tid", "role", "level", "flags", "as_id")}
    row |= dict(zip(kind.words, (record[f"w{n}"] for n in range(4)), strict=False))
    row |= {kind.count: record["n"]} if kind.count else {}
    return row | {"kind": kind.name, "vcpu": record["vcpu"] if record["vcpu"] >= 0 else None}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    columns = ("value",) if row["kind"] == "gap" else BY_NAME[row["kind"]].columns
    held = {field.column for field in written_events()[row["kind"]].fields} if row["kind"] != "gap" else {"value"}
    vcpu = {"vcpu": row["vcpu"]} if "vcpu" in held else {}
    return {name: row[name] for name in ("time", "cpu", "kind", "tid", *columns) if name in row and (
        name in held or name not in BY_NAME[row["kind"]].columns)} | vcpu  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_a_recording_comes_back(path: Path, tmp_path: Path) -> None:
    """Every event of a tracepoint, with all that its fields have, in the order of each CPU; and its VMs' processes."""
    dat, back = tmp_path / "trace.dat", tmp_path / "back.parquet"
    invoke(["export", str(path), "--trace-dat", "-o", str(dat)])
    invoke(["import", str(dat), "-o", str(back)])
    rows, again = (pl.read_parquet(each).sort("seq").with_columns(pl.col("kind").cast(pl.String))
                   for each in (path, back))  # fmt: skip
    rows = rows.filter(pl.col("kind").is_in(list(written_events())))
    assert len(again) == len(rows)
    for kind, event in written_events().items():
        names = ["time", "cpu", "tid", "kind", *sorted({field.column for field in event.fields} - {"isa"})]
        for cpu in rows["cpu"].unique().to_list():
            mine, other = (each.filter((pl.col("kind") == kind) & (pl.col("cpu") == cpu)) for each in (rows, again))
            assert other.select(names).rows() == mine.select(names).rows(), kind
    recorded, read = Trace.open(path).metadata, Trace.open(back).metadata
    assert read.kernel == recorded.kernel
    assert {vm["pid"] for vm in read.vms} == {vm["pid"] for vm in recorded.vms if vm["vcpus"]}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("trace-cmd") is None, reason="no trace-cmd here")
def test_trace_cmd_prints_every_event(tmp_path: Path) -> None:
    path, dat = RECORDINGS[1], tmp_path / "trace.dat"
    invoke(["export", str(path), "--trace-dat", "-o", str(dat)])
    done = subprocess.run(["trace-cmd", "report", str(dat)], capture_output=True, check=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "]" in line]
    kinds = Trace.open(path).metadata.kinds
    assert len(lines) == sum(count for kind, count in kinds.items() if kind in written_events())
    assert not [line for line in lines if "%" in line or "FAILED" in line or "[UNKNOWN" in line]
    (tmp_path / "report.txt").write_text(done.stdout)
    invoke(["import", str(tmp_path / "report.txt"), "-o", str(tmp_path / "again.parquet")])
    meta = Trace.open(tmp_path / "again.parquet").metadata
    assert meta.events == len(lines)
    assert meta.raw["source"]["odd"] == 0, meta.raw["source"]["first_odd"]


def test_a_trace_dat_goes_to_a_file(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="say with -o which file"):
        invoke(["export", str(RECORDINGS[0]), "--trace-dat"])
