# SPDX-License-Identifier: Apache-2.0
"""Keep a VM's operations until its costs are known, in memory up to a limit and beyond it in a temporary file.

Each column is kept in as few bytes as its values need: about 20 bytes an operation, instead of 80.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.simulate.operations import Block, Ranges
from replay.simulate.timed_operations import TIMED_COLUMNS, Timed
from traces.errors import Problem

IN_MEMORY: Final = 16 << 20  # bytes
_OF_BLOCK: Final = tuple(each.name for each in fields(Block))
_NARROW: Final = tuple((np.dtype(kind), int(np.iinfo(kind).max)) for kind in (np.uint8, np.uint16, np.uint32))


@dataclass(frozen=True)
class _Column:
    """`count` values of type `dtype`: `base`, to which those in `data` (of type `stored`) are added.

    `stored` is None where all values are `base`; `data` is None there, and where it was written to the temporary file.
    """

    base: int
    dtype: np.dtype[Any]
    stored: np.dtype[Any] | None
    count: int
    data: NDArray[Any] | None

    @property
    def size(self) -> int:
        return self.count * self.stored.itemsize if self.stored is not None else 0


@dataclass(frozen=True)
class _Part:
    columns: tuple[_Column, ...]
    ranges: Ranges


class Spool:
    """Parts of a VM's operations, in order. They are added by `append` and can be iterated over as often as needed."""

    def __init__(self, seq: bool = False) -> None:
        """Begin an empty spool. Without `seq` that column is not kept and reads as 0."""
        self._seq = seq
        self._spilled: list[_Part] = []
        self._parts: list[_Part] = []
        self._held = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, timed: Timed, ranges: Ranges) -> None:
        """Add a part. Raises Problem if the temporary directory has no room."""
        arrays = {name: getattr(timed.block, name) for name in _OF_BLOCK}
        arrays |= {name: getattr(timed, name) for name in TIMED_COLUMNS}
        if not self._seq:
            arrays["seq"] = np.broadcast_to(np.int64(0), len(timed))
        columns = tuple(map(_narrowed, arrays.values()))
        self._parts.append(_Part(columns, ranges))
        self._held += sum(column.size for column in columns)
        if self._held > IN_MEMORY:
            self._spill()

    def __iter__(self) -> Iterator[tuple[Timed, Ranges]]:
        """Yield each part with its ranges, in arrays of its own."""
        if self._file is not None:
            self._file.seek(0)
        for part in (*self._spilled, *self._parts):
            columns: list[Any] = [self._read(column) for column in part.columns]
            times = dict(zip(TIMED_COLUMNS, columns[len(_OF_BLOCK) :], strict=True))
            yield Timed(Block(*columns[: len(_OF_BLOCK)]), **times), part.ranges

    def _spill(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="kvmtrace-")  # noqa: SIM115 (closed by __exit__)
            for part in self._parts:
                for column in part.columns:
                    self._file.write(b"" if column.data is None else column.data.data)
                written = tuple(replace(each, data=None) for each in part.columns)
                self._spilled.append(replace(part, columns=written))
        except OSError as error:
            why = error.strerror or error
            raise Problem(
                f"{tempfile.gettempdir()}: no room for what a long recording needs meanwhile ({why}): "
                "free some, or set TMPDIR to a directory that has it"
            ) from None
        self._parts, self._held = [], 0

    def _read(self, column: _Column) -> NDArray[Any]:
        if column.stored is None:
            return np.full(column.count, column.base, column.dtype)
        data = column.data
        if data is None:
            assert self._file is not None
            data = np.frombuffer(self._file.read(column.size), column.stored)
        values: NDArray[Any] = data.astype(column.dtype)
        if column.base:
            values += column.base
        return values


def _narrowed(values: NDArray[Any]) -> _Column:
    """Return a column in as few bytes as its values need; the array is not held."""
    dtype, count = values.dtype, len(values)
    least, most = (int(values.min()), int(values.max())) if count else (0, 0)
    if least == most:
        return _Column(least, dtype, None, count, None)
    for stored, limit in _NARROW:
        if least >= 0 and most <= limit:
            return _Column(0, dtype, stored, count, values.astype(stored))
        if most - least <= limit:
            return _Column(least, dtype, stored, count, (values - least).astype(stored))
    return _Column(0, dtype, dtype, count, values.copy())
