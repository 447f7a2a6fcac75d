# SPDX-License-Identifier: Apache-2.0
"""How many dumps a trigger may make, so that a host in trouble is not buried under recordings of it.

Each trigger has its own quota, by the hour and by the day; requests by hand have another, which no trigger uses up. The
first dump of a day and the worst one are kept: when the day's quota is used up, a worse event still makes a dump, for
which the mildest of the others is deleted. Requests that are refused are counted, and the next dump says how many.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_HOUR: Final = 3600.0
_DAY: Final = 24 * _HOUR


@dataclass(frozen=True)
class Quota:
    """How many dumps one trigger may make in an hour and in a day."""

    hour: int
    day: int


AUTOMATIC: Final = Quota(hour=3, day=8)
MANUAL: Final = Quota(hour=30, day=200)


@dataclass
class Made:
    """A dump that was made: when (seconds of the clock that the caller uses), and how bad its event was."""

    at: float
    severity: float
    path: Path | None = None  # None until it is a file
    first: bool = False
    failed: bool = False  # no file will be made of it, and it does not count


@dataclass
class Refused:
    """Events of a trigger that made no dump since its last one: how many, and the worst."""

    count: int = 0
    worst: float = 0.0

    def document(self) -> dict[str, float]:
        return {"count": self.count, "worst": self.worst}


@dataclass
class Account:
    """What one trigger has used of its quota."""

    quota: Quota
    made: list[Made] = field(default_factory=list)
    refused: Refused = field(default_factory=Refused)

    def ask(self, now: float, severity: float) -> tuple[Made | None, Made | None]:
        """Return (the dump that may be made now, or None; an earlier dump that is to be deleted for it, or None)."""
        self.made = [each for each in self.made if now - each.at < _DAY and not each.failed]
        hour = sum(now - each.at < _HOUR for each in self.made)
        instead = None
        if len(self.made) >= self.quota.day:
            worst = max(each.severity for each in self.made)
            others = [each for each in self.made if not each.first and each.path is not None]
            instead = min(others, key=lambda each: each.severity, default=None)
            if severity <= worst or instead is None:
                self._refuse(severity)
                return None, None
        if hour >= self.quota.hour * (1 if instead is None else 2):
            self._refuse(severity)
            return None, None
        if instead is not None:
            self.made.remove(instead)
        granted = Made(now, severity, first=not self.made)
        self.made.append(granted)
        return granted, instead

    def _refuse(self, severity: float) -> None:
        self.refused.count += 1
        self.refused.worst = max(self.refused.worst, severity)

    def told(self) -> Refused:
        """Return what was refused since the last call."""
        refused, self.refused = self.refused, Refused()
        return refused

    def keeps(self) -> set[Path]:
        """Return the dumps that are kept although the disk's bound is exceeded: the first of the day and the worst."""
        worst = max(self.made, key=lambda each: each.severity, default=None)
        return {each.path for each in self.made if each.path and (each.first or each is worst)}
