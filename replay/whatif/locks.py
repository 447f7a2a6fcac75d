# SPDX-License-Identifier: Apache-2.0
"""mmu_lock and the spinlocks as queues: who asks first has it first, as in the kernel's queued locks.

The same rule as the virtual clock's (`timing.reference_clock`, `_wait` and `_take`). Requests are made in order of
their times, so that what is known of a lock is until when its holders have it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Lock:
    """Held for write by one, for read by many; a reader waits behind a writer that waits. Times are ns."""

    locked: int = 0  # until when the last writer has it
    shared: int = 0  # until when the last reader has

    def free(self, at: int, shares: bool) -> int:
        """When a reader (`shares`) or a writer that asks at `at` has it."""
        return max(at, self.locked) if shares else max(at, self.locked, self.shared)

    def take(self, at: int, ns: int, shares: bool) -> int:
        """The same; it is then held for `ns`."""
        start = self.free(at, shares)
        if shares:
            self.shared = max(self.shared, start + ns)
        else:
            self.locked = start + ns
        return start


def skipped(i: int, ended: int, until: int, period: float, ns: int) -> int:
    """Of calls that come each `period` and take `ns`, one at a time, how many after the `i`th, which ended at `ended`,
    are over before `until` with one more to come before: if nobody else wants the lock until then, none need be made.
    """
    if until <= ended:
        return 0
    if ns > period:  # back to back
        return max((until - ended) // ns - 2, 0)
    if (i + 1) * period < ended:  # the last one was late
        return 0
    return max(int(until / period) - 2 - i, 0)
