# SPDX-License-Identifier: Apache-2.0
"""Keep a VM's inputs until its costs are known, in memory up to a limit and beyond it in a temporary file.

Each column is kept in as few bytes as its values need: about 30 bytes an input, instead of 90.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.inputs import EXIT_COLUMNS, Exits, Inputs
from replay.simulate.operations import Ranges
from traces.errors import Problem

IN_MEMORY: Final = 16 << 20  # bytes
_COLUMNS: Final = ("op", "gfn", "time", "exit")
_NARROW: Final = tuple((np.dtype(kind), int(np.iinfo(kind).max)) for kind in (np.uint8, np.uint16, np.uint32))


@dataclass(frozen=True)
class _Column:
    """`count` values of int64 minus `base`, stored as `dtype`; with `base` None they are stored unchanged.

    `data` is None if the values were written to the temporary file.
    """

    base: int | None
    dtype: np.dtype[Any]
    count: int
    data: NDArray[Any] | None

    @property
    def size(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class _Part:
    columns: tuple[_Column, ...]
    ranges: Ranges
    first_exit: int


class Spool:
    """Parts of a VM's inputs, in order. They are added by `append` and can be iterated over as often as needed."""

    def __init__(self, seq: bool = False) -> None:
        """Begin an empty spool. Without `seq` that column is not kept and reads as 0."""
        self._columns = (*_COLUMNS, "seq") if seq else _COLUMNS
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

    def append(self, part: Inputs) -> None:
        """Add a part. Raises Problem if the temporary directory has no room."""
        arrays = [getattr(part, name) for name in self._columns] + [getattr(part.exits, name) for name in EXIT_COLUMNS]
        columns = tuple(map(_narrowed, arrays))
        self._parts.append(_Part(columns, part.ranges, part.exits.first))
        self._held += sum(column.size for column in columns)
        if self._held > IN_MEMORY:
            self._spill()

    def __iter__(self) -> Iterator[Inputs]:
        if self._file is not None:
            self._file.seek(0)
        for part in (*self._spilled, *self._parts):
            arrays: list[Any] = [self._read(column) for column in part.columns]
            exits = Exits(**dict(zip(EXIT_COLUMNS, arrays[len(self._columns) :], strict=True)), first=part.first_exit)
            columns = dict(zip(self._columns, arrays, strict=False))
            columns.setdefault("seq", np.zeros(len(columns["op"]), np.int64))
            yield Inputs(**columns, ranges=part.ranges, exits=exits)

    def _spill(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="kvmtrace-")  # noqa: SIM115 (closed by __exit__)
            for part in self._parts:
                for column in part.columns:
                    self._file.write(b"" if column.data is None else column.data.data)
                written = tuple(_Column(each.base, each.dtype, each.count, None) for each in part.columns)
                self._spilled.append(replace(part, columns=written))
        except OSError as error:
            why = error.strerror or error
            raise Problem(
                f"{tempfile.gettempdir()}: no room for what a long recording needs meanwhile ({why}): "
                "free some, or set TMPDIR to a directory that has it"
            ) from None
        self._parts, self._held = [], 0

    def _read(self, column: _Column) -> NDArray[Any]:
        data = column.data
        if data is None:
            assert self._file is not None
            data = np.frombuffer(self._file.read(column.size), column.dtype)
        if column.base is None:
            return data
        wide = data.astype(np.int64)
        return wide + column.base if column.base else wide


def _narrowed(values: NDArray[Any]) -> _Column:
    """Return a column in as few bytes as its values need.

    One with negative values is kept unchanged unless its span is small.
    """
    if values.dtype == np.int64 and len(values):
        most = int(values.view(np.uint64).max())
        for dtype, limit in _NARROW:
            if most <= limit:
                return _Column(0, dtype, len(values), values.astype(dtype))
        since = values - values[0]
        if int(since.view(np.uint64).max()) <= _NARROW[-1][1]:
            return _Column(int(values[0]), _NARROW[-1][0], len(values), since.astype(_NARROW[-1][0]))
    return _Column(None, values.dtype, len(values), values)
