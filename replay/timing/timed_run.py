# SPDX-License-Identifier: Apache-2.0
"""Replay one VM's inputs in virtual time under every policy of a plan, with the costs that were measured in that VM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.capabilities import Capabilities
from replay.decode.inputs import Ints
from replay.decode.specialize import Specialization
from replay.plan import Run, Target
from replay.simulate.operations import Ranges
from replay.simulate.timed_operations import Timed, tail
from replay.timing.costs import Fitted, fit
from replay.timing.diagnosis import Diagnosis, diagnoses
from replay.timing.measuring.measure import Measured
from replay.timing.reference_clock import TimeCategory
from replay.timing.smis_apart import SmisApart
from replay.timing.soft_hangs import SoftHang, soft_hangs
from replay.timing.stalls import Rule
from replay.timing.stuck_rip import CERTAIN
from replay.timing.timed_engine import TimedEngine
from traces.command_line.durations import duration

# Relative standard deviation of the time between two runs of the same work, dated 2026-11: measured in the lab with
# scenarios that no policy changes, and assumed for bare-metal hosts.
NOISE_LAB: Final = 0.15
NOISE: Final = 0.03
_UNKNOWN: Final = 0.5  # relative standard error of a cost that comes from the table


@dataclass(frozen=True)
class Settings:
    """The options of a replay in virtual time.

    `smi` is `open` (SMIs keep their wall-clock time), `closed` (they keep their place in the program) or `auto`.
    `stuck` is the number of exits at one RIP after which a recorded vCPU counts as stuck. `parts` is the number of
    parts of the recording for which the recorded time is broken down separately (`Timeline.parts`); 0: none.
    """

    smi: str = "auto"
    rule: Rule = field(default_factory=Rule)
    stuck: int = CERTAIN
    parts: int = 0

    def smis_open(self, measured: Measured) -> bool:
        """Whether SMIs keep their wall-clock time in this VM."""
        return measured.smis_open if self.smi == "auto" else self.smi == "open"


@dataclass(frozen=True)
class VcpuTime:
    """One vCPU under one run of a policy.

    `spent` is its time in ns by TimeCategory, `wall` their sum, and `error` the standard error relative to `wall`.
    `open` says by how many ns the time may be less (negative) and more because the recording does not determine the
    cost of a switch or, where a worker zapped that the policy does not have, how long userspace waited for it beyond
    its zaps. `progress` has rows of (clock, Cause of the last unload, *spent until then), without steal time.
    """

    id: int
    wall: int
    spent: tuple[int, ...]
    stalls: list[SoftHang]
    error: float
    open: tuple[int, int]
    progress: NDArray[np.int64]

    @property
    def band(self) -> tuple[int, int]:
        """The interval of the time in ns: two standard errors on each side, widened by `open`."""
        low, high = self.wall + self.open[0], self.wall + self.open[1]
        return max(round(low - 2 * self.error * self.wall), 0), round(high + 2 * self.error * self.wall)

    @property
    def longest(self) -> int:
        """The length of the longest soft-hang in ns; 0 if there is none."""
        return max((stall.ns for stall in self.stalls), default=0)


@dataclass(frozen=True)
class PolicyTime:
    """The times of one VM under one run of one policy."""

    target: Target
    run: Run
    vcpus: list[VcpuTime]
    jobs: int  # zaps queued for the zap worker
    worked: int  # ns that the zap worker took


@dataclass(frozen=True)
class VmTime:
    """The times of one VM: as recorded, the costs that were fitted, and the outcome under each policy.

    `recorded` is in ns by vCPU and TimeCategory; the switch is part of guest time there.
    """

    vm: int
    measured: Measured
    open: bool  # SMIs keep their wall-clock time
    outcomes: list[PolicyTime]
    stuck: list[Diagnosis]  # vCPUs that made no progress, and why
    marked: str = ""  # a sentence that says why the times are less reliable; empty if nothing does

    @property
    def refused(self) -> str:
        """The reason why there are no times; empty if there are."""
        return self.measured.refused

    @property
    def recorded(self) -> list[tuple[int, ...]]:
        return [] if self.refused else self.measured.recorded

    @property
    def fitted(self) -> Fitted:
        return self.measured.fitted


def vm_time(
    vm: Mapping[str, Any],
    ids: list[int],
    capabilities: Capabilities,
    measured: Measured,
    outcomes: list[PolicyTime],
    settings: Settings,
) -> VmTime:
    """Put together what is known of one VM's times; `ids` are the recorded vCPU ids."""
    meta, number = capabilities.trace.metadata, int(vm["id"])
    stuck = diagnoses(capabilities.trace, vm, capabilities.kernel, measured.rip_runs, ids, settings.stuck)
    if measured.refused:
        nothing = replace(measured, began=0, fitted=fit({}, 0))
        return VmTime(number, nothing, False, [], stuck)
    marked = [_slept(capabilities, measured)] if measured.slept.any() else []
    if meta.lost:
        marked.append(f"{meta.lost_text}: {'its' if meta.lost == 1 else 'their'} time counts as the state before")
    if meta.left_out:
        marked.append("kinds of event were left out at times: their time counts as the state before them")
    return VmTime(number, measured, settings.smis_open(measured), outcomes, stuck, "; ".join(marked))


