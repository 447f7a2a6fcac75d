# SPDX-License-Identifier: Apache-2.0
"""Segments of a recording in Arrow: batches of raw records, each followed by its seal (see segments.py)."""

from __future__ import annotations

import io
import json
import zlib
from typing import Final

import numpy as np
import pyarrow as pa

from traces.record import RECORD, Columns, columns_of
from traces.schema import RECORD_FIELDS

RECORD_SCHEMA: Final = pa.schema(
    [pa.field(name, pa.from_numpy_dtype(RECORD[name]), nullable=False) for name, _ in RECORD_FIELDS]
)
END: Final = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
_OPTIONS: Final = pa.ipc.IpcWriteOptions(compression="lz4")


def seal_crc(message: bytes | memoryview, first: int, rows: int) -> int:
    """CRC-32 of a batch's bytes and of what its seal says of them, so that a damaged seal renumbers nothing."""
    return zlib.crc32(f"{first} {rows}".encode(), zlib.crc32(message))


def to_batch(columns: Columns) -> pa.RecordBatch:
    """The columns as one Arrow record batch of RECORD_SCHEMA, without copying."""
    arrays = [pa.array(columns[name]) for name, _ in RECORD_FIELDS]
    return pa.RecordBatch.from_arrays(arrays, schema=RECORD_SCHEMA)


def to_columns(batch: pa.RecordBatch) -> Columns:
    """The columns of a validated batch of RECORD_SCHEMA as numpy arrays, without copying."""
    return {name: batch.column(index).to_numpy(zero_copy_only=True) for index, (name, _) in enumerate(RECORD_FIELDS)}


_EMPTY: Final = to_batch(columns_of(np.empty(0, RECORD)))


class BatchEncoder:
    """Records as messages of an Arrow stream, each whole in itself: a segment is `head`, messages and seals, and `END`.

    What was encoded may go into any segment, later and elsewhere.
    """

    def __init__(self) -> None:
        self._sink = io.BytesIO()
        self._stream = pa.ipc.new_stream(self._sink, RECORD_SCHEMA, options=_OPTIONS)
        self.head = RECORD_SCHEMA.serialize().to_pybytes()
        self._stream.write_batch(_EMPTY)
        self._taken()  # the stream's own head

    def batch(self, columns: Columns) -> bytes:
        """The message of some records, given as columns by field."""
        self._stream.write_batch(to_batch(columns))
        return self._taken()

    def seal(self, message: bytes, first: int, rows: int) -> bytes:
        """The message that vouches for all bytes since the seal before it, and for the number of the first row."""
        seal = {"first": first, "rows": rows, "crc32": seal_crc(message, first, rows)}
        self._stream.write_batch(_EMPTY, custom_metadata={"seal": json.dumps(seal)})
        return self._taken()

    def _taken(self) -> bytes:
        data = self._sink.getvalue()
        self._sink.seek(0)
        self._sink.truncate()
        return data
