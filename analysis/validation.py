# SPDX-License-Identifier: Apache-2.0
"""The validated share of a recording, as a report states it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from traces.reader import Trace


@dataclass(frozen=True)
class Validated:
    """How many of the recorded responses the model matched; `partial`: not every VM from its begin to its end.

    `stopped`: why those after some moment, which may be others, were not compared; empty where all were.
    """

    matched: int
    expected: int
    left: int
    partial: bool
    stopped: str = ""

    @property
    def share(self) -> float:
        return self.matched / self.expected

    @property
    def holds(self) -> bool:
        return self.matched == self.expected and not self.left

    @property
    def text(self) -> str:
        """Never rounded up to all of it."""
        share = "100 %" if self.matched == self.expected else f"{int(10_000 * self.share) / 100:.2f} %"
        left = f"; {self.left:,} tables and roots left at the end" if self.left else ""
        part = ", of what can be validated of it" if self.partial else ""
        return f"{share}: {self.matched:,} of {self.expected:,} responses matched{part}{left}"


def validated(trace: Trace, policy: str = "", since: int | None = None) -> Validated:
    """Runs `kvmtrace validate` on a trace, event by event (some 100,000 a second); Problem where it cannot be.

    `since`: boot ns from which on responses count."""
    from replay.validate.compare import validate

    report = validate(trace, policy, since=since)
    return Validated(report.matched, report.expected, report.left, not report.complete, report.stopped)
