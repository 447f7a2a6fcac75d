# SPDX-License-Identifier: Apache-2.0
"""The recorder's 80-byte record as numpy sees it. Arrow, which takes time to load, is not needed here."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from traces.schema import RECORD_FIELDS, RECORD_SIZE

RECORD: Final[np.dtype[np.void]] = np.dtype([(name, "<" + kind) for name, kind in RECORD_FIELDS])
assert RECORD.itemsize == RECORD_SIZE, "RECORD_FIELDS must be naturally aligned without padding"

# One array per record field, all of one length.
Columns = dict[str, NDArray[Any]]


def columns_of(records: NDArray[np.void]) -> Columns:
    """Return a few records as columns; for many, record_buffer.py needs less memory."""
    return {name: np.ascontiguousarray(records[name]) for name in RECORD.names or ()}
