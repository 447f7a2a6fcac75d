# SPDX-License-Identifier: Apache-2.0
"""The disk side of a recording: a thread that orders batches and writes segments, so that the drain never waits.

Between drain and disk is a queue bounded in bytes. While the disk keeps up it is empty; when it does not, the queue
fills, the rings fill behind it, and what they then refuse is counted by the probes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tracer.order import Order
from tracer.ring import Records
from traces.recording.record_buffer import BATCH_ROWS
from traces.recording.segment_writer import SegmentWriter
from traces.schema import BY_NAME

QUEUE_BYTES = 1 << 30
QUEUE_SHARE = 4  # never more than this part of the memory that is free as the recording begins
WAIT_SECONDS = 0.01
NICE = -15
_GAP = BY_NAME["gap"].code


def prefer_this_thread() -> None:
    """Raise this thread's priority: a ring that is not emptied in time loses events.

    Drain and writer both need it. They share the interpreter's lock, and a writer that loses its CPU while it holds the
    lock would stop the drain as well.
    """
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Sink(Protocol):
    """Takes a recorder's records, round by round; `error` is what it failed with."""

    error: Exception | None

    def write(self, batches: Sequence[Records], complete_at: int) -> None:
        """Take one round of the rings, after which no record from before `complete_at` (boot ns) is missing."""


@dataclass(frozen=True)
class _Round:
    batches: Sequence[Records]
    complete_at: int


class OrderedThread:
    """Takes rounds of the rings and gives their records out in the order of time, on a thread of its own.

    If the thread fails, `error` has the exception from then on, and nothing more is taken.
    """

    def __init__(self, name: str, limit: int = QUEUE_BYTES) -> None:
        """`limit` is how many bytes may wait for the thread; a caller that brings more has to wait."""
        self._order = Order()
        self._queue: queue.SimpleQueue[_Round | Callable[[], None] | None] = queue.SimpleQueue()
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._limit = min(limit, free // QUEUE_SHARE)
        self._queued = self._taken = 0  # bytes; each written by one thread only
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def write(self, batches: Sequence[Records], complete_at: int) -> None:
        """Queue one round of the rings; waits where the queue is full."""
        while self._queued - self._taken > self._limit and self.error is None:
            time.sleep(WAIT_SECONDS)
        self._queued += sum(batch.nbytes for batch in batches)
        self._queue.put(_Round(batches, complete_at))

    def _then(self, work: Callable[[], None]) -> None:
        """Queue work for the thread, which first gives out all earlier records that can be given out."""
        self._queue.put(work)

    def _end(self) -> None:
        """Give out everything and end the thread. Raises what it failed with."""
        self._queue.put(None)
        self._thread.join()
        if self.error:
            raise self.error

    def _run(self) -> None:
        prefer_this_thread()
        try:
            while (work := self._queue.get()) is not None:
                if isinstance(work, _Round):
                    self._order.push(work.batches, work.complete_at)
                    if self._order.worthwhile:
                        self._give()
                    self._taken += sum(batch.nbytes for batch in work.batches)
                else:
                    self._give()
                    work()
            self._give(everything=True)
        except Exception as error:  # the recorder's loop sees it and ends the recording
            self.error = error

    def _give(self, everything: bool = False) -> None:
        if parts := self._order.release(everything):
            self._store(parts)

    def _store(self, parts: Sequence[Records]) -> None:
        """Take records, in order of time; no part is empty."""
        raise NotImplementedError


class SegmentThread(OrderedThread):
    """Stores records and manifest changes in the recording's directory; `error` is what the disk refused.

    With `max_events` it stores that many, the first in order of time; with `max_bytes` it stops after the batch
    (BATCH_ROWS events) with which its directory has reached that size. `full` then says so. What came later is not part
    of the recording: `turned_away` counts it by kind code and CPU. Gaps are always stored.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Mapping[str, Any],
        max_events: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self._segments = SegmentWriter(directory, manifest)
        self.full = ""
        self.turned_away: Counter[tuple[int, int]] = Counter()
        self._max_events, self._max_bytes, self._events = max_events, max_bytes, 0
        super().__init__("segments")

    @property
    def bytes_written(self) -> int:
        return self._segments.bytes_written

    def flush(self, manifest: Callable[[], Mapping[str, Any]]) -> None:
        """Queue a flush of all earlier records; the writer's thread then calls `manifest` for the changes."""

        def work() -> None:
            self._segments.flush()
            self._segments.update_manifest(manifest())

        self._then(work)

    def close(self, manifest: Callable[[], Mapping[str, Any]]) -> None:
        """Write out the queue and end the recording, with last changes. Raises what the disk refused."""
        self._end()
        self._segments.close(manifest())

    def _store(self, parts: Sequence[Records]) -> None:
        for records in parts:
            if self._max_events is None and self._max_bytes is None:
                self._segments.write(records)
                continue
            for first in range(0, len(records), BATCH_ROWS):
                self._store_within_limits(records[first : first + BATCH_ROWS])

    def _store_within_limits(self, records: Records) -> None:
        events = records["kind"] != _GAP
        taken = ~events if self.full else np.ones(len(records), np.bool_)
        if not self.full and self._max_events is not None:
            taken = ~events | (self._events + np.cumsum(events) <= self._max_events)
        self._events += int(np.count_nonzero(taken & events))
        late = records[~taken]
        self.turned_away.update(zip(late["kind"].tolist(), late["cpu"].tolist(), strict=True))
        self._segments.write(records[taken])
        if self._max_events is not None and self._events >= self._max_events:
            self.full = self.full or f"{self._max_events:,} events reached"
        if self._max_bytes is not None and self._segments.bytes_written >= self._max_bytes:
            self.full = self.full or f"{self._max_bytes:,} bytes reached"
