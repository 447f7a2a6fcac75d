# SPDX-License-Identifier: Apache-2.0
"""The recording's last seconds, in memory: pieces of compressed rows, grouped by the state that they begin from.

The bound in bytes comes first, the time second. What a dump has still to write stays in memory as well, and counts.
Pieces are messages of the segments' own format: writing a dump is copying.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from tracer.flight.state import Checkpoint
from tracer.program import KIND_SLOTS
from traces.record import Columns, columns_of
from traces.record_buffer import RecordBuffer
from traces.schema import BY_NAME, OWN_KINDS
from traces.sealed_stream import BatchEncoder

Rows = np.ndarray[Any, Any]
_OWN = [BY_NAME[name].code for name in OWN_KINDS]


class Counts(NamedTuple):
    """How many rows of each kind and CPU: `cells` are kind * cpus + cpu, in rising order."""

    cells: Rows
    counts: Rows


@dataclass(eq=False)
class Piece:
    """Some rows in the order of time, compressed; `first` and `last` are their times (boot ns)."""

    message: bytes
    rows: int
    first: int
    last: int
    counts: Counts
    wanted: int = 0  # dumps that have still to write it
    dropped: bool = False  # from the window


@dataclass(eq=False)
class Epoch:
    """The rows from one known state to the next, which began at `began` (boot ns)."""

    began: int
    vms: list[dict[str, Any]]
    checkpoint: Checkpoint
    lost: Rows  # events lost until then, by CPU and kind, as far as rows have reported
    missing: Rows  # the same of missing events
    unsettled: bool = False  # the host's VMs came and went while their state was looked at
    pieces: list[Piece] = field(default_factory=list)
    dropped_until: int = 0  # its first rows are gone up to here (boot ns): they alone were more than the memory

    @property
    def size(self) -> int:
        return sum(len(piece.message) for piece in self.pieces)


class FlightWindow:
    """The epochs kept; rows are pushed at the end and dropped from the beginning. One thread pushes."""

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
        """Bytes in memory, what dumps have still to write included."""
        return self._held

    @property
    def begins(self) -> int:
        """Boot ns from which on rows are held."""
        return max(self._epochs[0].began, self._epochs[0].dropped_until)

    @property
    def last(self) -> Epoch:
        """The epoch that rows are pushed to."""
        return self._epochs[-1]

    def push(self, records: Rows) -> None:
        """Take rows, in the order of time and not before any that were pushed."""
        for columns in self._buffer.add(records):
            self._keep(columns)

    def begin(self, epoch: Epoch) -> None:
        """Rows pushed from now on begin from another state."""
        self._seal()
        self._epochs.append(epoch)

    def trim(self, now: int) -> None:
        """Drop what is too much, and what is too old at `now` (boot ns)."""
        epochs = self._epochs
        while len(epochs) > 1 and (epochs[1].began <= now - self._nanoseconds or self._held > self._memory):
            for piece in epochs.popleft().pieces:
                self._drop(piece)
        while self._held > self._memory and epochs[0].pieces:
            piece = epochs[0].pieces.pop(0)
            epochs[0].dropped_until = piece.last
            self._drop(piece)

    def cut(self, before: Rows, after: Rows) -> list[Epoch]:
        """Everything held, for a dump, with rows before and after it: who takes it gives back every piece."""
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
        """A piece of rows that the window does not keep."""
        made = [self._encode(columns_of(records))] if len(records) else []
        for piece in made:
            piece.dropped = True
        return made

    def give_back(self, piece: Piece) -> None:
        """A dump has written this piece."""
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
        """All rows until now, by CPU and kind; without the recorder's own."""
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
    """How many of each kind and CPU."""
    counts = np.bincount(columns["kind"].astype(np.int64) * cpus + columns["cpu"], minlength=KIND_SLOTS * cpus)
    cells = np.flatnonzero(counts)
    return Counts(cells, counts[cells])


def stored(counts: list[Counts], cpus: int) -> Rows:
    """The sum of such counts as a table by CPU and kind, like the probes' counters; without the recorder's own."""
    table = np.zeros(KIND_SLOTS * cpus, np.int64)
    for each in counts:
        table[each.cells] += each.counts
    by_kind = table.reshape(KIND_SLOTS, cpus)
    by_kind[_OWN] = 0
    return by_kind.T
