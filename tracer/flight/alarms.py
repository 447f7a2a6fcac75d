# SPDX-License-Identifier: Apache-2.0
"""Alarms of triggers: a condition that begins to hold for a vCPU or VM, reported once until it ends."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Rows = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Alarm:
    """What a trigger found: `severity` compares alarms of one trigger, `text` is for the dump's metadata."""

    trigger: str
    text: str
    severity: float


class Detector(Protocol):
    """Watches all rows, in order of time, for the condition of one trigger."""

    def see(self, rows: Rows) -> list[Alarm]:
        """Take rows; return the alarms that begin with them."""

    def now(self, at: int) -> list[Alarm]:
        """Return the alarms that begin by `at` (boot ns), before which no more rows will come."""


class Ongoing:
    """The keys (vCPUs, VMs or threads) for which a condition holds at the moment."""

    def __init__(self) -> None:
        self._so: set[Hashable] = set()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._so

    def begins(self, key: Hashable, so: bool) -> bool:
        """Set whether the condition holds for a key; return whether it does now and did not before."""
        new = so and key not in self._so
        (self._so.add if so else self._so.discard)(key)
        return new

    def forget(self, keys: set[Any]) -> None:
        self._so -= keys
