"""The disk side of a recording: a thread that writes batches to segments, so that a slow disk cannot stop the drain.

Between drain and disk stands a bounded queue. While the disk keeps up it is empty; when it does not, the queue fills,
the ring fills behind it, and what the ring then refuses is counted by the probes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from traces.segments import SegmentWriter

QUEUE_BATCHES = 64  # of at most ring.BATCH records: 640 MiB at the very worst

_Work = np.ndarray[Any, Any] | Mapping[str, Any] | None


class Writer:
    """Owns the recording's directory; takes records and manifest changes, keeps what the disk refused in `error`."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self._segments = SegmentWriter(directory, manifest)
        self._queue: queue.Queue[_Work] = queue.Queue(QUEUE_BATCHES)
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="segments", daemon=True)
        self._thread.start()

    @property
    def bytes_written(self) -> int:
        return self._segments.bytes_written

    def write(self, records: np.ndarray[Any, Any]) -> None:
        """Queue records; waits where the queue is full."""
        self._put(records)

    def flush(self, manifest: Mapping[str, Any]) -> None:
        """Queue a flush of everything before it, with the manifest's changes."""
        self._put(manifest)

    def close(self, manifest: Mapping[str, Any]) -> None:
        """Write out the queue and end the recording. Raises what the disk refused."""
        self._put(None)
        self._thread.join()
        if self.error:
            raise self.error
        self._segments.close(manifest)

    def _put(self, work: _Work) -> None:
        while self.error is None:
            try:
                return self._queue.put(work, timeout=0.1)
            except queue.Full:
                continue
        return None

    def _run(self) -> None:
        try:
            while (work := self._queue.get()) is not None:
                if isinstance(work, np.ndarray):
                    self._segments.write(work)
                else:
                    self._segments.flush()
                    self._segments.update_manifest(work)
        except Exception as error:  # the recorder's loop sees it and ends the recording
            self.error = error
