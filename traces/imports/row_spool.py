# SPDX-License-Identifier: Apache-2.0
"""Rows that wait in a temporary file until all of a source is read: only then is known whom each thread belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from traces.background import Background, read_ahead
from traces.imports.form_program import ROLE_FIELDS, TEXT_ROLE
from traces.imports.other_events import OTHER, OtherTexts
from traces.record import Columns
from traces.recording.arrow_records import RECORD_SCHEMA, to_batch, to_columns
from traces.schema import BY_NAME, RECORD_FIELDS

_GET_PAGE: Final = BY_NAME["kvm_mmu_get_page"].code
_ROOT_LEVELS: Final = (4, 5)
_CREATED: Final = 1


class RowSpool:
    """`rows` so far, `kinds` of them by number; `root_level` of the tables that are roots, 0: there are none.

    `lowest_tables` were made at level 1, as the event says. `texts` are those of events that no kind is for.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.rows = 0
        self.texts = OtherTexts()
        self.kinds: NDArray[np.int64] = np.zeros(256, np.int64)
        self.root_level = 0
        self.lowest_tables = 0
        self._file = file
        self._background = Background()
        self._stream: Any = pa.ipc.new_stream(file, RECORD_SCHEMA, options=pa.ipc.IpcWriteOptions(compression="lz4"))

    @property
    def known(self) -> int:
        """Rows of events that a kind is for, once all are written."""
        self._background.wait()
        return self.rows - int(self.kinds[OTHER])

    def add(self, columns: Columns) -> None:
        """Columns of the record's, all of one length; those that are missing are 0. They are written meanwhile."""
        if count := len(columns["kind"]):
            self.rows += count
            self._background.do(lambda: self._write(columns))

    def _write(self, columns: Columns) -> None:
        count = len(columns["kind"])
        whole = {}
        for name, dtype in RECORD_FIELDS:
            values = columns.get(name)
            whole[name] = np.zeros(count, dtype) if values is None else np.ascontiguousarray(values).view(dtype)
        self._stream.write_batch(to_batch(whole))
        self.kinds += np.bincount(columns["kind"], minlength=256)
        self._see_roots(columns)

    def _see_roots(self, columns: Columns) -> None:
        made = np.flatnonzero((columns["kind"] == _GET_PAGE) & (columns["flags"] & _CREATED != 0))
        role = columns["role"][made]
        shift = np.where(role & TEXT_ROLE, ROLE_FIELDS["direct"][0], 7)  # the same bit in every kernel's word
        highest = int(columns["level"][made][(role >> shift) & 1 != 0].max(initial=0))
        self.root_level = max(self.root_level, highest if highest in _ROOT_LEVELS else 0)
        self.lowest_tables += int(np.count_nonzero(columns["level"][made] == 1))

    def batches(self) -> Iterator[Columns]:
        """What was added, once; nothing is added after that."""
        self._background.wait()
        self._background.end()
        return read_ahead(self._batches())

    def _batches(self) -> Iterator[Columns]:
        self._stream.close()
        self._file.seek(0)
        with pa.ipc.open_stream(self._file) as stream:
            for batch in stream:
                yield {name: values.copy() for name, values in to_columns(batch).items()}
