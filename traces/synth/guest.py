# SPDX-License-Identifier: Apache-2.0
"""What a guest does over its own time, whatever the host's policy: pages accessed, SMIs, exits, register writes."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from traces.lives import Flags, Ints
from traces.synth.parameters import Parameters

TOUCH, SMI, EXIT, WP = range(4)

# Guest memory: slot 0 holds the code and SMRAM, slot 1 the data, slot 2 is a device's, which comes and goes.
LOW_PAGES: Final = 512
CODE_GFN: Final = 1
SMRAM_GFN: Final = 0x38
DATA_GFN: Final = 1024
RESET_RIP, DATA_RIP, AFTER_RIP = 0x1000, 0x1004, 0x1018

IDLE_PHASE: Final = 1e7  # ns; how often a guest without SMIs goes through its working set
_MIXTURE: Final = (0.6, 0.9)  # of the mixed locality: up to here sequential, up to here zipf, the rest uniform


@dataclass(frozen=True)
class Steps:
    """Steps of one VM in order: what (`op`), when (`time`, ns of guest time), on which vCPU; pages for touches."""

    op: NDArray[np.uint8]
    time: Ints
    vcpu: Ints
    gfn: Ints
    rip: Ints

    def first(self, count: int) -> Steps:
        return Steps(*(values[:count] for values in vars(self).values()))

    def __len__(self) -> int:
        return len(self.op)


class _Part(NamedTuple):
    """Steps of one sort: columns of Steps, as arrays or one value for all."""

    op: int
    time: Ints
    vcpu: Ints
    gfn: Ints | int
    rip: int


class Ticks:
    """Times of something that happens at a steady rate, handed out interval by interval."""

    def __init__(self, rate: float, offset: float) -> None:
        self._period = 1e9 / rate if rate else 0.0
        self._offset = offset
        self._next = 0

    @property
    def peek(self) -> float:
        """When it happens next, in ns of guest time; infinite if never."""
        return self._times(self._next, self._next + 1)[0] if self._period else np.inf

    def until(self, end: float) -> Ints:
        """Return the times before `end` that were not handed out yet."""
        if not self._period:
            return np.empty(0, np.int64)
        times = self._times(self._next, max(self._next, int(end / self._period - self._offset) + 2))
        times = times[times < end]
        self._next += len(times)
        return times

    def _times(self, first: int, last: int) -> Ints:
        return ((np.arange(first, last) + self._offset) * self._period).astype(np.int64)


class Guest:
    """One VM's guest, determined by the seed and the VM's number."""

    def __init__(self, parameters: Parameters, vm: int, stuck: bool) -> None:
        smi_rate, memslot_rate, exit_rate, wp_rate = parameters.rates()
        self.pages = parameters.memory >> 12
        self.memslots = Ticks(memslot_rate, 0.5)
        self._parameters = parameters
        self._stuck = stuck
        self._rng = np.random.default_rng([parameters.seed, vm, 1])
        self._phase = 1e9 / smi_rate if smi_rate else IDLE_PHASE
        self._touches = Ticks(parameters.working_set * 1e9 / self._phase, 0.5)
        self._touched = 0
        self._events = {SMI: Ticks(smi_rate, 1.0), EXIT: Ticks(exit_rate, 0.75), WP: Ticks(wp_rate, 0.25)}
        self._reloads = {SMI, WP} | ({EXIT} if parameters.reset_on else set())
        self._stride = next(
            n for n in range(int(self.pages * 0.618) | 1, 2 * self.pages + 2) if gcd(n, self.pages) == 1
        )
        self.steps_per_ns = parameters.working_set / self._phase + 2 * (smi_rate + exit_rate + wp_rate) / 1e9

    def steps(self, start: int, end: int, fetch_rip: int) -> Steps:
        """Return the steps from `start` to `end` ns, without memslot changes; times continue from the last call's end.

        With `fetch_rip` (0: none) every vCPU first fetches its code page there, as after a root was loaded.
        """
        vcpus = self._parameters.vcpus
        touches = self._touches.until(end)
        parts = [_Part(TOUCH, touches, self._turn(touches), self._data_pages(len(touches)), DATA_RIP)]
        if fetch_rip:
            parts.insert(0, _Part(TOUCH, np.full(vcpus, start), np.arange(vcpus), CODE_GFN, fetch_rip))
        for op, ticks in self._events.items():
            times = ticks.until(end)
            parts.append(_Part(op, times, self._turn(times), 0, 0))
            if op in self._reloads:  # the next instruction is fetched through the root that was loaded
                parts.append(_Part(TOUCH, times + 1, self._turn(times), CODE_GFN, AFTER_RIP))
        op_, time, vcpu, gfn, rip = (
            np.concatenate([np.broadcast_to(np.asarray(part[column], np.int64), len(part.time)) for part in parts])
            for column in range(5)
        )
        order = np.argsort(time, kind="stable")
        return Steps(op_[order].astype(np.uint8), time[order], vcpu[order], gfn[order], rip[order])

    def _turn(self, times: Ints) -> Ints:
        """Return the vCPU whose turn it is at each time: one for each SMI interval, and for the SMI at its end."""
        return np.maximum((times - 1) / self._phase, 0).astype(np.int64) % self._parameters.vcpus

    def _data_pages(self, count: int) -> Ints:
        """Return the pages of the next `count` accesses, as gfns."""
        index = np.arange(self._touched, self._touched + count) % self._parameters.working_set
        self._touched += count
        if self._stuck:
            return np.full(count, CODE_GFN)
        return DATA_GFN + self._pages(index) % self.pages

    def _pages(self, index: Ints) -> Ints:
        locality = self._parameters.locality
        if locality == "sequential":
            return index
        if locality == "uniform":
            return self._rng.integers(0, self.pages, len(index))
        if locality == "zipf":
            return self._zipf(len(index))
        which = self._rng.random(len(index))
        uniform = self._rng.integers(0, self.pages, len(index))
        return np.where(which < _MIXTURE[0], index, np.where(which < _MIXTURE[1], self._zipf(len(index)), uniform))

    def _zipf(self, count: int) -> Ints:
        """Return Zipf-distributed pages: rank r has a chance of about 1/r, and ranks are scattered over memory."""
        rank = (float(self.pages) ** self._rng.random(count)).astype(np.int64) - 1
        return rank * self._stride % self.pages


def huge_regions(parameters: Parameters, vm: int) -> Flags:
    """Return which 2 MiB regions of the guest the host maps by one SPTE, by region number."""
    regions = (DATA_GFN >> 9) + (parameters.memory >> 21)
    if parameters.page_size != "mixed":
        return np.full(regions, parameters.page_size == "2m")
    huge = np.random.default_rng([parameters.seed, vm, 2]).random(regions) < 0.5
    huge[: DATA_GFN >> 9] = False
    return huge