def _slept(capabilities: Capabilities, measured: Measured) -> str:
    """Say for how long the host was suspended; that time is in no vCPU's time."""
    why = "" if any(not each.assumed for each in capabilities.suspends) else " (no VM has a row of that time)"
    return f"the host slept for {duration(int(measured.slept.max()))}{why}: that is nobody's time"


class PolicyClock:
    """The replay of one VM under one run of a policy in virtual time."""

    def __init__(self, target: Target, run: Run, specialized: Specialization, vcpus: int, measured: Measured) -> None:
        self.specialized = specialized
        self._target, self._run, self._measured = target, run, measured
        parameters = replace(target.parameters, assume_refault=run.assume_refault)
        costs, weights = measured.fitted.costs, measured.weights
        self._engine = TimedEngine(parameters, specialized.words, vcpus, costs, log=False, weights=weights)
        self._done = 0

    @staticmethod
    def run_all(
        clocks: list[PolicyClock], parts: Iterable[tuple[Timed, Ranges]], rest: tuple[Ints, Ints, Ints], began: int
    ) -> None:
        """Replay the operations of a VM for one kernel under all clocks, which are those of this kernel.

        `rest` is the time after each vCPU's last operation (`Specialization.rest`). With `began` (boot clock, ns), SMIs
        are due at their recorded time, in ns since then; if it is negative they keep their place in the programs.
        """
        apart = SmisApart(len(rest[0]), began) if began >= 0 else None
        for part, ranges in parts:
            timed = part if apart is None else apart.move(part)
            for clock in clocks:
                clock._engine.feed(timed, ranges, clock._done)
                clock._done += len(timed)
        end = tail(*(rest if apart is None else apart.rest(*rest)))
        for clock in clocks:
            clock._engine.feed(end, Ranges(), clock._done)
            clock._engine.finish()

    def outcome(self, ids: list[int], settings: Settings) -> PolicyTime:
        """Return the times under this policy; `ids` are the recorded vCPU ids."""
        engine, measured = self._engine, self._measured
        vcpus = []
        ended, parts, causes, faults = engine.clock, engine.spent, engine.causes, engine.vcpus.faults
        for i, samples in enumerate(engine.samples):
            spent = parts[i].tolist()
            progress = np.vstack([np.zeros((1, samples.shape[1]), np.int64), samples, [[ended[i], causes[i], *spent]]])
            stolen, uncertain = int(measured.stolen[i]), 0
            more = int(faults[i]) - int(measured.faults[i])
            if not self._target.recorded:
                interrupted = _interrupted(measured, i, spent)
                spent[TimeCategory.OTHER] += interrupted
                stolen, uncertain = _stolen(measured, i, sum(spent) - spent[TimeCategory.IDLE], more)
            spent[TimeCategory.STEAL] += stolen
            spent[TimeCategory.PAUSED] += measured.recorded[i][TimeCategory.PAUSED]
            wall = sum(spent)
            hangs = soft_hangs(progress, settings.rule)
            error = _error(measured, i, spent, more, uncertain)
            awaited = 0 if self._target.parameters.teardown == "worker" else int(measured.awaited[i])
            of_switch = -more * measured.fitted.open
            open_ = (min(of_switch, 0) - awaited, max(of_switch, 0))
            vcpus.append(VcpuTime(ids[i], wall, tuple(spent), hangs, error, open_, progress))
        return PolicyTime(self._target, self._run, vcpus, engine.jobs, engine.worked)


