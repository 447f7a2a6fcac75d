# SPDX-License-Identifier: Apache-2.0
"""perf.data and trace.dat in all their forms; damaged, cut and of others: one line, or what is there."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.replay.plain import plain
from tests.traces.binary_files import as_compressed, as_stream, option, record, recorded, with_options
from tests.traces.mutations import outcome
from traces.errors import Problem
from traces.imports import raw_rows, record_walks
from traces.imports.clock_shift import ClockShift
from traces.imports.importing import import_file
from traces.imports.other_events import OtherTexts
from traces.imports.perf_data import PerfData
from traces.imports.source_bytes import SourceBytes
from traces.imports.told import ToldOfText
from traces.imports.trace_dat import TraceDat
from traces.reader import Trace

COUNT = int(os.environ.get("MUTATIONS", "200"))


def imported(path: Path, data: bytes) -> tuple[pl.DataFrame, Any]:
    source, out = path / "source", path / "out.parquet"
    source.write_bytes(data)
    import_file(source, out, ToldOfText(), force=True)
    return pl.read_parquet(out).sort("seq"), Trace.open(out).metadata


@pytest.mark.parametrize("form", [as_stream, as_compressed], ids=["stream", "zstd"])
def test_a_stream_and_a_compressed_file_have_the_same_rows(form: Any, tmp_path: Path) -> None:
    for name in ("smi-both-6.12.data", "slot-delete-6.1.data"):
        rows, meta = imported(tmp_path, recorded(name))
        again, other = imported(tmp_path, form(recorded(name)))
        assert again.rows() == rows.rows()
        assert other.kernel == meta.kernel
        assert other.complete
        assert other.raw["source"]["undone"] == [{"as_stream": "stream", "as_compressed": "zstd"}[form.__name__]]


def test_an_attribute_of_odd_size_is_no_error(tmp_path: Path) -> None:
    data = as_stream(recorded("smi-storm-6.1.data"))
    rows, _ = imported(tmp_path, data)
    again, _ = imported(tmp_path, data[:16] + record(64, data[24:72] + b"abc") + data[16:])
    assert len(again) == len(rows)


def test_losses_of_perf_are_gaps(tmp_path: Path) -> None:
    data = as_stream(recorded("smi-storm-6.1.data"))
    rows, _ = imported(tmp_path, data)
    more, meta = imported(tmp_path, data + record(2, struct.pack("<QQ", 0, 771)) + record(13, struct.pack("<Q", 4)))
    assert len(more) == len(rows) + 2
    assert meta.lost == 775


def test_of_a_cut_trace_dat_what_is_there_is_imported(tmp_path: Path) -> None:
    """Its formats come first; perf's come last, so that of a cut perf.data nothing can be read."""
    data = recorded("slot-delete-6.1.dat")
    rows, meta = imported(tmp_path, data)
    assert meta.complete
    some, meta = imported(tmp_path, data[: len(data) - 20_000])
    assert len(rows) // 2 < len(some) < len(rows)
    assert not meta.complete
    assert "it ends at byte" in meta.discrepancies[0]
    with pytest.raises(Problem, match=r"a damaged perf\.data: it ends at byte"):
        imported(tmp_path, recorded("slot-delete-6.1.data")[:100_000])


def test_samples_of_a_counter_are_named(tmp_path: Path) -> None:
    """As `perf kvm --guest record` takes them of a guest: an attribute without raw data."""
    data = bytearray(as_stream(recorded("smi-storm-6.1.data")))
    at = 16
    while struct.unpack_from("<I", data, at)[0] == 64:  # attributes
        (sample_type,) = struct.unpack_from("<Q", data, at + 32)
        struct.pack_into("<Q", data, at + 32, sample_type & ~0x400)
        at += struct.unpack_from("<H", data, at + 6)[0]
    with pytest.raises(Problem, match=r"no event in this perf\.data, but [\d,]+ records .*perf kvm --guest"):
        imported(tmp_path, bytes(data))


