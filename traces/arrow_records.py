# SPDX-License-Identifier: Apache-2.0
"""Raw records as pyarrow sees them; what writes them does without it (sealed_stream.py)."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from traces.record import RECORD, Columns
from traces.schema import RECORD_FIELDS

RECORD_SCHEMA: Final = pa.schema(
    [pa.field(name, pa.from_numpy_dtype(RECORD[name]), nullable=False) for name, _ in RECORD_FIELDS]
)


def to_batch(columns: Columns) -> pa.RecordBatch:
    """The columns as one record batch of RECORD_SCHEMA, without copying."""
    return pa.RecordBatch.from_arrays([pa.array(columns[name]) for name, _ in RECORD_FIELDS], schema=RECORD_SCHEMA)


def to_columns(batch: pa.RecordBatch) -> Columns:
    """The columns of a validated batch of RECORD_SCHEMA as numpy arrays, without copying."""
    return {name: batch.column(index).to_numpy(zero_copy_only=True) for index, (name, _) in enumerate(RECORD_FIELDS)}


def spare_allocations() -> None:
    """Have Arrow keep the memory that it has: for compaction.

    Its own allocator gives memory back to the kernel between two batches and takes it again, a tenth of what compaction
    costs; libc's keeps it.
    """
    pa.set_memory_pool(pa.system_memory_pool())
