# SPDX-License-Identifier: Apache-2.0
"""Events of an import that a trace has no kind for: kept as the text that was printed, or that their fields make.

The texts wait in a temporary file, as their rows do; of each row the record has where its text is.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from traces.record import Columns
from traces.schema import BY_NAME

OTHER: Final = BY_NAME["other"].code
LONGEST: Final = 480  # bytes of a text


class OtherTexts:
    """The texts in order of their rows. `place` after `add`ing all; then `column` finds them by the rows' numbers."""

    def __init__(self) -> None:
        self._bytes = tempfile.TemporaryFile(prefix="kvmtrace-")  # noqa: SIM115 (closed by `close`)
        self._index = tempfile.TemporaryFile(prefix="kvmtrace-")  # noqa: SIM115
        self._size = self._placed = 0
        self._read: mmap.mmap | None = None

    def add(self, texts: Sequence[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Keep texts; where each is, and its length: the first two words of its record."""
        cut = [text[:LONGEST] for text in texts]
        lengths = np.array([len(text) for text in cut], np.uint64)
        ends = np.cumsum(lengths, dtype=np.uint64) + np.uint64(self._size)
        self._bytes.write(b"".join(cut))
        self._size = int(ends[-1]) if len(ends) else self._size
        return ends - lengths, lengths

    def place(self, columns: Columns, first: int) -> None:
        """Note which rows have the texts, of a batch that begins with this number; their records are cleared."""
        at = np.flatnonzero(columns["kind"] == OTHER)
        if len(at):
            entry = np.stack([(first + at).astype(np.uint64), columns["w0"][at], columns["w1"][at]], axis=1)
            self._index.write(entry.tobytes())
            self._placed += len(at)
            for word in ("w0", "w1"):
                columns[word][at] = 0

    def column(self, rows: pa.RecordBatch) -> pa.Array:
        """The texts of rows of a trace, null where there is none."""
        seq = rows.column("seq").to_numpy().astype(np.uint64)
        texts: list[str | None] = [None] * len(seq)
        if (placed := self._placed) and len(seq):  # before the flush: those of later batches are being noted meanwhile
            self._index.flush()
            index = np.memmap(self._index, np.uint64, "r", shape=(placed, 3))
            first, last = np.searchsorted(index[:, 0], [seq[0], seq[-1] + np.uint64(1)])
            some = np.array(index[first:last])
            where = np.searchsorted(seq, some[:, 0])
            mine = np.flatnonzero(seq[np.minimum(where, len(seq) - 1)] == some[:, 0])
            for row, text in zip(where[mine].tolist(), self.of(*some[mine, 1:].T), strict=True):
                texts[row] = text
        return pa.array(texts, pa.string())

    def of(self, at: NDArray[np.uint64], lengths: NDArray[np.uint64]) -> Iterator[str]:
        """The texts at these places."""
        data = self._mapped()
        for begin, length in zip(at.tolist(), lengths.tolist(), strict=True):
            yield bytes(data[begin : begin + length]).decode(errors="replace")

    def close(self) -> None:
        if self._read is not None:
            self._read.close()
        self._bytes.close()
        self._index.close()

    def _mapped(self) -> mmap.mmap | bytes:
        if self._read is None and self._size:
            self._bytes.flush()
            self._read = mmap.mmap(self._bytes.fileno(), self._size, access=mmap.ACCESS_READ)
        return self._read if self._read is not None else b""
