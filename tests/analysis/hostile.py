# SPDX-License-Identifier: Apache-2.0
"""Reads mutated results in a process of its own; `python -m tests.analysis.hostile SEED KIND FIRST COUNT SCRATCH`.

Those of tests.traces.forged's kinds fit in every size, offset and checksum, like its traces.

Prints one JSON line a mutant before it is read and one after, as `tests.traces.hostile` does.
"""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.formats import FORMATS, renderer
from analysis.perfetto import export
from analysis.queries.registry import queries
from analysis.reading.sources import open_source
from analysis.reporting import Wanted, reported
from replay.result import KEY
from tests.traces import hostile as traces_hostile
from tests.traces.forged import KINDS, forged
from tests.traces.hostile import flipped, in_chunk_headers, odd_metadata, odd_schema
from traces import frame, reader
from traces.errors import Problem
from traces.reader import Trace

FORGED = tuple(kind for kind in KINDS if kind != "rows")  # of odd rows there are `values` and `schema`
MEMORY = 4 << 30
CPU_SECONDS = 60  # for one mutant, of all its threads: a busy machine does not make it more


def with_metadata(table: pa.Table, metadata: bytes) -> bytes:
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({KEY: metadata})
    return sink.getvalue()


def odd_values(table: pa.Table, rng: random.Random) -> pa.Table:
    """Numbers that nobody counted: columns filled with extremes, or with nulls."""
    for _ in range(3):
        index = rng.randrange(table.num_columns)
        field = table.schema.field(index)
        if pa.types.is_integer(field.type):
            bits = field.type.bit_width - (1 if pa.types.is_signed_integer(field.type) else 0)
            choices: tuple[Any, ...] = (0, (1 << bits) - 1, *([None] if field.nullable else []))
            if pa.types.is_signed_integer(field.type):
                choices += (-(1 << bits), -1)
            values = pa.array([rng.choice(choices) for _ in range(len(table))], field.type)
            table = table.set_column(index, field, values)
    return table


def odd_traces(path: Path, first: int, count: int) -> Iterator[tuple[int, bytes]]:
    """Traces whose metadata is odd, as someone would make them who knows the format: their checksums fit."""
    frame.crc_of = reader.crc_of = lambda *_: traces_hostile._Fits()  # type: ignore[assignment,return-value]
    trace = Trace.open(path)
    table = pa.Table.from_batches(list(trace.batches())).unify_dictionaries()
    groups = [group.rows for group in trace.metadata.row_groups]
    for number in range(first, first + count):
        metadata = odd_metadata(dict(trace.metadata.raw), random.Random(f"trace {number}"))
        yield number, traces_hostile.with_metadata(table, groups, metadata)


def mutants(path: Path, kind: str, first: int, count: int) -> Iterator[tuple[int, bytes]]:
    if kind == "trace":
        yield from odd_traces(path, first, count)
        return
    if kind in FORGED:
        yield from ((number, forged(path, kind, number)) for number in range(first, first + count))
        return
    seed = path.read_bytes()
    table = pq.read_table(path).replace_schema_metadata(None)
    metadata = json.loads(pq.read_metadata(path).metadata[KEY])
    text = json.dumps(metadata).encode()
    for number in range(first, first + count):
        rng = random.Random(f"{kind} {number}")
        if kind == "bytes":
            yield number, flipped(seed, rng) if rng.random() < 0.5 else in_chunk_headers(seed, rng)
        elif kind == "values":
            yield number, with_metadata(odd_values(table, rng), text)
        else:
            yield number, with_metadata(odd_schema(table, rng), text)


def main(seed: str, kind: str, first: str, count: str, scratch: str) -> None:
    path = Path(scratch) / "mutant.parquet"
    made = mutants(Path(seed), kind, int(first), int(count))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number, data in made:
        path.write_bytes(data)
        print(json.dumps({"mutant": number}), flush=True)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            with reported(path, Wanted(replay=False)) as report:
                for form in FORMATS:
                    renderer(form)(report)
            source = open_source(path)
            for query in queries().values():
                if isinstance(source, query.source):
                    query(source).collect(engine="streaming")
            export(source, path.with_suffix(".pftrace"))
            outcome = "read"
        except Problem as problem:
            outcome = str(problem)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"outcome": outcome}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
