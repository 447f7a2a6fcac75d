# SPDX-License-Identifier: Apache-2.0
"""Why a trace is laid out in its file as it is: size and decoding speed of this layout and of its alternatives.

`python -m benchmarks.format [TRACE ...]` reads recordings; without any it makes three synthetic ones of tests/streams.

All lines of a table are the same events in the same columns, written and read back in this run. "pyarrow defaults" is
`pq.write_table(table)` in the order of recording and `pq.read_table(path, use_threads=False)`; "kvmtrace" is a trace
file read by our reader with all its checks; every other line is our layout with one thing changed, read by pyarrow's
`iter_batches` without checks. Times are CPU seconds of one thread, the median of several rounds in which all lines take
turns. Each reading happens in a process of its own, twice: "first" includes the page faults of its memory, as in a
program that reads a file once; "again" finds its memory mapped.
"""

from __future__ import annotations

import os

os.environ["POLARS_MAX_THREADS"] = "1"  # before polars is imported

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tests import streams
from traces import encoding
from traces.columns import SCHEMA
from traces.reader import Trace
from traces.recording.compact import compact
from traces.recording.segment_writer import SegmentWriter
from traces.schema import BY_NAME

ROUNDS = 5
BATCH = 1 << 16
DEFAULTS = "pyarrow defaults"
DEFAULTS_BATCHES = "pyarrow defaults, batches"
OURS = "kvmtrace"


@dataclass
class Line:
    """One layout: its file, the function that reads it, and CPU seconds by round and bytes of memory."""

    name: str
    path: Path
    read: Callable[[Path], int]
    write_seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    scanned: list[float] = field(default_factory=list)
    memory: int = 0


def read_defaults(path: Path) -> int:
    return int(pq.read_table(path, use_threads=False).num_rows)


def read_ours(path: Path) -> int:
    return sum(batch.num_rows for batch in Trace.open(path).batches(size=BATCH))


def read_batches(path: Path) -> int:
    file = pq.ParquetFile(path, read_dictionary=["kind"])
    return sum(batch.num_rows for batch in file.iter_batches(BATCH, use_threads=False))


def scan(path: Path) -> int:
    """Read a file with polars alone, as a user without our reader would, and return the number of rows."""
    return sum(frame.height for frame in pl.scan_parquet(path).collect_batches(chunk_size=2 * BATCH))


READERS = {DEFAULTS: read_defaults, OURS: read_ours}


def all_nullable(table: pa.Table) -> pa.Table:
    """Return the table with null in every column that the kind of the row does not fill, as a user might like best."""
    kind = table["kind"].combine_chunks()
    names = np.array(kind.dictionary.to_pylist())[kind.indices.to_numpy()]
    columns, fields = [], []
    for place in table.schema:
        column = table[place.name]
        filled = [name for name, spec in BY_NAME.items() if place.name in spec.columns]
        if place.name not in ("seq", "time", "cpu", "tid", "kind") and not place.nullable:
            column = pa.chunked_array([pa.array(column.to_numpy(), place.type, mask=~np.isin(names, filled))])
            place = place.with_nullable(True)
        columns.append(column)
        fields.append(place)
    return pa.table(columns, schema=pa.schema(fields))


def write(table: pa.Table, path: Path, groups: list[int], **changes: Any) -> float:
    """Write the table in row groups of the given sizes, with our options and these `changes`.

    Return the CPU seconds.
    """
    started = time.process_time()
    with pq.ParquetWriter(path, table.schema, **{**encoding.OPTIONS, **changes}) as writer:
        offset = 0
        for rows in groups:
            writer.write_table(table.slice(offset, rows), row_group_size=rows)
            offset += rows
    return time.process_time() - started


