# SPDX-License-Identifier: Apache-2.0
"""The bound on what a flight costs: above it fewer kinds of event are recorded, and more again later.

The cost is the run time of the BPF programs, by the kernel's own statistics, and the CPU time of this process. Writing
dumps is left out, because it is just then that everything is wanted. What it takes to get from a tracepoint to its
program is in neither.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from tracer.probing import libbpf
from tracer.probing.probes import IOCTL_KINDS, PRESETS, preset_kinds
from tracer.writer import prefer_this_thread

LOWEST: Final = "counters"
# Always recorded, so that it stays known which VM an address belongs to, and what memory the VM has.
_ALWAYS: Final = frozenset({*IOCTL_KINDS, "vm_destroy"})
_TICK: Final = 1.0  # seconds of a measurement
_AVERAGED: Final = 5  # measurements: some of them include a snapshot of the VMs
_STORM: Final = 4  # times the bound: above that, one measurement is enough
_FIRST_HOLD, _MOST_HOLD = 10.0, 640.0  # seconds at a level before more is tried; twice as long each time it fails


@dataclass(frozen=True)
class Level:
    """One step of recording: its name for users, and the kinds of event that are recorded."""

    name: str
    kinds: frozenset[str]


def levels(preset: str, kinds: frozenset[str]) -> tuple[Level, ...]:
    """Return the levels, from everything that was asked for down to the least."""
    found = [Level(preset, kinds)]
    for name in reversed(PRESETS):
        fewer = (kinds & preset_kinds(name)) | (kinds & _ALWAYS)
        if fewer < found[-1].kinds:
            found.append(Level(name, fewer))
    least = kinds & _ALWAYS
    return (*found, Level(LOWEST, least)) if least < found[-1].kinds else tuple(found)


class Governor:
    """Decides at which level to record: one step down when it costs too much, one up after a while without that.

    If a step up soon fails, it waits twice as long before the next. The cost is averaged over the last seconds at the
    level, so that a single busy second is not too much; a storm is too much at once.
    """

    def __init__(self, steps: int, most: float) -> None:
        """`steps` is the number of levels, `most` the share of the host's CPUs that may be used (0 to 1)."""
        self.level = 0
        self._last, self._most = steps - 1, most
        self._since: float | None = None
        self._shares: deque[float] = deque(maxlen=_AVERAGED)
        self._hold = _FIRST_HOLD
        self._tried = False  # whether the present level was reached by a step up
        self.share = 0.0  # of all CPUs, as judged last

    def judge(self, now: float, share: float) -> int:
        """Return the level to record at, after a second until `now` (s) in which that share of all CPUs was used."""
        self._since = now - _TICK if self._since is None else self._since
        self._shares.append(share)
        self.share = sum(self._shares) / len(self._shares)
        stayed = now - self._since
        if self.share > self._most:
            certain = len(self._shares) == _AVERAGED or share > _STORM * self._most
            if self.level < self._last and certain:
                failed = self._tried and stayed < self._hold
                self._hold = min(2 * self._hold, _MOST_HOLD) if failed else self._hold
                self._go(now, self.level + 1, tried=False)
        elif stayed >= self._hold:
            if self._tried:
                self._hold = _FIRST_HOLD
            if self.level:
                self._go(now, self.level - 1, tried=True)
        return self.level

    def _go(self, now: float, level: int, *, tried: bool) -> None:
        self.level, self._since, self._tried = level, now, tried
        self._shares.clear()


class GovernedProbes(Protocol):
    """What the governor needs of the loaded probes."""

    def run_time(self) -> int: ...

    def observe(self, kinds: frozenset[str]) -> frozenset[str]: ...


@dataclass(frozen=True)
class LevelChange:
    """From `since` (boot ns) on these kinds, if any, are left out; `share` is what was used before, of all CPUs."""

    since: int
    level: int
    name: str
    left_out: frozenset[str]
    share: float


class GovernorThread:
    """Measures the cost once a second while it exists, and changes what the probes observe."""

    def __init__(
        self, probes: GovernedProbes, steps: tuple[Level, ...], most: float, own_cpu: Callable[[], float],
        tell: Callable[[LevelChange], None],
    ) -> None:  # fmt: skip
        """`own_cpu` returns the recorder's CPU time so far (s); `tell` is called after each change.

        Raises OSError where this kernel does not measure programs.
        """
        self._probes, self._levels, self._own_cpu, self._tell = probes, steps, own_cpu, tell
        self._governor = Governor(len(steps), most)
        self._cpus = os.cpu_count() or 1
        self._statistics = libbpf.enable_statistics()
        self._ended = threading.Event()
        self.seconds = dict.fromkeys((level.name for level in steps), 0.0)  # at each level
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="governor", daemon=True)
        self._thread.start()

    @property
    def share(self) -> float:
        """The share of all CPUs that recording used over the last seconds."""
        return self._governor.share

    @property
    def level(self) -> Level:
        """The level that is recorded at now."""
        return self._levels[self._governor.level]

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        os.close(self._statistics)

    def _run(self) -> None:
        prefer_this_thread()  # the governor is needed most when the host is busy
        try:
            before = self._used()
            while not self._ended.wait(_TICK):
                now = self._used()
                seconds, used = (b - a for a, b in zip(before, now, strict=True))
                share = used / (seconds * self._cpus)
                self.seconds[self.level.name] += seconds
                level = self._governor.level
                if self._governor.judge(now[0], share) != level:
                    self._change()
                    now = self._used()  # what the change itself took is not what the level costs
                before = now
        except Exception as error:  # the recorder's loop sees it and ends the recording
            self.error = error

    def _used(self) -> tuple[float, float]:
        """Return the time now and the CPU time used until now, both in s."""
        return time.monotonic(), self._probes.run_time() / 1e9 + self._own_cpu()

    def _change(self) -> None:
        since = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        level = self.level
        observed = self._probes.observe(level.kinds)
        left_out = self._levels[0].kinds - observed
        self._tell(LevelChange(since, self._governor.level, level.name, left_out, self._governor.share))
