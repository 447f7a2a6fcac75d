# SPDX-License-Identifier: Apache-2.0
"""Lines on standard error for those who run a command, or read its journal."""

from __future__ import annotations

import contextlib
import sys


def tell(line: str) -> None:
    """A line as it is, unless the terminal is gone: its SIGHUP ends a recording like any other signal."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def say(line: str) -> None:
    """A line that says that it is ours."""
    tell(f"kvmtrace: {line}")
