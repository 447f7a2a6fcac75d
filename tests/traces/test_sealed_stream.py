# SPDX-License-Identifier: Apache-2.0
"""What a recorder writes without pyarrow is what pyarrow reads, and its compression may come from either package."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.record import RECORD, columns_of
from traces.recording.arrow_records import RECORD_SCHEMA, to_batch
from traces.recording.sealed_stream import END, BatchEncoder, seal_crc


@pytest.fixture(params=["lz4", "pyarrow"])
def encoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BatchEncoder:
    if request.param == "pyarrow":
        monkeypatch.setitem(sys.modules, "lz4", None)
    return BatchEncoder()


def records(seed: int, rows: int) -> np.ndarray[Any, Any]:
    """Some columns of random bytes, which do not get shorter, some of extremes, some of zeros."""
    rng = np.random.default_rng(seed)
    made = np.zeros(rows, RECORD)
    for name in RECORD.names or ():
        info = np.iinfo(RECORD[name])
        match rng.integers(3):
            case 0:
                made[name] = rng.integers(info.min, info.max, rows, RECORD[name], endpoint=True)
            case 1:
                made[name] = rng.choice(np.array([info.min, info.max, 0, 1], RECORD[name]), rows)
    return made


def read(data: bytes) -> tuple[pa.RecordBatch, dict[str, Any]]:
    """The batch and the seal of a stream with one of each."""
    stream = pa.ipc.open_stream(pa.py_buffer(data))
    assert stream.schema == RECORD_SCHEMA
    batch = stream.read_next_batch()
    batch.validate(full=True)
    empty, metadata = stream.read_next_batch_with_custom_metadata()
    empty.validate(full=True)
    assert empty.num_rows == 0
    with pytest.raises(StopIteration):
        stream.read_next_batch()
    return batch, json.loads(metadata["seal"])


@pytest.mark.parametrize("rows", [1, 2, 7, 1000, 1 << 16])
def test_pyarrow_reads_what_was_written(encoder: BatchEncoder, rows: int) -> None:
    for seed in range(20 if rows < 1000 else 3):
        written = columns_of(records(seed, rows))
        message = encoder.batch(written)
        batch, seal = read(encoder.head + message + encoder.seal(message, 5, rows) + END)
        assert seal == {"first": 5, "rows": rows, "crc32": seal_crc(message, 5, rows)}
        for name, values in written.items():
            assert np.array_equal(batch[name].to_numpy(), values), name


@given(st.integers(0, 1 << 32), st.integers(1, 300), st.integers(0, (1 << 62) - 1))
def test_messages_are_whole_in_themselves(seed: int, rows: int, first: int) -> None:
    """Each may follow any other, with each provider's compression; and lengths keep to Arrow's multiples of 8."""
    own = BatchEncoder()
    message = own.batch(columns_of(records(seed, rows)))
    seal = own.seal(message, first, rows)
    assert len(message) % 8 == len(seal) % 8 == len(own.head) % 8 == 0
    stream = pa.ipc.open_stream(pa.py_buffer(own.head + message + seal + message + END))
    assert [batch.num_rows for batch in stream] == [rows, 0, rows]


def test_the_head_says_what_pyarrow_would() -> None:
    ours, theirs = (pa.ipc.read_schema(pa.py_buffer(head)) for head in (BatchEncoder.head, RECORD_SCHEMA.serialize()))
    assert ours.equals(theirs, check_metadata=True)
    assert [field.nullable for field in ours] == [False] * len(RECORD.names or ())


def test_segments_are_as_long_as_pyarrow_makes_them(encoder: BatchEncoder) -> None:
    """Within a twentieth: the compression is the same, and what stands around it is small."""
    written = np.zeros(1 << 16, RECORD)
    rng = np.random.default_rng(1)
    written["time"] = np.cumsum(rng.integers(0, 1000, len(written)))
    written["w0"] = rng.integers(0, 500, len(written)) << 12
    written["kind"] = rng.integers(0, 20, len(written))
    columns = columns_of(written)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, RECORD_SCHEMA, options=pa.ipc.IpcWriteOptions(compression="lz4")) as stream:
        stream.write_batch(to_batch(columns))
    assert len(encoder.batch(columns)) < 1.05 * len(sink.getvalue())
