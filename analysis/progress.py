"""One line on stderr of what goes on, where that is a terminal and it takes more than a second."""

from __future__ import annotations

import sys
import threading
from typing import Final

_FIRST: Final = 1.0  # s
_NEXT: Final = 0.2


class Progress:
    """Call it with what is being done from now on (empty: nothing to show); `close` takes the line away.

    A thread shows it, for most of what takes long is in a library's hands.
    """

    def __init__(self) -> None:
        self._what = self._shown = ""
        self._ended = threading.Event()
        self._lock = threading.Lock()
        if sys.stderr.isatty():
            threading.Thread(target=self._show, daemon=True).start()

    def __call__(self, what: str) -> None:
        with self._lock:
            self._what = what
            if not what:
                self._clear()

    def close(self) -> None:
        """Show nothing from now on."""
        with self._lock:
            self._ended.set()
            self._clear()

    def _show(self) -> None:
        wait = _FIRST
        while not self._ended.wait(wait):
            wait = _NEXT
            with self._lock:
                if self._what != self._shown and not self._ended.is_set():
                    self._shown = self._what
                    print(f"\r\x1b[K{self._what} ...", end="", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._shown:
            self._shown = ""
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
