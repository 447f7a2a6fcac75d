"""The recorder's 80-byte record as numpy and Arrow see it.

A segment stores the record's fields as they are, one Arrow column each; naming them by kind is compaction's work
(`columns.py`), so that the drain never has to look at an event.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from traces.schema import RECORD_FIELDS, RECORD_SIZE

RECORD: Final[np.dtype[np.void]] = np.dtype([(name, "<" + kind) for name, kind in RECORD_FIELDS])
assert RECORD.itemsize == RECORD_SIZE, "RECORD_FIELDS must be naturally aligned without padding"

# One array per record field, all of one length.
Columns = dict[str, NDArray[Any]]

RECORD_SCHEMA: Final = pa.schema(
    [pa.field(name, pa.from_numpy_dtype(RECORD[name]), nullable=False) for name, _ in RECORD_FIELDS]
)


def to_batch(records: NDArray[np.void]) -> pa.RecordBatch:
    """The records (dtype RECORD, one dimension) as one Arrow record batch of RECORD_SCHEMA; copies."""
    arrays = [pa.array(np.ascontiguousarray(records[name])) for name, _ in RECORD_FIELDS]
    return pa.RecordBatch.from_arrays(arrays, schema=RECORD_SCHEMA)


def to_columns(batch: pa.RecordBatch) -> Columns:
    """The columns of a validated batch of RECORD_SCHEMA as numpy arrays, without copying."""
    return {name: batch.column(index).to_numpy(zero_copy_only=True) for index, (name, _) in enumerate(RECORD_FIELDS)}
