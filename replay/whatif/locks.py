# SPDX-License-Identifier: Apache-2.0
"""mmu_lock and spinlocks as queues: whoever asks first gets the lock first, as with the kernel's queued locks.

The rule is the same as in the virtual clock (`timing.reference_clock`, `_wait` and `_take`). Requests must be made in
order of their times, so that the state of a lock is only the times until which it is held.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Lock:
    """A lock held for write by one or for read by many; a reader queues behind a writer that waits. Times are in ns."""

    locked: int = 0  # until when the last writer holds it
    shared: int = 0  # until when the last reader holds it

    def free(self, at: int, shares: bool) -> int:
        """Return when a reader (`shares`) or a writer that asks at `at` gets the lock."""
        return max(at, self.locked) if shares else max(at, self.locked, self.shared)

    def take(self, at: int, ns: int, shares: bool) -> int:
        """Take the lock for `ns` on a request at `at`, and return when the hold begins."""
        start = self.free(at, shares)
        if shares:
            self.shared = max(self.shared, start + ns)
        else:
            self.locked = start + ns
        return start


def skipped(i: int, ended: int, until: int, period: float, ns: int) -> int:
    """Return how many calls after the `i`th, which ended at `ended`, need not be simulated.

    Calls come every `period` ns and take `ns`, one at a time. Those that are over before `until`, with one more to come
    before it, have no effect if nobody else wants the lock until then.
    """
    if until <= ended:
        return 0
    if ns > period:  # a call takes longer than the period: calls follow each other without a pause
        return max((until - ended) // ns - 2, 0)
    if (i + 1) * period < ended:  # the last call ended after the next one was due
        return 0
    return max(int(until / period) - 2 - i, 0)
