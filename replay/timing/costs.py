# SPDX-License-Identifier: Apache-2.0
"""What things cost, in ns: measured in the recording where it can tell, else from a dated table.

`Costs` is what the clock computes with; `Measured` collects samples; `fit` says of each cost where it is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_KEPT: Final = 1 << 14  # samples of each cost
_ENOUGH: Final = 3  # samples, for a measured cost
_LEAST_KEPT: Final = 1 << 10
_FLUKES: Final = 1_000  # one in this many of the shortest times in the guest may be a fluke
_BARE: Final = 2  # the switch takes up to this many times the shortest time in the guest
_PLAUSIBLE: Final = (
    4  # ... and no more than this many usual faults take (the lab: 1.7; where hosts are nested, the most)
)


@dataclass(frozen=True)
class Costs:
    """ns. `switch` is the exit and entry themselves, which a recording shows as guest time."""

    switch: int = 1_000
    fault: int = 2_500  # handling of one fault that installs one leaf and no table
    table: int = 600  # each table more
    found: int = 1_500  # a load that finds its root
    created: int = 4_000  # a load that builds it
    unload: int = 1_000
    zap_leaf: int = 20  # each entry visited when a table is removed counts as a leaf or not at all
    zap_table: int = 2_000  # each table removed: its 512 entries
    job: int = 20_000  # until the worker begins
    hold: int = 600  # of a fault, load or unload: how long it has mmu_lock
    prefetch: int = 225  # each entry more that a fault of the shadow MMU fills
    chunk: int = 0  # the longest time that a worker's zap does not yield mmu_lock; 0: the whole zap
    refill: int = 1_000  # per mille of the pages that a refill is taken to need; 1,000: those that are mapped
    cpus: int = 0  # CPUs that vCPUs and the worker share; 0: enough


# Dated 2026-11, orders of magnitude. switch, fault: x86 hosts of 2018 to 2022 exit and enter in about 1 us and handle a
# 4 KiB fault in 2 to 4; zap_leaf: efd995dae5eb (900 s for 64 TB of 4 KiB SPTEs: 52 ns each, all included); created: the
# reporter's trace of April 2023 has 94 us from exit to entry in a nested host, 13 of them to the root's creation;
# hold: 0.23 of a fault in the lab's recordings of 6.1 (kvm_mmu_spte_requested to kvm_mmu_set_spte);
# prefetch: 0.09 of a fault, as in the corpus (6.1, 6.12, 7.x: 0.085 to 0.095).
DEFAULT: Final = Costs()
SOURCE: Final = "dated table of 2026-11"


@dataclass(frozen=True)
class LockCosts:
    """ns of what no recording shows: what is done under the locks of `replay.whatif`, orders of magnitude.

    Dated 2026-11. age_leaf, zap_spte: efd995dae5eb's 52 ns an SPTE, all included (900 s for 64 TB of 4 KiB SPTEs);
    call: a contended-free rwlock, the memslot's look-up and a walk of four levels; flush: an IPI to running CPUs and
    its answers, 1 to 4 us on x86 hosts of 2018 to 2022; line: a cache line from another core of the same socket, 50 to
    100 ns there; link, atomic: list_add under a spinlock, an atomic increment, both with the line at hand.
    """

    call: int = 300  # an aging walk or a range zap, without its SPTEs
    age_leaf: int = 52  # each SPTE more
    zap_spte: int = 52
    flush: int = 2_000  # of remote TLBs
    line: int = 70
    link: int = 30
    atomic: int = 10

    def times(self, factor: float) -> LockCosts:
        """All of them as many times."""
        return LockCosts(**{each.name: max(round(getattr(self, each.name) * factor), 1) for each in fields(self)})


@dataclass
class Samples:
    """Up to _KEPT of the values seen, evenly thinned, and their exact count and sum."""

    values: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    count: int = 0
    total: int = 0
    _every: int = 1

    @classmethod
    def alike(cls, count: int, total: int) -> Samples:
        """What is known in sum only: `count` (above 0) values, each the mean, in whole ns."""
        mean = total // count
        return cls(np.array([mean], np.int64), count, count * mean)

    def add(self, new: Ints) -> None:
        """Take in more."""
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
    """The shortest of many times, ns, and how many there were."""

    values: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    count: int = 0

    def add(self, new: Ints) -> None:
        """Take in more."""
        self.count += len(new)
        if len(self.values) == _LEAST_KEPT:
            new = new[new < self.values.max()]
        values = np.concatenate([self.values, new])
        self.values = np.partition(values, _LEAST_KEPT)[:_LEAST_KEPT] if len(values) > _LEAST_KEPT else values

    @property
    def ns(self) -> int:
        """The shortest that is no fluke, 0 where there is none."""
        if not self.count:
            return 0
        values = np.sort(self.values)
        return int(values[min(self.count // _FLUKES, len(values) - 1)])


@dataclass(frozen=True)
class Fitted:
    """Costs with where each is from ("measured" or the table), and the relative standard error of the measured ones.

    `open` is by how many ns the switch may be less than it is taken to be.
    """

    costs: Costs
    source: Mapping[str, str]
    error: Mapping[str, float]
    open: int = 0


def fit(samples: Mapping[str, Samples], cpus: int, guest: Shortest | None = None) -> Fitted:
    """Mean costs: sums come out right, which is what total times need; the tail of a cost is part of it.

    The table's are taken as many times as the recording's faults cost the table's: a slow machine is slow at all of it.
    `guest`: the shortest times in the guest, which bound the switch.
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
    if "zap_table" in error:  # tables as they were recorded, with what leaves they had
        found["zap_leaf"], source["zap_leaf"], error["zap_leaf"] = 0, "measured, within zap_table", error["zap_table"]
    if cpus:  # on the vCPU's own CPU the worker's time is the vCPU's, at once
        found["job"] = found["hold"] = 0  # and vCPUs that take turns do not meet at mmu_lock
        source["job"] = source["hold"] = "the lab's one CPU"
    # A root's first pass takes a GiB at a step, without a chance to yield (5.18 to 6.8: tdp_mmu_zap_root).
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
    """The switch to the guest and back: what times in the guest show of it between two faults at one RIP.

    A guest may have worked as long as it wanted between them. So the switch is no longer than the shortest times in the
    guest, nor than is plausible of a machine with such faults. In `bare` ones no instruction ended; the others may have
    had work in them, and without bare ones they are the most that it can be, and the table's the least.
    """
    faults, seen, bare = (samples.get(name, Samples()) for name in ("fault", "switch", "bare"))
    usual = float(np.median(faults.values)) if faults.count >= _ENOUGH else 0.0
    most = min((limit for limit in (_BARE * guest.ns, _PLAUSIBLE * usual) if limit), default=float("inf"))
    shown = seen.values[seen.values <= most]
    times = seen.count * len(shown) // max(len(seen.values), 1)
    if len(shown) < _ENOUGH:  # nor do other exits show more than that it is no longer
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
