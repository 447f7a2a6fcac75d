# SPDX-License-Identifier: Apache-2.0
"""What a trigger finds: a condition that begins to hold for a vCPU or VM. It is reported once, until it ends."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Rows = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Alarm:
    """`severity` compares alarms of one trigger; `text` is what the dump's metadata says."""

    trigger: str
    text: str
    severity: float


class Detector(Protocol):
    """Looks at all rows, in the order of time."""

    def see(self, rows: Rows) -> list[Alarm]:
        """Take rows; what began by them."""

    def now(self, at: int) -> list[Alarm]:
        """Nothing more comes from before `at` (boot ns); what began by that."""


class Ongoing:
    """What is so at the moment, by what it is of."""

    def __init__(self) -> None:
        self._so: set[Hashable] = set()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._so

    def begins(self, key: Hashable, so: bool) -> bool:
        """Whether it is so now and was not before."""
        new = so and key not in self._so
        (self._so.add if so else self._so.discard)(key)
        return new

    def forget(self, keys: set[Any]) -> None:
        self._so -= keys
