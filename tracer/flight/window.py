# SPDX-License-Identifier: Apache-2.0
"""The recording's last seconds, in memory: pieces of compressed rows, grouped by the state that they begin from.

The bound in bytes takes precedence over the one in time. What a dump has still to write stays in memory, and counts.
Pieces are messages of the segments' own format, so that writing a dump is copying.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from tracer.flight.state import Checkpoint
from tracer.probing.program import KIND_SLOTS
from traces.record import Columns, columns_of
from traces.recording.record_buffer import RecordBuffer
from traces.recording.sealed_stream import BatchEncoder
from traces.schema import BY_NAME, OWN_KINDS

Rows = np.ndarray[Any, Any]
_OWN = [BY_NAME[name].code for name in OWN_KINDS]


class Counts(NamedTuple):
    """The number of rows by kind and CPU: `cells` are kind * cpus + cpu, in ascending order."""

    cells: Rows
    counts: Rows


@dataclass(eq=False)
class Piece:
    """Some rows in order of time, compressed; `first` and `last` are the times (boot ns) of the first and last row."""

    message: bytes
    rows: int
    first: int
    last: int
    counts: Counts
    wanted: int = 0  # the number of dumps that still have to write it
    dropped: bool = False  # whether the window has dropped it


@dataclass(eq=False)
class Epoch:
    """The rows from one known state of the host, at `began` (boot ns), to the next."""

    began: int
    vms: list[dict[str, Any]]
    checkpoint: Checkpoint
    lost: Rows  # events lost until then, by CPU and kind, as far as rows have reported
    missing: Rows  # missing events until then, also by CPU and kind
    unsettled: bool = False  # the host's VMs came and went while their state was looked at
    pieces: list[Piece] = field(default_factory=list)
    dropped_until: int = 0  # its rows up to here (boot ns) were dropped: alone they exceeded the memory

    @property
    def size(self) -> int:
        return sum(len(piece.message) for piece in self.pieces)


class FlightWindow:
    """The epochs that are kept: one thread pushes rows at the end, and drops them from the beginning."""

    def __init__(self, first: Epoch, cpus: int, nanoseconds: int, memory: int) -> None:
        """`memory` (bytes) bounds all that is held here; within it the rows of the last `nanoseconds` are kept."""
        self._cpus, self._nanoseconds, self._memory = cpus, nanoseconds, memory
        self._epochs = deque([first])
        self._encoder = BatchEncoder()
        self._buffer = RecordBuffer()
        self._held = self._buffer.nbytes
        self._lock = threading.Lock()
        cells = KIND_SLOTS * cpus
        self._counted = Counts(np.arange(cells), np.zeros(cells, np.int64))

    @property
    def held(self) -> int:
        """Bytes in memory, those that dumps have still to write included."""
        return self._held

    @property
    def begins(self) -> int:
        """The boot ns from which on rows are held."""
        return max(self._epochs[0].began, self._epochs[0].dropped_until)

    @property
    def last(self) -> Epoch:
        """The epoch to which rows are added now."""
        return self._epochs[-1]

    def push(self, records: Rows) -> None:
        """Take rows, in order of time and none older than those pushed before."""
        for columns in self._buffer.add(records):
            self._keep(columns)

    def begin(self, epoch: Epoch) -> None:
        """Begin an epoch: rows pushed from now on belong to it."""
        self._seal()
        self._epochs.append(epoch)

    def trim(self, now: int) -> None:
        """Drop what exceeds the memory, and what is too old at `now` (boot ns)."""
        epochs = self._epochs
        while len(epochs) > 1 and (epochs[1].began <= now - self._nanoseconds or self._held > self._memory):
            for piece in epochs.popleft().pieces:
                self._drop(piece)
        while self._held > self._memory and epochs[0].pieces:
            piece = epochs[0].pieces.pop(0)
            epochs[0].dropped_until = piece.last
            self._drop(piece)

    def cut(self, before: Rows, after: Rows) -> list[Epoch]:
        """Return all that is held, for a dump, with rows before and after it; each piece must be given back."""
        self._seal()
        epochs = [replace(each, pieces=list(each.pieces)) for each in self._epochs]
        epochs[0].pieces[:0] = self._extra(before)
        epochs[-1].pieces += self._extra(after)
        with self._lock:
            for epoch in epochs:
                for piece in epoch.pieces:
                    piece.wanted += 1
        return epochs

    def _extra(self, records: Rows) -> list[Piece]:
        """Return rows as a piece that the window does not keep; empty for no rows."""
        made = [self._encode(columns_of(records))] if len(records) else []
        for piece in made:
            piece.dropped = True
        return made

    def give_back(self, piece: Piece) -> None:
        """Note that a dump has written this piece."""
        with self._lock:
            piece.wanted -= 1
            if piece.dropped and not piece.wanted:
                self._held -= len(piece.message)

    def _drop(self, piece: Piece) -> None:
        with self._lock:
            piece.dropped = True
            if not piece.wanted:
                self._held -= len(piece.message)

    def pushed(self) -> Rows:
        """Return the number of rows pushed so far, by CPU and kind, without the recorder's own kinds."""
        self._seal()
        return stored([self._counted], self._cpus)

    def _seal(self) -> None:
        for columns in self._buffer.rest():
            self._keep(columns)

    def _keep(self, columns: Columns) -> None:
        piece = self._encode(columns)
        self.last.pieces.append(piece)
        self._counted.counts[piece.counts.cells] += piece.counts.counts

    def _encode(self, columns: Columns) -> Piece:
        message = self._encoder.batch(columns)
        with self._lock:
            self._held += len(message)
        times = columns["time"]
        return Piece(message, len(times), int(times[0]), int(times[-1]), count(columns, self._cpus))


def count(columns: Columns, cpus: int) -> Counts:
    """Return the number of rows by kind and CPU."""
    counts = np.bincount(columns["kind"].astype(np.int64) * cpus + columns["cpu"], minlength=KIND_SLOTS * cpus)
    cells = np.flatnonzero(counts)
    return Counts(cells, counts[cells])


def stored(counts: list[Counts], cpus: int) -> Rows:
    """Return the sum of such counts as a table by CPU and kind, without the recorder's own kinds."""
    table = np.zeros(KIND_SLOTS * cpus, np.int64)
    for each in counts:
        table[each.cells] += each.counts
    by_kind = table.reshape(KIND_SLOTS, cpus)
    by_kind[_OWN] = 0
    return by_kind.T
