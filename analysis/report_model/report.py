# SPDX-License-Identifier: Apache-2.0
"""The report model: what every format renders, so that the same figures are in each."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from analysis.reading.result_source import Result
from analysis.reading.sources import Recording
from analysis.report_model.figures import Figures
from analysis.report_model.picture import Picture
from analysis.report_model.report_table import ReportTable

SCHEMA: Final = 1  # version of the JSON format


class Status(Enum):
    """The outcome of a check; undecided, where the trace does not determine it, counts as failed."""

    PASSED = "passed"
    FAILED = "failed"
    UNDECIDED = "undecided"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Check:
    """A gate (`--fail-on`) or an invariant. `name` is the condition or the invariant; `why` is one line."""

    kind: str  # gate, invariant
    name: str
    status: Status
    why: str

    @property
    def fails(self) -> bool:
        return self.status in (Status.FAILED, Status.UNDECIDED)


@dataclass(frozen=True)
class Report:
    """All that is reported of one trace or result.

    `verdict`: sentences, the most important first. `trust`: name and text of what the figures rest on. `figures`: the
    exact figures that gates can be on. `loss`: which events are missing, if any. `drawn`: pictures that were already
    made. `listed`: a table of thousands of rows, which a page has a search for. `recording` and `result` are the
    sources, for formats that draw; either may be None.
    """

    title: str
    verdict: tuple[str, ...]
    trust: tuple[tuple[str, str], ...]
    tables: tuple[ReportTable, ...]
    checks: tuple[Check, ...] = ()
    figures: Figures | None = None
    loss: str = ""
    drawn: tuple[Picture, ...] = field(default=(), compare=False)
    listed: ReportTable | None = field(default=None, compare=False)
    recording: Recording | None = field(default=None, compare=False)
    result: Result | None = field(default=None, compare=False)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.fails)

    @property
    def headline(self) -> str:
        """The first line of every format: why a check failed, if one did, else the verdict; and what was lost."""
        failed = self.failed
        if failed:
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            lost = f"; {self.loss}" if self.loss else ""
            return f"FAILED: {failed[0].name}: {failed[0].why}{more}{lost}"
        said = self.verdict[0] if self.verdict else "nothing to say"
        return f"{self.loss}: {said}" if self.loss else said

    @property
    def lines(self) -> tuple[str, ...]:
        """The headline and the rest of the verdict: the same in every format for people."""
        return (self.headline, *(self.verdict if self.failed else self.verdict[1:]))