def test_the_processes_of_a_trace_dat_s_threads_are_read(tmp_path: Path) -> None:
    data = recorded("smi-both-6.1.dat")
    rows, _ = imported(tmp_path, data)
    first, second = sorted(set(rows.filter(pl.col("kind").cast(pl.String) == "kvm_entry")["tid"]))
    table = f"    {first} 77\n    {second} 77\n".encode()
    _, meta = imported(tmp_path, with_options(data, option(11, table)))
    assert [vm["pid"] for vm in meta.vms] == [77]


def test_every_buffer_of_a_trace_dat_is_read(tmp_path: Path) -> None:
    data = recorded("smi-storm-6.1.dat")
    rows, _ = imported(tmp_path, data)
    assert imported(tmp_path, with_options(data, b""))[0].rows() == rows.rows()
    twice, meta = imported(tmp_path, with_options(data, b"", "second"))
    assert len(twice) == 2 * len(rows)
    assert twice["time"].is_sorted()
    assert meta.raw["source"]["undone"] == ["buffer second"]


def test_a_host_file_names_the_vcpus_of_its_guests(tmp_path: Path) -> None:
    data = recorded("smi-both-6.1.dat")
    rows, _ = imported(tmp_path, data)
    first, second = sorted(set(rows.filter(pl.col("kind").cast(pl.String) == "kvm_entry")["tid"]))
    guest = b"web\0" + struct.pack("<QI", 7, 2) + struct.pack("<IIII", 0, first, 1, second)
    _, meta = imported(tmp_path, with_options(data, option(13, guest)))
    assert [vm["name"] for vm in meta.vms] == ["web"]
    assert [vcpu["tid"] for vcpu in meta.vms[0]["vcpus"]] == [first, second]


def test_offsets_of_clocks_are_added(tmp_path: Path) -> None:
    data = recorded("smi-storm-6.1.dat")
    rows, _ = imported(tmp_path, data)
    later, _ = imported(tmp_path, with_options(data, option(7, b"1000000\0")))
    assert (later["time"] - rows["time"]).unique().to_list() == [1_000_000]
    doubled, _ = imported(tmp_path, with_options(data, option(14, struct.pack("<IIQ", 2 << 10, 10, 0))))
    assert doubled["time"].to_list() == [2 * time for time in rows["time"]]


