# SPDX-License-Identifier: Apache-2.0
"""Raw records as Arrow data; the code that writes them does without pyarrow (sealed_stream.py)."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from traces.record import RECORD, Columns
from traces.schema import RECORD_FIELDS

RECORD_SCHEMA: Final = pa.schema(
    [pa.field(name, pa.from_numpy_dtype(RECORD[name]), nullable=False) for name, _ in RECORD_FIELDS]
)


def to_batch(columns: Columns) -> pa.RecordBatch:
    """Return the columns as one record batch of RECORD_SCHEMA, without copying."""
    return pa.RecordBatch.from_arrays([pa.array(columns[name]) for name, _ in RECORD_FIELDS], schema=RECORD_SCHEMA)


def to_columns(batch: pa.RecordBatch) -> Columns:
    """Return the columns of a validated batch of RECORD_SCHEMA as numpy arrays, without copying."""
    return {name: batch.column(index).to_numpy(zero_copy_only=True) for index, (name, _) in enumerate(RECORD_FIELDS)}


def spare_allocations() -> None:
    """Make Arrow keep the memory that it has, which is for compaction.

    Arrow's own allocator gives memory back to the kernel between two batches and takes it again, a tenth of what
    compaction costs; that of libc keeps it.
    """
    pa.set_memory_pool(pa.system_memory_pool())
