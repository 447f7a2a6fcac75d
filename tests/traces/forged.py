# SPDX-License-Identifier: Apache-2.0
"""Traces, results and recordings forged by who knows the format: checksums, offsets and seals fit what is wrong.

`python -m tests.traces.forged SEED_TRACE KIND FIRST COUNT SCRATCH [verbs]` reads this many of a kind (or, with `verbs`,
gives each to the verbs) in a process of its own, and prints a JSON line before and after each.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import random
import re
import resource
import signal
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import typer.main

import kvmtrace as command_line
from replay.result import KEY as RESULT_KEY
from tests.traces import thrift
from tests.traces.hostile import CPU_SECONDS, MEMORY, flipped, odd_metadata, sealed, with_metadata
from tests.traces.thrift import LIST, STRUCT, Struct
from traces.errors import BAD_INPUT, Problem
from traces.metadata import KEY
from traces.reader import Trace
from traces.record import RECORD, columns_of
from traces.recording import sealed_stream
from traces.recording.arrow_records import RECORD_SCHEMA, to_batch
from traces.recording.compact import compact
from traces.recording.segment_writer import MANIFEST, segment_name

NUMBERS = (0, 1, -1, 2, 7, 127, 255, 1 << 15, (1 << 16) + 3, (1 << 31) - 1, -(1 << 31), 1 << 32, 1 << 40, (1 << 63) - 1)
_CODECS = {1: pa.Codec("snappy"), 6: pa.Codec("zstd"), 7: pa.Codec("lz4_raw")}  # as parquet.thrift numbers them
# Of a page's header, of a column chunk's metadata, of a footer: field numbers, as parquet.thrift has them.
UNPACKED_SIZE, PACKED_SIZE = 2, 3
ROW_GROUPS, PAIRS = 4, 5
CHUNKS, CHUNK_METADATA = 1, 3
CODEC, STATISTICS, DATA_OFFSET, DICTIONARY_OFFSET, CHUNK_SIZE = 4, 12, 9, 11, 7


@dataclass
class Page:
    """A page: its header, and its bytes as they are before they are packed. `packed`: those that stand in the file."""

    header: Struct
    payload: bytes
    codec: pa.Codec
    packed: bytes | None = None
    keep_sizes: bool = False  # the header's sizes are lies on purpose

    def written(self) -> bytes:
        packed = self.packed if self.packed is not None else self.compressed()
        if not self.keep_sizes:
            thrift.put(self.header, UNPACKED_SIZE, len(self.payload))
            thrift.put(self.header, PACKED_SIZE, len(packed))
        return thrift.written(self.header) + packed

    def compressed(self) -> bytes:
        return bytes(self.codec.compress(self.payload, asbytes=True))


class File:
    """A trace or a result taken apart: `groups` are row groups of columns of pages."""

    def __init__(self, data: bytes) -> None:
        length = int.from_bytes(data[-8:-4], "little")
        self.footer = thrift.Reader(data[-8 - length : -8]).struct()
        self.key, text = next((k, v) for k, v in self._pairs() if k in (KEY, RESULT_KEY))
        self.metadata: dict[str, Any] = json.loads(text)
        self.groups: list[list[list[Page]]] = []
        for group in thrift.at(self.footer, ROW_GROUPS)[1]:
            self.groups.append([self._pages(data, thrift.at(chunk, CHUNK_METADATA)) for chunk in self._chunks(group)])

    def _pairs(self) -> list[tuple[bytes, bytes]]:
        return [(thrift.at(pair, 1), thrift.at(pair, 2)) for pair in thrift.at(self.footer, PAIRS)[1]]

    @staticmethod
    def _chunks(group: Struct) -> list[Struct]:
        chunks: list[Struct] = thrift.at(group, CHUNKS)[1]
        return chunks

    @staticmethod
    def _pages(data: bytes, chunk: Struct) -> list[Page]:
        codec = _CODECS[thrift.at(chunk, CODEC)]
        at = thrift.at(chunk, DICTIONARY_OFFSET) or thrift.at(chunk, DATA_OFFSET)
        end = at + thrift.at(chunk, CHUNK_SIZE)
        pages = []
        while at < end:
            reader = thrift.Reader(data, at)
            header = reader.struct()
            at = reader.at + thrift.at(header, PACKED_SIZE)
            payload = bytes(
                codec.decompress(data[reader.at : at], decompressed_size=thrift.at(header, UNPACKED_SIZE), asbytes=True)
            )
            pages.append(Page(header, payload, codec))
        return pages

    def pages(self) -> list[Page]:
        return [page for group in self.groups for column in group for page in column]

    def written(self, change: Any = None, text: bytes | None = None) -> bytes:
        """The file, with all that depends on its bytes made to fit; then `change` may spoil the footer's tree."""
        body = bytearray(b"PAR1")
        facts = self.metadata.get("row_groups")
        for index, (group, columns) in enumerate(zip(thrift.at(self.footer, ROW_GROUPS)[1], self.groups, strict=True)):
            begin = len(body)
            for chunk, pages in zip(self._chunks(group), columns, strict=True):
                about, start = thrift.at(chunk, CHUNK_METADATA), len(body)
                for page in pages:
                    if page is pages[-1]:
                        thrift.put(about, DATA_OFFSET, len(body))
                    body += page.written()
                thrift.put(about, DICTIONARY_OFFSET, start)
                thrift.put(about, CHUNK_SIZE, len(body) - start)
            if isinstance(facts, list) and index < len(facts) and isinstance(facts[index], dict):
                facts[index] |= {
                    "offset": begin, "size": len(body) - begin, "crc32": zlib.crc32(bytes(body[begin:])),
                }  # fmt: skip
        footer = copy.deepcopy(self.footer)
        for pair in thrift.at(footer, PAIRS)[1]:
            if thrift.at(pair, 1) == self.key:
                thrift.put(pair, 2, json.dumps(self.metadata).encode() if text is None else text)
        if change is not None:
            change(footer)
        packed = thrift.written(footer)
        end = packed + len(packed).to_bytes(4, "little") + b"PAR1"
        return sealed(bytes(body), end) if self.key == KEY else bytes(body) + end


