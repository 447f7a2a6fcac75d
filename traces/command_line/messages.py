# SPDX-License-Identifier: Apache-2.0
"""Lines on standard error for those who run a command, or read its journal."""

from __future__ import annotations

import contextlib
import sys


def tell(line: str) -> None:
    """Print a line, unless the terminal is gone: its SIGHUP ends a recording like any other signal."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def say(line: str) -> None:
    """Print a line that begins with the program's name."""
    tell(f"kvmtrace: {line}")
