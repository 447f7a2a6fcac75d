# SPDX-License-Identifier: Apache-2.0
"""The validated share of a recording, as a report states it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from traces.reader import Trace


@dataclass(frozen=True)
class Validated:
    """How many of the recorded responses the model matched.

    `partial`: not every VM was compared from its begin to its end. `stopped`: why responses after some moment, which
    may differ, were not compared; empty where all were. `left`: tables and roots that remained at a VM's end.
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
        """The share as text, never rounded up to 100 %."""
        share = "100 %" if self.matched == self.expected else f"{int(10_000 * self.share) / 100:.2f} %"
        left = f"; {self.left:,} tables and roots left at the end" if self.left else ""
        part = ", of what can be validated of it" if self.partial else ""
        return f"{share}: {self.matched:,} of {self.expected:,} responses matched{part}{left}"


def validated(trace: Trace, policy: str = "", since: int | None = None) -> Validated:
    """Run `kvmtrace validate` on a trace, some 100,000 events a second. Raises Problem where that is impossible.

    `since` is the boot ns from which on responses count.
    """
    from replay.validate.compare import validate

    report = validate(trace, policy, since=since)
    return Validated(report.matched, report.expected, report.left, not report.complete, report.stopped)
