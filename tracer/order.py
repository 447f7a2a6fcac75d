# SPDX-License-Identifier: Apache-2.0
"""Merges rings, each of which is in order, into one stream in order of time, and tells how far it is complete."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tracer.ring import Records

# A probe takes its time stamp before its place in the ring. Nothing can come between but an interrupt or, where the
# host is itself a guest, the hypervisor: records younger than this are held back so that a late one is still sorted in.
HOLD_NANOSECONDS = 50_000_000
ENOUGH = 1 << 17  # records worth a merge; fewer wait for the next flush, so that each is copied about once


class Order:
    """Holds records back until no older one can come. Its numpy calls release the GIL, so that draining goes on."""

    def __init__(self) -> None:
        self._held: list[Records] = []
        self._rows = 0
        self._complete_at = 0

    def push(self, batches: Sequence[Records], complete_at: int) -> None:
        """Take one round of the rings, after which no record from before `complete_at` (boot ns) is missing."""
        self._held += batches
        self._rows += sum(len(batch) for batch in batches)
        self._complete_at = complete_at

    @property
    def given_until(self) -> int:
        """The time (boot ns) up to which the next `release` gives out all records."""
        return max(self._complete_at - HOLD_NANOSECONDS, 0)

    @property
    def worthwhile(self) -> bool:
        return self._rows >= ENOUGH

    def release(self, everything: bool = False) -> list[Records]:
        """Return the records that can be given out, in order of time, as a list of parts that are not empty.

        Parts are merged only where they overlap, because copying is most of what ordering costs.
        """
        parts, times = self._held, [np.ascontiguousarray(part["time"]) for part in self._held]
        joined = np.concatenate(times) if times else np.empty(0, np.uint64)
        if np.any(joined[1:] < joined[:-1]):
            order = np.argsort(joined, kind="stable")
            parts, times = [np.concatenate(parts).take(order)], [joined.take(order)]
        self._held, given = [], []
        for part, stamps in zip(parts, times, strict=True):
            ready = len(part)
            if not everything:
                ready = int(np.searchsorted(stamps, np.uint64(self.given_until), side="right"))
            given += [part[:ready]] if ready else []
            self._held += [part[ready:]] if ready < len(part) else []
        self._rows = sum(len(part) for part in self._held)
        return given
