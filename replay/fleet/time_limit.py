# SPDX-License-Identifier: Apache-2.0
"""Limit the time of a task: when it is up, the kernel ends the task's process, whatever it is doing.

A replay that never ends may be in compiled code, where neither a Python signal handler nor another thread gets to run.
The default action of SIGALRM needs neither. The engine sees it like any other death of a worker process.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_ends: dict[object, float] = {}  # when the time of each running `with` is up; at most one for each thread
_lock = threading.Lock()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End this process by SIGALRM if the `with` takes longer than `seconds`; 0 means no limit."""
    if not seconds:
        yield
        return
    mine = object()
    try:
        with _lock:
            _ends[mine] = time.monotonic() + seconds
            _set()
        yield
    finally:
        with _lock:
            del _ends[mine]
            _set()


def _set() -> None:
    """Set the process's one interval timer for the task whose time is up first."""
    left = max(min(_ends.values()) - time.monotonic(), 1e-6) if _ends else 0.0
    signal.setitimer(signal.ITIMER_REAL, left)