def spoil(tree: Struct, rng: random.Random, *, but: tuple[int, ...] = ()) -> None:
    """One value at some depth is another, is missing, is there twice, or has a size that lies."""
    node: Any = tree
    while True:
        fields = [field for field in node if node is not tree or field[0] not in but]
        if not fields:
            return
        field = rng.choice(fields)
        _, kind, value = field
        if rng.random() < 0.06:
            node.remove(field) if rng.random() < 0.5 else node.append(copy.deepcopy(field))
            return
        if kind == STRUCT:
            node = value
            continue
        if kind == LIST and value[1] and rng.random() < 0.85:
            if value[0] == STRUCT:
                node = rng.choice(value[1])
                continue
            value[1][rng.randrange(len(value[1]))] = rng.choice(NUMBERS) if value[0] in thrift.INTEGERS else b"\xff\0x"
            return
        if kind == LIST:
            value[2:] = [rng.choice((0, 1, 100, 1 << 20, (1 << 31) - 1, 1 << 40))]
        elif kind in thrift.INTEGERS:
            field[2] = rng.choice((*NUMBERS, value + 1, value - 1, -value, rng.randrange(16)))
        elif kind == thrift.BINARY:
            field[2] = rng.choice((b"", b"\xff" * 9, value + b"\0", value[:-1], b"x" * 5000))
        elif kind in (thrift.TRUE, thrift.FALSE):
            field[2] = not value
        return


