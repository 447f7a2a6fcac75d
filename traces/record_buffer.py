# SPDX-License-Identifier: Apache-2.0
"""Records gathered into batches of columns, for what stores them.

A record is 80 bytes, and each of its fields goes to a column of its own: block by block, so that a block is read from
memory once and not once a field. The columns are written over for the next batch: no memory is asked for.
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
    """Takes records as they come and gives them out as columns, BATCH_ROWS at a time."""

    def __init__(self) -> None:
        self._columns: Columns = {name: np.empty(BATCH_ROWS, RECORD[name]) for name in RECORD.names or ()}
        self._filled = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes, however full it is."""
        return sum(column.nbytes for column in self._columns.values())

    def add(self, records: NDArray[np.void]) -> Iterator[Columns]:
        """Take records (dtype RECORD; copied); each full batch, which is valid until the next one is asked for."""
        while len(records):
            taken = records[: min(_BLOCK, BATCH_ROWS - self._filled)]
            for name, column in self._columns.items():
                column[self._filled : self._filled + len(taken)] = taken[name]
            self._filled += len(taken)
            records = records[len(taken) :]
            if self._filled == BATCH_ROWS:
                yield from self.rest()

    def rest(self) -> Iterator[Columns]:
        """What does not fill a batch, as one; nothing where there is nothing."""
        filled, self._filled = self._filled, 0
        if filled:
            yield {name: column[:filled] for name, column in self._columns.items()}
