# SPDX-License-Identifier: Apache-2.0
"""The one error type that reaches the user: a line to print and the exit code to leave with."""

from __future__ import annotations

VERDICT_FAILED = 1
BAD_INPUT = 2
ENVIRONMENT = 3


class Problem(Exception):
    """Something the user must know: one line that says what, where, and what to do.

    `code` is the process exit code: 1 a verdict or gate failed, 2 bad input or usage, 3 something is missing from
    the environment (then the line ends with the command that fixes it).
    """

    def __init__(self, message: str, code: int = BAD_INPUT) -> None:
        super().__init__(message)
        self.code = code
