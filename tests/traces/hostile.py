# SPDX-License-Identifier: Apache-2.0
"""Reads mutated traces in a process of its own; `python -m tests.traces.hostile SEED_TRACE KIND FIRST COUNT SCRATCH`.

Prints one JSON line a mutant, before reading it and after: {"mutant": n} and {"outcome": "read" or the error}. A crash,
a hang (SIGPROF) or an exception that is no Problem shows as a missing or wrong line.
"""

from __future__ import annotations

import copy
import io
import json
import random
import re
import resource
import signal
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from traces import encoding, frame, reader
from traces.errors import Problem
from traces.metadata import KEY
from traces.reader import Trace
from traces.summary import info

MEMORY = 4 << 30
CPU_SECONDS = 60  # for one mutant, of all its threads: a busy machine does not make it more
_ODD = (None, -1, 0, 1 << 70, 1.5, "x", "\x1b[2J", [], {}, True, [[]], [{}], {"x": {}}, "9" * 1000)


def parts(data: bytes) -> tuple[bytes, bytes]:
    """A trace's row groups with the leading magic, and its footer with the tail."""
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return data[: start - encoding.SEAL_SIZE], data[start:]


def sealed(rows: bytes, footer: bytes) -> bytes:
    return rows + encoding.MAGIC + zlib.crc32(footer).to_bytes(4, "little") + footer


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut out, put in, or all after some place missing."""
    mutant = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(mutant))
        what = rng.randrange(10)
        if what < 6:
            mutant[at] = rng.choice((0, 0x7F, 0x80, 0xFF, mutant[at] ^ (1 << rng.randrange(8)), rng.randrange(256)))
        elif what == 6:
            del mutant[at : at + rng.choice((1, 4, 100))]
        elif what == 7:
            mutant[at:at] = rng.randbytes(rng.choice((1, 8, 200)))
        elif what == 8:  # a length that lies, as thrift (varint) or as a plain integer
            mutant[at : at + 5] = rng.choice(
                (b"\xfe\xff\xff\xff\x0f", b"\xff\xff\xff\x7f\x00", b"\x80\x80\x80\x80\x08")
            )
        else:
            del mutant[at:]
        if len(mutant) < 2:
            break
    return bytes(mutant)


def in_chunk_headers(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed where a column chunk's page headers are; the seals are made to fit by the caller."""
    mutant = bytearray(data)
    footer = pq.read_metadata(io.BytesIO(data))
    for _ in range(rng.choice((1, 2, 4))):
        chunk = footer.row_group(rng.randrange(footer.num_row_groups)).column(rng.randrange(footer.num_columns))
        start = chunk.dictionary_page_offset if chunk.has_dictionary_page and rng.random() < 0.5 else None
        at = (chunk.data_page_offset if start is None else start) + rng.randrange(32)
        mutant[at] = rng.choice((0, 0x7F, 0x80, 0xFF, mutant[at] ^ (1 << rng.randrange(8)), rng.randrange(256)))
    return bytes(mutant)


def with_metadata(table: pa.Table, groups: list[int], metadata: bytes) -> bytes:
    """The table as a sealed trace with this metadata, in the row groups given."""
    sink = io.BytesIO()
    packed = {name: code for name, code in encoding.OPTIONS["column_encoding"].items() if _is_int64(table.schema, name)}
    with pq.ParquetWriter(sink, table.schema, **{**encoding.OPTIONS, "column_encoding": packed}) as writer:
        for index, rows in enumerate(groups):
            writer.write_table(table.slice(sum(groups[:index]), rows), row_group_size=rows)
        writer.add_key_value_metadata({KEY: metadata})
    data = sink.getvalue()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return sealed(data[:start], data[start:])


def _is_int64(schema: pa.Schema, name: str) -> bool:
    return all(schema.field(index).type == pa.int64() for index in schema.get_all_field_indices(name))


def odd_metadata(metadata: dict[str, Any], rng: random.Random) -> bytes:
    """The metadata with one or two values, at any depth, replaced or missing."""
    mutant = copy.deepcopy(metadata)
    for _ in range(rng.choice((1, 1, 2))):
        node: Any = mutant
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = rng.choice(keys)
            if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7:
                node = node[key]
                continue
            if rng.random() < 0.2:
                del node[key]
            else:
                node[key] = copy.deepcopy(rng.choice(_ODD))  # else one of them may end up containing itself
            break
        if not mutant:
            break
    text = json.dumps(mutant).encode()
    return text if rng.random() < 0.95 else flipped(text, rng)


def odd_schema(table: pa.Table, rng: random.Random) -> pa.Table:
    index = rng.randrange(table.num_columns)
    name = table.schema.names[index]
    what = rng.randrange(5)
    if what == 0:
        return table.drop_columns([name])
    if what == 1:
        return table.rename_columns([other if other != name else "strange" for other in table.schema.names])
    if what == 2:
        return table.append_column(name, table[name])
    kinds: list[pa.Array] = [
        pa.array(["text"] * len(table)), pa.array([[1]] * len(table)), pa.nulls(len(table), pa.float64()),
        pa.array([b"x"] * len(table)), pa.array([{"a": 1}] * len(table)),
    ]  # fmt: skip
    strange = rng.choice(kinds)
    if what == 3:
        return table.set_column(index, name, strange)
    return table.append_column("new_in_1_9", strange)


class _Fits:
    """Equal to every CRC."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def mutants(seed: bytes, path: Path, kind: str, first: int, count: int):  # type: ignore[no-untyped-def]
    original = Trace.open(path)
    table = pa.Table.from_batches(list(original.batches())).unify_dictionaries()
    groups = [group.rows for group in original.metadata.row_groups]
    metadata = dict(original.metadata.raw)
    for number in range(first, first + count):
        rng = random.Random(f"{kind} {number}")
        if kind == "bytes":
            yield number, flipped(seed, rng)
        elif kind == "resealed":
            rows, footer = parts(seed)
            choice = rng.random()
            if choice < 0.6:
                rows = parts(in_chunk_headers(seed, rng))[0]
            elif choice < 0.8:
                rows = flipped(rows, rng)
            else:
                footer = flipped(footer, rng)
            yield number, sealed(rows, footer)
        elif kind == "metadata":
            yield number, with_metadata(table, groups, odd_metadata(metadata, rng))
        else:
            yield number, with_metadata(odd_schema(table, rng), groups, json.dumps(metadata).encode())


def main(seed_path: str, kind: str, first: str, count: str, scratch: str) -> None:
    seed = Path(seed_path)
    made = mutants(seed.read_bytes(), seed, kind, int(first), int(count))
    path = Path(scratch) / "mutant.parquet"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if kind != "bytes":  # as someone would who knows the format
        frame.crc_of = reader.crc_of = lambda *_: _Fits()  # type: ignore[assignment,return-value]
    for number, data in made:
        path.write_bytes(data)
        print(json.dumps({"mutant": number, "changed": data != seed.read_bytes()}), flush=True)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            info(path)
            opened = Trace.open(path)
            rows = sum(batch.num_rows for batch in opened.batches())
            outcome = "read" if rows == opened.metadata.events else f"{rows} rows"
        except Problem as problem:
            outcome = str(problem)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"outcome": outcome}), flush=True)
    # Of this program alone: getrusage has the memory of the test runner in it, which started it.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"peak": int(peak) << 10}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
