"""One stream in the order of time out of rings that are each in order, and how far nothing is missing in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tracer.ring import Records

# A probe takes its time stamp before its place in the ring. Nothing can come between but an interrupt or, where the
# host is itself a guest, the hypervisor: records younger than this are held back so that a late one is still sorted in.
HOLD_NANOSECONDS = 50_000_000
ENOUGH = 1 << 17  # records worth a merge; fewer wait for the next flush, so that each is copied about once


class Order:
    """Holds records back until no older one can come. Its numpy calls release the GIL: the drain goes on meanwhile."""

    def __init__(self) -> None:
        self._held: list[Records] = []
        self._rows = 0
        self._complete_at = 0

    def push(self, batches: Sequence[Records], complete_at: int) -> None:
        """Take one round of the rings; nothing from before `complete_at` (boot ns) is missing after it."""
        self._held += batches
        self._rows += sum(len(batch) for batch in batches)
        self._complete_at = complete_at

    @property
    def given_until(self) -> int:
        """The time (boot ns) up to which the next release gives out everything."""
        return max(self._complete_at - HOLD_NANOSECONDS, 0)

    @property
    def worthwhile(self) -> bool:
        return self._rows >= ENOUGH

    def release(self, everything: bool = False) -> Records | None:
        """The records that can be given out, by time; None where there are none."""
        if not self._held:
            return None
        records = self._held[0] if len(self._held) == 1 else np.concatenate(self._held)
        times = np.ascontiguousarray(records["time"])
        if np.any(times[1:] < times[:-1]):
            order = np.argsort(times, kind="stable")
            records, times = records.take(order), times.take(order)
        ready = len(records)
        if not everything:
            ready = int(np.searchsorted(times, np.uint64(self.given_until), side="right"))
        self._held = [records[ready:]] if ready < len(records) else []
        self._rows = len(records) - ready
        return records[:ready] if ready else None
