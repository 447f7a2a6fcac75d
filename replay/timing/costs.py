# SPDX-License-Identifier: Apache-2.0
"""The costs of actions in ns, measured in the recording where it has enough samples, else taken from a dated table.

`Costs` is what the virtual clock computes with; `Samples` collect measured values; `fit` says where each cost is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from replay.simulate.timed_operations import NEVER

Ints = NDArray[np.int64]
_KEPT: Final = 1 << 14  # the most samples kept of each cost
_ENOUGH: Final = 3  # the fewest samples for which a cost counts as measured
_LEAST_KEPT: Final = 1 << 10  # how many of the shortest times are kept
_FLUKES: Final = 1_000  # one in this many times in the guest may be too short to be true
_BARE: Final = 2  # a switch takes at most this many times the shortest time in the guest
_PLAUSIBLE: Final = 4  # ... and at most as long as this many median faults (1.7 in the lab; largest on nested hosts)


@dataclass(frozen=True)
class Costs:
    """The costs of actions, in ns.

    `switch` is the exit and the entry themselves, which a recording shows as guest time.
    """

    switch: int = 1_000
    fault: int = 2_500  # handling of one fault that installs one leaf and no table
    table: int = 600  # each table that a fault builds
    found: int = 1_500  # a load that finds its root
    created: int = 4_000  # a load that builds its root
    unload: int = 1_000
    zap_leaf: int = 20  # each leaf removed with a table or root; absent entries cost nothing extra
    zap_table: int = 2_000  # each table removed, including the walk over its 512 entries
    job: int = 20_000  # from queueing a zap until the worker begins it
    hold: int = 600  # how long a fault, load or unload holds mmu_lock
    prefetch: int = 225  # each further entry that a fault of the shadow MMU fills
    chunk: int = 0  # the longest time for which a worker's zap does not yield mmu_lock; 0: the whole zap
    refill: int = 1_000  # how many pages a refill needs, per mille of the mapped ones
    cpus: int = 0  # how many CPUs vCPUs and the worker share; 0: enough for all


# Dated 2026-11, orders of magnitude. switch, fault: x86 hosts of 2018 to 2022 exit and enter in about 1 us and handle a
# 4 KiB fault in 2 to 4; zap_leaf: efd995dae5eb (900 s for 64 TB of 4 KiB SPTEs: 52 ns each, all included); created: the
# reporter's trace of April 2023 has 94 us from exit to entry in a nested host, 13 of them to the root's creation;
# hold: 0.23 of a fault in the lab's recordings of 6.1 (kvm_mmu_spte_requested to kvm_mmu_set_spte);
# prefetch: 0.09 of a fault, as in the corpus (6.1, 6.12, 7.x: 0.085 to 0.095).
DEFAULT: Final = Costs()
SOURCE: Final = "dated table of 2026-11"


@dataclass(frozen=True)
class LockCosts:
    """The costs, in ns, of what is done under the locks of `replay.whatif`.

    No recording shows them: they are estimates.

    Dated 2026-11, orders of magnitude. age_leaf, zap_spte: efd995dae5eb's 52 ns an SPTE, all included (900 s for 64 TB
    of 4 KiB SPTEs); call: an uncontended rwlock, the memslot's look-up and a walk of four levels; flush: an IPI to
    running CPUs and its answers, 1 to 4 us on x86 hosts of 2018 to 2022; line: a cache line from another core of the
    same socket, 50 to 100 ns there; link, atomic: list_add under a spinlock, an atomic increment, both with the line at
    hand.
    """

    call: int = 300  # an aging walk or a range zap, without its SPTEs
    age_leaf: int = 52  # each SPTE that an aging walk visits
    zap_spte: int = 52  # each SPTE that a range zap removes
    flush: int = 2_000  # a flush of remote TLBs
    line: int = 70  # fetching a cache line from another core
    link: int = 30  # adding a table to a list
    atomic: int = 10  # incrementing a counter atomically

    def times(self, factor: float) -> LockCosts:
        """Return the costs multiplied by `factor`; none is below 1 ns."""
        return LockCosts(**{each.name: max(round(getattr(self, each.name) * factor), 1) for each in fields(self)})


@dataclass
class Samples:
    """Up to _KEPT of the values seen, thinned evenly, together with the exact count and sum of all values."""

    values: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    count: int = 0
    total: int = 0
    _every: int = 1

    @classmethod
    def alike(cls, count: int, total: int) -> Samples:
        """Return samples of which only the sum is known: `count` (at least 1)
        values that each equal the mean, in whole ns.
        """
        mean = total // count
        return cls(np.array([mean], np.int64), count, count * mean)

    def add(self, new: Ints) -> None:
        """Add values."""
        if not len(new):
            return
        first = -self.count % self._every
        self.count += len(new)
        self.total += int(new.sum())
        self.values = np.concatenate([self.values, new[first :: self._every]])
        while len(self.values) > _KEPT:
            self.values = self.values[::2]
            self._every *= 2

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass
class Shortest:
    """The shortest of many times, in ns, and how many times were seen."""

    values: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    count: int = 0
    limit: int = NEVER  # times of this length and more are not among the shortest

    def add(self, count: int, short: Ints) -> None:
        """Add `count` times, of which `short` has those below the limit."""
        self.count += count
        if not len(short):
            return
        values = np.concatenate([self.values, short])
        self.values = np.partition(values, _LEAST_KEPT)[:_LEAST_KEPT] if len(values) > _LEAST_KEPT else values
        if len(self.values) == _LEAST_KEPT:
            self.limit = int(self.values.max())

    @property
    def ns(self) -> int:
        """The shortest time after one in _FLUKES was discarded as too short to be true; 0 if no time was seen."""
        if not self.count:
            return 0
        values = np.sort(self.values)
        return int(values[min(self.count // _FLUKES, len(values) - 1)])


@dataclass(frozen=True)
class Fitted:
    """The costs, the source of each ("measured" or the table), and the relative standard error of each measured cost.

    `open` is by how many ns the switch may be less than `costs` says.
    """

    costs: Costs
    source: Mapping[str, str]
    error: Mapping[str, float]
    open: int = 0


def fit(samples: Mapping[str, Samples], cpus: int, guest: Shortest | None = None) -> Fitted:
    """Fit the costs of a recording from its samples.

    A cost is the mean of its samples, since total times need sums that come out right, and the tail is part of a cost.
    Costs from the table are scaled by how much the recording's faults cost relative to the table's: a slow machine is
    slow at all of it. `cpus` is the number of CPUs that vCPUs and the worker share (0: enough); `guest` has the
    shortest times in the guest, which bound the switch.
    """
    faults = samples.get("fault", Samples())
    scale = faults.mean / DEFAULT.fault if faults.count >= _ENOUGH else 1.0
    table = f"{SOURCE}, times {scale:.2g}" if faults.count >= _ENOUGH else SOURCE
    switch = _switch(samples, guest or Shortest(), table, scale)
    found = {"switch": switch.ns}
    source = {"switch": switch.source}
    error = {} if switch.error is None else {"switch": switch.error}
    for name, default in vars(DEFAULT).items():
        seen = samples.get(name)
        if name in ("cpus", "refill", "switch"):
            continue
        if seen is None or seen.count < _ENOUGH:
            source[name] = table
            found[name] = round(default * scale)
            continue
        value = seen.mean
        found[name] = max(round(value), 0)
        source[name] = f"measured, {seen.count:,} times"
        error[name] = float(seen.values.std() / max(value, 1) / np.sqrt(seen.count))
    if "zap_table" in error:  # a measured zap of tables includes the leaves that they had
        found["zap_leaf"], source["zap_leaf"], error["zap_leaf"] = 0, "measured, within zap_table", error["zap_table"]
    if cpus:  # the worker runs at once on the CPU of the vCPU, which waits meanwhile
        found["job"] = found["hold"] = 0  # and vCPUs that take turns on a CPU do not contend for mmu_lock
        source["job"] = source["hold"] = "the lab's one CPU"
    # The first pass over a root zaps 1 GiB at a time and cannot yield within it (5.18 to 6.8: tdp_mmu_zap_root).
    found["chunk"] = 513 * found["zap_table"] + (1 << 18) * found["zap_leaf"]
    source["chunk"] = "a GiB's tables and leaves"
    return Fitted(replace(DEFAULT, **found, cpus=cpus), source, error, switch.open)


@dataclass(frozen=True)
class _Switch:
    ns: int
    source: str
    error: float | None = None
    open: int = 0


def _switch(samples: Mapping[str, Samples], guest: Shortest, table: str, scale: float) -> _Switch:
    """Estimate the switch to the guest and back, from the times in the guest between two faults at the same RIP.

    A guest may have worked for any time between the two. So samples longer than a limit are dropped: the limit follows
    from the shortest times in the guest, and from what is plausible on a machine with such faults. In `bare` samples no
    instruction was completed; in the others the guest may have worked. Without bare samples, the mean is therefore the
    most that the switch can be, and the table's value the least.
    """
    faults, seen, bare = (samples.get(name, Samples()) for name in ("fault", "switch", "bare"))
    usual = float(np.median(faults.values)) if faults.count >= _ENOUGH else 0.0
    most = min((limit for limit in (_BARE * guest.ns, _PLAUSIBLE * usual) if limit), default=float("inf"))
    shown = seen.values[seen.values <= most]
    times = seen.count * len(shown) // max(len(seen.values), 1)
    if len(shown) < _ENOUGH:  # fall back to other exits, which also give an upper limit only
        shown = guest.values[guest.values <= most]
        times = len(shown)
    if len(shown) < _ENOUGH:
        assumed = round(DEFAULT.switch * (usual / DEFAULT.fault if usual else scale))
        return _Switch(min(assumed, guest.ns) if guest.count else assumed, table)
    mean = float(shown.mean())
    error = float(shown.std() / max(mean, 1) / np.sqrt(times))
    source = f"measured, {times:,} times"
    bare_ones = bare.values[bare.values <= most]
    if len(bare_ones) >= _ENOUGH:
        return _Switch(min(round(mean), round(float(np.median(bare_ones)))), source, error)
    least = DEFAULT.switch * round(faults.mean if faults.count >= _ENOUGH else DEFAULT.fault * scale) // DEFAULT.fault
    return _Switch(round(mean), f"{source}, at most", error, max(round(mean) - least, 0))
