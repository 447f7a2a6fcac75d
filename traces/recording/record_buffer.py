# SPDX-License-Identifier: Apache-2.0
"""Gathers records into batches of columns, for what stores them.

A record is 80 bytes, and each of its fields goes to a column of its own: block by block, so that a block is read from
memory once and not once a field. The columns are reused for the next batch, so that no memory is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from traces.record import RECORD, Columns

BATCH_ROWS: Final = 1 << 16
_BLOCK: Final = 1 << 11  # records, 160 KiB: they stay in a core's own cache while their fields are taken out


class RecordBuffer:
    """Takes records as they come and returns them as columns, BATCH_ROWS at a time."""

    def __init__(self) -> None:
        self._columns: Columns = {name: np.empty(BATCH_ROWS, RECORD[name]) for name in RECORD.names or ()}
        self._filled = 0

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the buffer takes, however full it is."""
        return sum(column.nbytes for column in self._columns.values())

    def add(self, records: NDArray[np.void]) -> Iterator[Columns]:
        """Take records (dtype RECORD; copied) and yield full batches, each valid until the next is asked for."""
        while len(records):
            taken = records[: min(_BLOCK, BATCH_ROWS - self._filled)]
            for name, column in self._columns.items():
                column[self._filled : self._filled + len(taken)] = taken[name]
            self._filled += len(taken)
            records = records[len(taken) :]
            if self._filled == BATCH_ROWS:
                yield from self.rest()

    def rest(self) -> Iterator[Columns]:
        """Yield the records that do not fill a batch as one; nothing if there are none."""
        filled, self._filled = self._filled, 0
        if filled:
            yield {name: column[:filled] for name, column in self._columns.items()}
