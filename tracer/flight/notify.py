# SPDX-License-Identifier: Apache-2.0
"""Messages to systemd that the recorder is ready, and that it is alive; none where systemd did not ask for them.

The protocol is a datagram of text to a socket (sd_notify(3)): no library is needed for it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import Final

_BEATS: Final = 3  # heartbeats in the time after which systemd takes the recorder to hang


def notify(text: str) -> None:
    """Send a message to systemd if it gave us a socket; it is no error that nobody listens there."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        to.connect(f"\0{address[1:]}" if address[0] == "@" else address)
        to.sendall(text.encode())


class Watchdog:
    """Tells systemd that the recorder is alive, as often as systemd asked for."""

    def __init__(self) -> None:
        microseconds = os.environ.get("WATCHDOG_USEC", "")
        ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.seconds = int(microseconds) / 1e6 if ours and microseconds.isdigit() else 0.0
        self._next = 0.0

    def beat(self) -> None:
        """Tell systemd that the recorder is alive, if it is time to; call this often."""
        now = time.monotonic()
        if self.seconds and now >= self._next:
            self._next = now + self.seconds / _BEATS
            notify("WATCHDOG=1")
