"""mmu_lock and the spinlocks as queues: who asks first has it first, as in the kernel's queued locks.

The same rule as the virtual clock's (`virtual.clock`, `_wait` and `_take`). Requests are made in order of their times,
so that what is known of a lock is until when its holders have it.
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