def _interrupted(measured: Measured, vcpu: int, spent: list[int]) -> int:
    """Remove the recorded interrupts of the host from `spent`, and return the
    ns that interrupts take in a run of that length.
    """
    switches = min(int(measured.interrupts[vcpu]) * measured.fitted.costs.switch, spent[TimeCategory.GUEST])
    within = min(int(measured.interrupted[vcpu]), spent[TimeCategory.OTHER])
    spent[TimeCategory.GUEST] -= switches
    spent[TimeCategory.OTHER] -= within
    recorded = int(measured.totals[vcpu].sum()) - switches - within
    return sum(spent) * (switches + within) // max(recorded, 1)


def _stolen(measured: Measured, vcpu: int, own: int, more: int) -> tuple[int, int]:
    """Return the ns stolen while the vCPU has a CPU for `own` ns, and their standard error (see `steal_curve`).

    On the lab's one CPU this is mostly the recorder, whose work is proportional to the number of rows.
    """
    stolen, curve = int(measured.stolen[vcpu]), measured.curves[vcpu] if measured.curves else None
    if curve is None:
        return (round(stolen * _rows(measured, vcpu, more)) if measured.fitted.costs.cpus else stolen), 0
    guests = round(stolen * _rows(measured, vcpu, more)) if measured.fitted.costs.cpus else curve.even(own)
    by_clock = curve.at(own)
    return (guests + by_clock) // 2, abs(guests - by_clock) // 2


def _rows(measured: Measured, vcpu: int, more: int) -> float:
    """Return the factor by which the vCPU's number of rows would grow with `more` further faults.

    Steal time on the lab's one CPU is mostly the recorder's work, 8 to 9 us a row (smi-storm on 6.1, roots kept and
    freed: 24.9 ms at 3,047 rows, 482 ms at 52,109).
    """
    rows = max(int(measured.rows[vcpu]), 1)
    each = 1 + int(measured.fault_rows[vcpu]) / max(int(measured.fault_events[vcpu]), 1)
    return max(1 + more * each / rows, 0.0)


def _error(measured: Measured, vcpu: int, spent: list[int], more: int, of_steal: int) -> float:
    """Return the relative standard error of a vCPU's time.

    It combines the noise between two runs, the uncertain costs of faults that are added or saved (`more`), and the
    standard error of steal time (`of_steal`, ns).
    """
    costs, errors = measured.fitted.costs, measured.fitted.error
    noise = NOISE_LAB if costs.cpus else NOISE
    of_switch = more * costs.switch * errors.get("switch", _UNKNOWN)
    of_faults = (spent[TimeCategory.FAULT] - measured.recorded[vcpu][TimeCategory.FAULT]) * errors.get(
        "fault", _UNKNOWN
    )
    of_costs = np.hypot(of_switch, of_faults)
    return float(np.hypot(noise, np.hypot(of_costs, of_steal) / max(sum(spent), 1)))
