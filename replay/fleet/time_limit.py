# SPDX-License-Identifier: Apache-2.0
"""How long a task may take: the kernel ends its process after that, whatever it is at work on.

A replay that never ends may be in compiled code, where neither a handler of Python's nor another thread gets its turn.
What SIGALRM does by default needs neither. Whoever has the process learns of it as of any other death.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_ends: dict[object, float] = {}  # of what is under way in this process, one for each thread at most
_lock = threading.Lock()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """This process ends by SIGALRM when the `with` takes longer; 0: it may take as long as it wants."""
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
    """There is one such timer in a process: it is that of the task whose time is up first."""
    left = max(min(_ends.values()) - time.monotonic(), 1e-6) if _ends else 0.0
    signal.setitimer(signal.ITIMER_REAL, left)