@pytest.mark.parametrize("interpolated", [False, True])
def test_a_guest_s_times_become_its_host_s(interpolated: bool) -> None:
    samples_ = [(1000, -300, 1 << 4, 4), (2000, 500, 1 << 4, 4), (4000, 700, 1 << 4, 4)]
    data = struct.pack("<QIII", 1, int(interpolated), 1, len(samples_))
    for column, letter in ((0, "Q"), (1, "q"), (2, "Q"), (3, "Q")):
        data += struct.pack(f"<3{letter}", *(sample[column] for sample in samples_))
    shift = ClockShift()
    shift.of_guest(data)

    def expected(time: int) -> int:
        first = 0 if time < 2000 else 1
        (low, offset, *_), (high, next_offset, *_) = samples_[first], samples_[first + 1]
        moved = (time - low) * (next_offset - offset) + (high - low) // 2
        return max(time + offset + (moved // (high - low) if interpolated else 0), 0)

    times = [500, 1000, 1500, 1999, 2000, 3000, 4000, 9000]
    assert shift.shifted(np.array(times), 0).tolist() == [expected(time) for time in times]
    assert shift.shifted(np.array(times), 1).tolist() == times  # a CPU without samples


def test_the_compiled_reader_reads_as_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    records = "traces.imports.raw_records"
    references = {name: plain(f"traces.imports.{name}", records) for name in ("raw_rows", "record_walks")}
    assert not references["raw_rows"].COMPILED
    for name, reader, walk in (
        ("smi-both-6.1.data", PerfData, "walk_perf"),
        ("smi-both-6.12.dat", TraceDat, "walk_pages"),
    ):
        compiled = [row.tobytes() for row in _rows(reader, recorded(name))]
        with monkeypatch.context() as patch:
            patch.setattr(f"{reader.__module__}.RawDecoder", references["raw_rows"].RawDecoder)
            patch.setattr(f"{reader.__module__}.{walk}", getattr(references["record_walks"], walk))
            assert [row.tobytes() for row in _rows(reader, recorded(name))] == compiled


def _rows(reader: Any, data: bytes) -> Iterator[Any]:
    import io

    for rows in reader(SourceBytes(io.BytesIO(data)), OtherTexts()).batches():
        yield from rows


@pytest.mark.skipif(not os.environ.get("CI") and not raw_rows.COMPILED, reason="the engine is not compiled")
def test_the_reader_is_compiled() -> None:
    assert raw_rows.COMPILED
    assert record_walks.COMPILED


BASES = {
    "trace.dat 6": lambda: recorded("smi-storm-6.1.dat"),
    "trace.dat 6, options": lambda: with_options(recorded("smi-storm-6.1.dat"), option(12, bytes(200)), "b"),
    "trace.dat 7": lambda: recorded("smi-storm-6.12.dat"),
    "perf.data": lambda: recorded("smi-storm-6.1.data"),
    "stream": lambda: as_stream(recorded("smi-storm-6.12.data")),
    "zstd": lambda: as_compressed(recorded("smi-storm-6.1.data")),
}
_NASTY = (0, 1, 7, 8, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def mutated(data: bytes, chosen: random.Random) -> bytes:
    """A few numbers changed, mostly where there are sizes and offsets, or the file cut."""
    made = bytearray(data)
    for _ in range(chosen.randrange(1, 6)):
        near = chosen.choice((128, 4096, len(made), len(made)))
        at = chosen.randrange(min(near, len(made)))
        how = chosen.randrange(5)
        if how == 0:
            made[at] = chosen.randrange(256)
        elif how == 1:
            size = chosen.choice((1, 2, 4, 8))
            made[at : at + size] = (chosen.choice(_NASTY) & (1 << 8 * size) - 1).to_bytes(size, "little")
        elif how == 2:
            made[at : at + 8] = struct.pack("<Q", chosen.randrange(2 * len(made)))
        elif how == 3:
            del made[at : at + chosen.randrange(1, 30)]
        else:
            del made[chosen.randrange(len(made)) :]
        if not made:
            break
    return bytes(made)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_a_mutated_file_is_one_line_or_a_trace(base: str, tmp_path: Path) -> None:
    data = BASES[base]()
    seeds = range(COUNT)
    found = [outcome(mutated(data, random.Random(f"{base} {seed}")), tmp_path, ToldOfText(), seed) for seed in seeds]
    said = list(filter(None, found))
    assert not [line for line in said if "\n" in line or len(line) > 400]
    assert COUNT - len(said) > COUNT // 50
    assert said


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x17\x08Dtracing5\0" + bytes(20), "version '5': only 6 and 7"),
        (b"\x17\x08Dtracing6\0\1\x08" + bytes(20), "no x86-64"),
        (b"2ELIFREP" + bytes(200), "byte order"),
        (b"PERFILE2" + struct.pack("<12Q", 104, 144, 104, 0, 104, 0, *[0] * 6), "perf was not ended in order"),
    ],
)
def test_what_cannot_be_read_is_said(data: bytes, expected: str, tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"^[^\n]*$") as caught:
        imported(tmp_path, data)
    assert expected in str(caught.value)


def test_files_without_events_of_kvm_are_said_to_be_so(tmp_path: Path) -> None:
    stream = as_stream(recorded("smi-storm-6.1.data")).replace(b"system: kvm", b"system: xyz")
    with pytest.raises(Problem, match="nothing to import: no event that a trace has, but"):
        imported(tmp_path, stream.replace(b"kvm\0", b"abc\0").replace(b"kvmmmu\0", b"abcdef\0"))