def write_layouts(trace: Path, scratch: Path) -> dict[str, Any]:
    """Write the events of a trace to `scratch` in every layout.

    Returns {"events": number of events, "lines": [(name, path, CPU seconds to write)]}.
    """
    opened = Trace.open(trace)
    groups = [group.rows for group in opened.metadata.row_groups]
    table = pa.Table.from_batches(list(opened.batches())).unify_dictionaries().combine_chunks()
    ring = table.take(pa.array(np.argsort(table["seq"].to_numpy(), kind="stable")))
    started = time.process_time()
    pq.write_table(ring, scratch / "defaults.parquet")
    found: list[tuple[str, str, float]] = [
        (DEFAULTS, str(scratch / "defaults.parquet"), time.process_time() - started),
        (DEFAULTS_BATCHES, str(scratch / "defaults.parquet"), 0.0),
        (OURS, str(trace), 0.0),
    ]
    everything = {name: "DELTA_BINARY_PACKED" for name in SCHEMA.names if name != "kind"}
    split = dict.fromkeys(encoding.DELTA, "BYTE_STREAM_SPLIT")
    variants: list[tuple[str, pa.Table, list[int], dict[str, Any]]] = [
        ("layout, no checks", table, groups, {}),
        ("  uncompressed", table, groups, {"compression": "none"}),
        ("  zstd 1", table, groups, {"compression": "zstd", "compression_level": 1}),
        ("  zstd 6", table, groups, {"compression": "zstd", "compression_level": 6}),
        ("  all delta", table, groups, {"use_dictionary": ["kind"], "column_encoding": everything}),
        ("  all dictionary", table, groups, {"use_dictionary": True, "column_encoding": None}),
        ("  byte-stream-split for delta", table, groups, {"column_encoding": split}),
        ("  pages of 20,000 rows", table, groups, {"max_rows_per_page": 20_000}),
        ("  ring order, not by VM", ring, [1 << 20] * -(-len(ring) // (1 << 20)), {}),
        ("  null where not filled", all_nullable(table), groups, {}),
    ]
    for number, (name, rows, sizes, changes) in enumerate(variants):
        path = scratch / f"{number}.parquet"
        found.append((name, str(path), write(rows, path, sizes, **changes)))
    return {"events": len(table), "lines": found}


def alone(work: Callable[[], Any]) -> Any:
    """Do the work in a forked process, whose memory nothing else has touched, and return its result by way of JSON."""
    output, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(told, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(told)
    with os.fdopen(output, "rb") as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return json.loads(answer)


def timed(read: Callable[[Path], int], path: Path, events: int) -> tuple[float, float, int]:
    """Return the CPU seconds of a first and of a second reading, and by how many bytes they raised peak memory."""

    def work() -> tuple[list[int], list[float], int]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        marks, rows = [time.process_time()], []
        for _ in range(2):
            rows.append(read(path))
            marks.append(time.process_time())
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return rows, [marks[1] - marks[0], marks[2] - marks[1]], grown << 10

    rows, (first, again), grown = alone(work)
    if rows != [events, events]:
        raise RuntimeError(f"{path}: {rows} rows, not {events}")
    return first, again, grown


def measure(found: list[Line], events: int, rounds: int) -> None:
    for _ in range(rounds):
        for line in found:
            first, again, line.memory = timed(line.read, line.path, events)
            line.first.append(first)
            line.again.append(again)
            line.scanned.append(timed(scan, line.path, events)[1])


def synthetic(directory: Path) -> list[str]:
    """Three recordings: an SMI storm, four VMs of it at once, and the emulator storm of a software KVM."""
    found = []
    for name, records in (
        ("smi-storm", streams.smi_storm(150_000)),
        ("smi-storm-4-vms", streams.interleave([streams.smi_storm(40_000, vm=vm) for vm in (1, 2, 3, 4)])),
        ("emulator-storm", streams.emulator_storm(150_000)),
    ):
        segments = SegmentWriter(directory / f"{name}.kvmt", {})
        segments.write(records)
        segments.close({"loss": streams.loss_table(records)})
        found.append(str(compact(segments.directory, directory / f"{name}.parquet").path))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pa.set_cpu_count(1)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for trace in options.traces or map(Path, alone(lambda: synthetic(Path(scratch)))):
            written = alone(lambda trace=trace: write_layouts(trace, Path(scratch)))
            found = [
                Line(name, Path(path), READERS.get(name, read_batches), seconds)
                for name, path, seconds in written["lines"]
            ]
            measure(found, written["events"], options.rounds)
            results += report(trace.name, written["events"], found, quiet=options.json)
    if options.json:
        print(json.dumps({"schema": 1, "lines": results}, indent=1))


def report(name: str, events: int, found: list[Line], quiet: bool) -> list[dict[str, Any]]:
    """Return one row of results for each layout, and print them as a table unless `quiet`.

    Speeds are in events per second of CPU time, sizes in bytes.
    """
    base = found[0]
    rows = [
        {
            "trace": name,
            "layout": line.name.strip(),
            "events": events,
            "bytes_per_event": round(line.path.stat().st_size / events, 2),
            "first_per_second": round(events / median(line.first)),
            "first_ratio": round(median(base.first) / median(line.first), 2),
            "again_per_second": round(events / median(line.again)),
            "again_ratio": round(median(base.again) / median(line.again), 2),
            "memory": line.memory,
            "polars_per_second": round(events / median(line.scanned)),
            "write_per_second": round(events / line.write_seconds) if line.write_seconds else None,
        }
        for line in found
    ]
    if not quiet:
        print(f"\n{name}: {events:,} events; M events per second of CPU time, ratio to defaults; MB of memory")
        heads = ("B/event", "first", "ratio", "again", "ratio", "memory", "polars", "write")
        print(f"{'layout':30}" + "".join(f"{head:>8}" for head in heads))
        for line, row in zip(found, rows, strict=True):
            first, again, polars, write = (
                (row[key] or 0) / 1e6
                for key in ("first_per_second", "again_per_second", "polars_per_second", "write_per_second")
            )
            print(
                f"{line.name:30}{row['bytes_per_event']:>8.2f}{first:>8.1f}{row['first_ratio']:>8.2f}{again:>8.1f}"
                f"{row['again_ratio']:>8.2f}{row['memory'] / 1e6:>8.0f}{polars:>8.1f}{write or '':>8.3}",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    main()