def wrong_statistics(file: File, rng: random.Random) -> None:
    """Least and most values, null and distinct counts that no row has; what is read must not depend on them."""
    for group in thrift.at(file.footer, ROW_GROUPS)[1]:
        for chunk in thrift.at(group, CHUNKS)[1]:
            about = thrift.at(chunk, CHUNK_METADATA)
            width = 4 if thrift.at(about, 1) == 1 else 8
            lie = [
                [1, thrift.BINARY, rng.randbytes(width)], [2, thrift.BINARY, rng.randbytes(width)],
                [3, thrift.I64, rng.choice((0, 1, 5, 1 << 40, -1))], [4, thrift.I64, rng.choice((0, 1, 1 << 40))],
                [5, thrift.BINARY, rng.randbytes(width)], [6, thrift.BINARY, rng.randbytes(width)],
            ]  # fmt: skip
            about[:] = sorted([*(field for field in about if field[0] != STATISTICS), [STATISTICS, STRUCT, lie]])


def odd_payload(page: Page, rng: random.Random) -> None:
    """Bytes of dictionaries, of levels, of runs, of packed differences, as they are before they are packed."""
    if rng.random() < 0.5 and page.payload:  # where widths, counts and the first run stand
        mutant = bytearray(page.payload)
        for _ in range(rng.choice((1, 1, 2, 4))):
            mutant[rng.randrange(min(len(mutant), 16))] = rng.choice((0, 1, 8, 31, 32, 33, 64, 0x7F, 0x80, 0xFF))
        if rng.random() < 0.3:  # a run, or a block, of a huge length
            mutant[rng.randrange(len(mutant)) :] = b"\xff\xff\xff\xff\x0f" * 2
        page.payload = bytes(mutant)
    elif page.payload:
        page.payload = flipped(page.payload, rng)


def deep(rng: random.Random) -> bytes:
    """JSON nested deeper than a stack is, or longer than a number can be."""
    depth = rng.choice((100, 1_000, 100_000, 1_000_000))
    return rng.choice((
        b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth, b'{"format": {"major": ' + b"1" * depth + b"}}",
        b'{"format": {"major": 1, "minor": 1e999}}', b"\xff" * 100, b'"' + b"\\u0000" * 1000 + b'"', b"NaN", b"",
    ))  # fmt: skip


