# SPDX-License-Identifier: Apache-2.0
"""Segments of a recording as an Arrow stream: batches of raw records, each followed by its seal (see segments.py).

They are written without pyarrow, which is 170 MB on a host that only records; tests compare the two.
https://arrow.apache.org/docs/format/Columnar.html has the messages, metadata version 5; bodies are LZ4 frames.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from traces.record import RECORD, Columns, columns_of
from traces.recording.flat_buffers import Node, flat_buffer

END: Final = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
_V5: Final = 4  # MetadataVersion
_SCHEMA, _RECORD_BATCH = 1, 3  # MessageHeader
_INT: Final = 2  # Type
_EMPTY: Final = columns_of(np.empty(0, RECORD))


def seal_crc(message: bytes | memoryview, first: int, rows: int) -> int:
    """Return the CRC-32 of a batch's bytes and of its seal's numbers, so that a damaged seal renumbers no rows."""
    return zlib.crc32(f"{first} {rows}".encode(), zlib.crc32(message))


def _compression() -> Callable[[Any], bytes]:
    """Return the function that makes an LZ4 frame: that of lz4, which is small and soon loaded, else pyarrow's."""
    try:
        from lz4 import frame
    except ImportError:
        import pyarrow as pa

        codec = pa.Codec("lz4")
        return lambda data: bytes(codec.compress(data, asbytes=True))
    return lambda data: bytes(frame.compress(data, block_size=frame.BLOCKSIZE_MAX4MB, store_size=False))


def _message(kind: int, header: Node, body: int, custom: Node | None = None) -> bytes:
    """Return a message as a stream has it, without its body of so many bytes: a mark, the size, and the flatbuffer."""
    said: dict[int, Node] = {0: _V5, 1: kind, 2: header, 3: body}
    if custom is not None:
        said[4] = custom
    data = flat_buffer(said)
    return struct.pack("<iI", -1, len(data)) + data


def _schema() -> bytes:
    """Return the message with which a stream begins: the record's fields, integers that are never null."""
    fields: list[Node] = []
    for name in RECORD.names or ():
        kind = RECORD[name]
        fields.append({
            0: name.encode(), 1: 0, 2: _INT, 3: {0: kind.itemsize * 8, 1: int(kind.kind == "i")}, 5: [],
        })  # fmt: skip
    return _message(_SCHEMA, {0: 0, 1: fields}, 0)


class BatchEncoder:
    """Encodes records as messages of an Arrow stream, each complete in itself.

    A segment is `head`, messages and their seals, and `END`. What was encoded may go into any segment, later and
    elsewhere.
    """

    head: Final = _schema()

    def __init__(self) -> None:
        self._compress = _compression()

    def batch(self, columns: Columns) -> bytes:
        """Return the message of some records, given as columns by field."""
        return self._batch(columns)

    def seal(self, message: bytes, first: int, rows: int) -> bytes:
        """Return the message that vouches for all bytes since the previous seal, and for the first row's number."""
        seal = {"first": first, "rows": rows, "crc32": seal_crc(message, first, rows)}
        return self._batch(_EMPTY, [{0: b"seal", 1: json.dumps(seal).encode()}])

    def _batch(self, columns: Columns, custom: Node | None = None) -> bytes:
        """Return a message with (rows, nulls) and (offset, size) of the body's buffers, and that body."""
        rows, names = len(columns["time"]), RECORD.names or ()
        buffers = np.zeros((len(names), 2, 2), np.int64)  # of each column: a bitmap of nulls, empty, and the values
        parts: list[bytes] = []
        offset = 0
        for place, name in zip(buffers, names, strict=True):
            data = self._buffer(columns[name]) if rows else b""
            place[:, 0], place[1, 1] = offset, len(data)
            parts += (data, bytes(-len(data) % 8))
            offset += len(data) + -len(data) % 8
        nodes = np.array([(rows, 0)] * len(names), np.int64)
        compressed: Node = {0: 0, 1: 0}  # codec LZ4_FRAME, each buffer compressed alone
        header: Node = {0: rows, 1: nodes, 2: buffers.reshape(-1, 2), 3: compressed}
        return b"".join((_message(_RECORD_BATCH, header, offset, custom), *parts))

    def _buffer(self, values: np.ndarray[Any, Any]) -> bytes:
        """Return the size of the values and their LZ4 frame; if that is no shorter, -1 and the values as they are."""
        packed = self._compress(values)
        if len(packed) < values.nbytes:
            return struct.pack("<q", values.nbytes) + packed
        return struct.pack("<q", -1) + values.tobytes()
