# SPDX-License-Identifier: Apache-2.0
"""perf.data and trace.dat in the forms that no recording here has, made of those that were recorded."""

from __future__ import annotations

import io
import lzma
import struct
from pathlib import Path

import pyarrow as pa

DIRECTORY = Path(__file__).parents[2] / "traces" / "simultaneous"


def recorded(name: str) -> bytes:
    """A file of traces/simultaneous, unpacked."""
    return lzma.decompress((DIRECTORY / f"{name}.xz").read_bytes())


def record(number: int, body: bytes) -> bytes:
    return struct.pack("<IHH", number, 0, 8 + len(body)) + body


def _sections(data: bytes) -> tuple[int, bytes, bytes, dict[int, bytes]]:
    """Of a perf.data: an attribute's bytes, the attributes, the records, and the features by number."""
    each, at, size, records_at, records_size = struct.unpack_from("<QQQQQ", data, 16)
    low, high = struct.unpack_from("<QQ", data, 72)
    numbers = [number for number in range(128) if (low | high << 64) >> number & 1]
    features = {}
    for place, number in enumerate(numbers):
        begin, length = struct.unpack_from("<QQ", data, records_at + records_size + 16 * place)
        features[number] = data[begin : begin + length]
    return each, data[at : at + size], data[records_at : records_at + records_size], features


def as_stream(data: bytes) -> bytes:
    """A perf.data as `perf record -o -` writes it."""
    each, attributes, records, features = _sections(data)
    made = [b"PERFILE2", struct.pack("<Q", 16)]
    for at in range(0, len(attributes), each):
        attribute = attributes[at : at + each - 16]
        begin, length = struct.unpack_from("<QQ", attributes, at + each - 16)
        made.append(record(64, attribute + data[begin : begin + length]))
    made.append(record(80, struct.pack("<Q", 4) + features[4]))
    made.append(record(66, struct.pack("<I", len(features[1]))))
    made += [features[1], bytes(-len(features[1]) % 8), records]
    return b"".join(made)


def as_compressed(data: bytes) -> bytes:
    """A perf.data as `perf record -z` writes it: records packed into records, the zstd stream never ended."""
    _, _, records, _ = _sections(data)
    sink = io.BytesIO()
    stream = pa.CompressedOutputStream(pa.PythonFile(sink, mode="w"), "zstd")
    for at in range(0, len(records), 9999):
        stream.write(records[at : at + 9999])
        stream.flush()
    packed = sink.getvalue()
    made = b"".join(record(81, packed[at : at + 60_000]) for at in range(0, len(packed), 60_000))
    begin, size = struct.unpack_from("<QQ", data, 40)
    moved = len(made) - size
    head = bytearray(data[:begin])
    struct.pack_into("<Q", head, 48, len(made))
    low, high = struct.unpack_from("<QQ", data, 72)
    count = (low | high << 64).bit_count()
    table = bytearray(data[begin + size : begin + size + 16 * count])
    for place in range(count):
        at, length = struct.unpack_from("<QQ", table, 16 * place)
        struct.pack_into("<QQ", table, 16 * place, at + moved, length)
    return bytes(head) + made + bytes(table) + data[begin + size + 16 * count :]


def option(number: int, data: bytes) -> bytes:
    return struct.pack("<HI", number, len(data)) + data


def with_options(data: bytes, more: bytes, buffer: str = "") -> bytes:
    """A trace.dat of version 6 with further options, and with the same pages as those of a second buffer."""
    first, begin = data.index(b"options  \0") + 10, data.index(b"flyrecord\0")
    cpus = 2
    table = [struct.unpack_from("<QQ", data, begin + 10 + 16 * cpu) for cpu in range(cpus)]
    pages = [data[at : at + size] for at, size in table]
    named = option(3, struct.pack("<Q", 0) + buffer.encode() + b"\0") if buffer else b""
    head = data[:first] + more
    at = len(head) + len(named) + len(data[first:begin]) + 10 + 16 * cpus
    places = [(at, len(pages[0])), (at + len(pages[0]), len(pages[1]))]
    entries = b"".join(struct.pack("<QQ", *place) for place in places)
    end = at + sum(map(len, pages))
    if buffer:
        named = option(3, struct.pack("<Q", end) + buffer.encode() + b"\0")
    made = head + named + data[first:begin] + b"flyrecord\0" + entries + b"".join(pages)
    return made + (b"flyrecord\0" + entries if buffer else b"")