def odd_rows(trace: Trace, rng: random.Random) -> bytes:
    """Sound Parquet with rows that no kernel makes: extremes, nulls, kinds in another order."""
    table = pa.Table.from_batches(list(trace.batches())).unify_dictionaries()
    for _ in range(rng.choice((1, 1, 2, 4))):
        index = rng.randrange(table.num_columns)
        field = table.schema.field(index)
        at = np.array(sorted(rng.sample(range(len(table)), rng.choice((1, len(table) // 10, len(table) // 2)))))
        if field.name == "kind":
            kinds = table["kind"].combine_chunks().cast(pa.string()).to_pylist()
            other = rng.choice((*set(kinds), "kvm_new_thing", "", "vm_destroy", "vm_create", "gap"))
            for row in at:
                kinds[row] = other
            table = table.set_column(index, field, pa.array(kinds).dictionary_encode().cast(field.type))
            continue
        if not pa.types.is_integer(field.type):
            continue
        bits = field.type.bit_width - (1 if pa.types.is_signed_integer(field.type) else 0)
        choices: list[int | None] = [0, 1, 3, min(512, (1 << bits) - 1), (1 << bits) - 1, 1 << (bits - 1)]
        choices += [-(1 << bits), -1] if pa.types.is_signed_integer(field.type) else []
        choices += [None] if field.nullable else []
        values = table[index].to_pylist()
        for row in at:
            values[row] = rng.choice(choices)
        table = table.set_column(index, field, pa.array(values, field.type))
    metadata = copy.deepcopy(dict(trace.metadata.raw))
    metadata["kinds"] = {each["values"]: each["counts"] for each in table["kind"].value_counts().to_pylist()}
    groups = [group.rows for group in trace.metadata.row_groups]
    at_row = 0
    for fact, rows in zip(metadata["row_groups"], groups, strict=True):
        part = table.slice(at_row, rows)
        at_row += rows
        fact["constants"] = {}
        times, seqs = part["time"].to_pylist(), part["seq"].to_pylist()
        fact |= {"first_time": min(times), "last_time": max(times), "first_seq": seqs[0], "last_seq": seqs[-1]}
    return File(with_metadata(table, groups, json.dumps(metadata).encode())).written()


KINDS = ("headers", "payloads", "packed", "footer", "statistics", "json", "deep", "rows")


def forged(path: Path, kind: str, number: int) -> bytes:
    """The `number`-th trace or result of a kind, made of the one at `path`; of results there is none of kind `rows`."""
    rng = random.Random(f"{kind} {number}")
    if kind == "rows":
        return odd_rows(Trace.open(path), rng)
    file = File(path.read_bytes())
    if kind == "headers":
        for _ in range(rng.choice((1, 1, 2))):
            page = rng.choice(file.pages())
            page.keep_sizes = True
            spoil(page.header, rng)
        for page in file.pages():
            page.packed = page.compressed()
    elif kind == "payloads":
        for page in rng.sample(file.pages(), rng.choice((1, 1, 3))):
            odd_payload(page, rng)
    elif kind == "packed":
        page = rng.choice(file.pages())
        page.packed = flipped(page.compressed(), rng)
        page.keep_sizes = rng.random() < 0.5
        if page.keep_sizes:
            thrift.put(page.header, PACKED_SIZE, len(page.packed))
    elif kind == "footer":
        return file.written(lambda footer: spoil(footer, rng, but=(PAIRS,)))
    elif kind == "statistics":
        wrong_statistics(file, rng)
    elif kind == "json":
        text = odd_metadata(json.loads(json.dumps(file.metadata)), rng)
        file.written()
        return file.written(text=_with_groups(text, file.metadata.get("row_groups", [])))
    elif kind == "deep":
        return file.written(text=deep(rng))
    return file.written()


def _with_groups(text: bytes, groups: list[Any]) -> bytes:
    """Where the text still speaks of row groups, their places and checksums are made to fit."""
    try:
        document = json.loads(text)
        for mine, right in zip(document["row_groups"], groups, strict=False):
            mine |= {name: right[name] for name in ("offset", "size", "crc32") if name in mine}
    except (ValueError, KeyError, TypeError):
        return text
    return json.dumps(document).encode()


def forge_directory(directory: Path, number: int) -> None:
    """A recording's segment whose batches are damaged or odd, each under a seal that fits."""
    rng = random.Random(f"segment {number}")
    records = np.zeros(200, RECORD)
    records["kind"] = [rng.randrange(60) for _ in records] if rng.random() < 0.5 else 20
    records["time"] = np.arange(200) + 1
    for name in RECORD.names or ():
        if rng.random() < 0.3:
            info = np.iinfo(records.dtype[name])
            records[name] = [rng.choice((info.min, info.max, 0, 1, 7)) for _ in records]
    options = pa.ipc.IpcWriteOptions(compression=rng.choice(("lz4", "zstd", None)))
    sink = io.BytesIO()
    stream = pa.ipc.new_stream(sink, RECORD_SCHEMA, options=options)
    data, first = _taken(sink), 0
    for _ in range(3):
        stream.write_batch(to_batch(columns_of(records)))
        message = _taken(sink)
        if rng.random() < 0.6:
            head = rng.choice((64, 256, len(message)))  # the flatbuffer comes first
            message = flipped(message[:head], rng) + message[head:]
        rows = rng.choice((len(records), len(records), 1, 0, -1, 1 << 20, 1 << 62))
        start = rng.choice((first, first, first, 0, 1 << 61, -5))
        crc = sealed_stream.seal_crc(message, start, rows)
        seal: Any = {"first": start, "rows": rows, "crc32": crc}
        if rng.random() < 0.1:
            seal = rng.choice(([], None, {"first": "x"}, {**seal, "rows": 1.5}, {**seal, "first": [[[]]]}))
        text = json.dumps(seal) if rng.random() < 0.95 else "[" * 100_000
        stream.write_batch(to_batch(columns_of(records[:0])), custom_metadata={"seal": text})
        data += message + _taken(sink)
        first += len(records)
    stream.close()
    data += _taken(sink)
    directory.mkdir(exist_ok=True)
    (directory / segment_name(0)).write_bytes(data)
    manifest = {"closed": {"rows": first}, "snapshot": {"vms": []}, "host": {"kernel": "6.1"}}
    text = json.dumps(manifest).encode() if rng.random() < 0.7 else odd_metadata(manifest, rng)
    (directory / MANIFEST).write_bytes(text if rng.random() < 0.9 else deep(rng))


def _taken(sink: io.BytesIO) -> bytes:
    data = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return data


def rows_of(path: Path) -> str:
    """What the rows are, in one word; read three ways, which must agree."""
    trace = Trace.open(path)
    rows = pa.Table.from_batches(list(trace.batches()), trace.schema).unify_dictionaries()
    assert trace.scan().select(pl.len()).collect().item() == rows.num_rows == trace.metadata.events
    trace.roots()
    flat = rows.set_column(rows.schema.get_field_index("kind"), "kind", rows["kind"].cast(pa.string()))
    return hashlib.sha256(str(flat.to_pydict()).encode()).hexdigest()


VERBS = (
    "info {0}", "validate {0}", "replay {0} --json", "report {0} --validate --format json", "report {0} --no-replay",
    "diff {0} {0} --unlike", "export {0} --perfetto -o {1}/x.pftrace --force", "export {0} --csv gfns -o {1}/gfns.csv",
    "export {0} --csv rmaps -o {1}/rmaps.csv", "replay {0} --no-time -o {1}/result.parquet",
    "report {1}/result.parquet", "replay {0} --smi-rate 10 --policy async", "replay {0} --aging locked",
)  # fmt: skip


@cache
def _command() -> Any:
    """The command line, which typer would make anew for each call."""
    return typer.main.get_command(command_line.app)


def through_verbs(path: Path, verbs: Sequence[str] = VERBS) -> str:
    """Each verb answers, or says in one line why not; its exit code is 0 or 1 where it answers."""
    said = {}
    for left in path.parent.iterdir():
        if left != path:
            left.unlink()
    for verb in verbs:
        words = verb.format(path, path.parent).split()
        try:
            with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.redirect_stderr(io.StringIO()):
                code = _command()(words, standalone_mode=False)
            assert code in (None, 0, 1), (verb, code)
            assert told.getvalue().replace("\n", "").isprintable(), (verb, told.getvalue())
        except Problem as problem:
            if problem.code != BAD_INPUT or not str(problem).isprintable():
                raise AssertionError(f"{verb}: {problem.code}: {problem}") from None
            said[verb] = str(problem)
    return next(iter(said.values())) if len(said) == len(verbs) else "read"


def main(seed: str, kind: str, first: str, count: str, scratch: str, *verbs: str) -> None:
    """See the module."""
    path = Path(scratch) / ("forged.kvmt" if kind == "segments" else "forged.parquet")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    original = rows_of(Path(seed))
    for number in range(int(first), int(first) + int(count)):
        print(json.dumps({"mutant": number}), flush=True)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS * (len(VERBS) if verbs else 1))
        out = path.with_name("recovered.parquet")
        try:
            if kind == "segments":
                forge_directory(path, number)
                compact(path, out)
                rows_of(out)
                outcome = "read"
            else:
                path.write_bytes(forged(Path(seed), kind, number))
                outcome = through_verbs(path) if verbs else "read" if rows_of(path) == original else "other rows"
        except Problem as problem:
            outcome = str(problem)
        out.unlink(missing_ok=True)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"outcome": outcome}), flush=True)
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps({"peak": int(peak) << 10}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
