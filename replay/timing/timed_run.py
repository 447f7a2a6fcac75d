"""Replays a trace in virtual time: once through to measure what things cost there, once more to run the clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.capabilities import Evidence
from replay.decode.decoder import VmStimuli
from replay.plan import Plan, Run, Target
from replay.run import has_ad_disabled
from replay.simulate.engine import Engine
from replay.simulate.operations import Ranges, Word
from replay.simulate.reference import Happened
from replay.simulate.specialize import Case, Lowering
from replay.timing.attribute import Timing
from replay.timing.costs import Fitted, Samples, fit
from replay.timing.reference_clock import Spent
from replay.timing.smis import Apart, Driven
from replay.timing.soft_hangs import SoftHang, soft_hangs
from replay.timing.stalls import Rule
from replay.timing.stuck_rip import CERTAIN, longest_runs
from replay.timing.stuck_rip import Run as Stuck
from replay.timing.timed_engine import TimedEngine
from replay.timing.timed_operations import tail
from replay.timing.timeline import Doing

# Relative standard deviation between two runs of the same work, dated 2026-11: of the lab's recordings of scenarios
# that no policy touches as measured, of bare-metal hosts as assumed.
NOISE_LAB: Final = 0.15
NOISE: Final = 0.03
_UNKNOWN: Final = 0.5  # relative, of a cost that is the table's
_SPENT: Final = {
    Doing.GUEST: Spent.GUEST, Doing.FAULT: Spent.FAULT, Doing.PREFETCH: Spent.FAULT, Doing.LOAD: Spent.LOAD,
    Doing.UNLOAD: Spent.UNLOAD, Doing.ZAP: Spent.UNLOAD, Doing.SMM: Spent.OTHER, Doing.USER: Spent.OTHER,
    Doing.OTHER: Spent.OTHER,
}  # fmt: skip
_LAB_CPUS: Final = 1  # QEMU emulates the lab's CPUs in turn, in one thread


@dataclass(frozen=True)
class Settings:
    """How virtual time is to be taken. `smi`: auto, open (SMIs keep their wall-clock time) or closed (their place).

    `stuck` is after how many exits at one RIP a recorded vCPU is taken to be stuck.
    """

    smi: str = "auto"
    rule: Rule = field(default_factory=Rule)
    stuck: int = CERTAIN


@dataclass(frozen=True)
class VcpuTime:
    """One vCPU under one run of a policy. `spent` is ns by Spent; `wall` their sum. `error` is relative, of `wall`.

    `open` is by how many ns it may be more (or, below 0, less) for what the recording does not tell of the switch.
    `progress` is rows of (clock, Cause of the last unload, *spent until then), without what others took from the vCPU.
    """

    id: int
    wall: int
    spent: tuple[int, ...]
    stalls: list[SoftHang]
    error: float
    open: int
    progress: NDArray[np.int64]

    @property
    def band(self) -> tuple[int, int]:
        """Two standard errors about the time, and what is open."""
        low, high = self.wall + min(self.open, 0), self.wall + max(self.open, 0)
        return max(round(low - 2 * self.error * self.wall), 0), round(high + 2 * self.error * self.wall)

    @property
    def guest_share(self) -> float:
        return self.spent[Spent.GUEST] / self.wall if self.wall else 1.0

    @property
    def longest(self) -> int:
        """The longest soft-hang, ns."""
        return max((stall.ns for stall in self.stalls), default=0)


@dataclass(frozen=True)
class Timed:
    """One VM under one run of one policy."""

    target: Target
    run: Run
    vcpus: list[VcpuTime]
    jobs: int  # of the zap worker
    worked: int  # ns it took


@dataclass(frozen=True)
class VmTime:
    """One VM: what was recorded, what things cost, and how it would have gone.

    `recorded` is ns by vCPU and Spent, of which the switch is within the guest's.
    """

    vm: int
    began: int  # boot ns of its first entry
    recorded: list[tuple[int, ...]]
    fitted: Fitted
    driven: Driven
    open: bool
    outcomes: list[Timed]
    stuck: list[Stuck] = field(default_factory=list)  # vCPUs that certainly did not get past an instruction
    refused: str = ""  # why there are no times
    marked: str = ""  # what makes them less than they seem


def replay_timed(plan: Plan, settings: Settings) -> list[VmTime]:
    """Virtual time for each VM and each run of the plan's policies that a kernel has (users' own are not timed)."""
    evidence = plan.evidence
    ad_disabled = has_ad_disabled(evidence)
    return [
        _vm(plan, settings, vm, ad_disabled) for vm in evidence.trace.metadata.vms if any(True for _ in vm["vcpus"])
    ]


def _vm(plan: Plan, settings: Settings, vm: Mapping[str, Any], ad_disabled: bool) -> VmTime:
    evidence = plan.evidence
    measured = Measured(evidence, vm, ad_disabled)
    number = int(vm["id"])
    if measured.refused:
        return VmTime(number, 0, [], fit({}, 0), measured.driven, False, [], refused=measured.refused)
    open_ = measured.driven.open if settings.smi == "auto" else settings.smi == "open"
    outcomes = _run(plan, settings, vm, ad_disabled, measured, open_)
    recorded = measured.recorded
    stuck = [each for each in longest_runs(evidence.trace, number).values() if each.certain(settings.stuck)]
    meta = evidence.trace.metadata
    marked = (
        f"{meta.lost:,} events were lost in {meta.gap_count:,} gaps: their time counts as what went on before them"
        if meta.lost
        else ""
    )
    return VmTime(
        number, measured.began, recorded, measured.fitted, measured.driven, open_, outcomes, stuck, marked=marked
    )


class Measured:
    """A VM's first pass: the recorded kernel's own run, for the costs and for what it zapped."""

    def __init__(self, evidence: Evidence, vm: Mapping[str, Any], ad_disabled: bool) -> None:
        self.timing = timing_of(evidence, vm)
        self.driven = Driven()
        stimuli = VmStimuli(evidence, vm, watch=self._watch)
        lowering = Lowering(evidence.kernel, Case(), ad_disabled)
        engine = Engine(evidence.own, lowering.words, len(stimuli.vcpus))
        self.began = -1
        self.refused = ""
        tables = 0
        for stretch in stimuli:
            block = lowering.apply(stretch)
            self.timing.join(block)
            engine.feed(block, stretch.ranges)
            log = engine.take_log()
            tables += int(log.tables[log.event == Happened.FREED].sum())
        self.timing.rest()
        self.faults: list[int] = engine.vcpus.faults.tolist()  # by vCPU, as recorded
        backwards = self.timing.timeline.backwards
        if self.began < 0:
            self.refused = "no entry into the guest is recorded: times are not known (--events time records them)"
        elif backwards:
            self.refused = f"the clock runs backwards at {backwards:,} rows: times are not to be had"
        samples: dict[str, Samples] = dict(self.timing.samples)
        contended = self.timing.contended
        if contended.faults:
            samples["hold"] = Samples.alike(contended.faults, contended.held)
        # Each vCPU gives up its part of a job (`Clock`), so that a job takes what they lost on average.
        lost = int(self.timing.stolen.lost.mean()) if len(stimuli.vcpus) else 0
        taken = lost if evidence.own.teardown == "worker" else int(self.timing.totals[:, Doing.ZAP].sum())
        if tables and taken:
            samples["zap_table"] = Samples.alike(tables, taken)
        elif self.timing.stolen.removed:
            samples["zap_table"] = Samples.alike(self.timing.stolen.removed, self.timing.stolen.removing)
        self.fitted = fit(samples, _cpus(evidence))

    @property
    def recorded(self) -> list[tuple[int, ...]]:
        """ns by vCPU and Spent, as recorded; the switch is within the guest's."""
        spent = np.zeros((len(self.timing.totals), len(Spent)), np.int64)
        for doing, on in _SPENT.items():
            spent[:, on] += self.timing.totals[:, doing]
        spent[:, Spent.WAIT] += self.timing.stolen.lost + self.timing.contended.waited
        spent[:, Spent.OTHER] += self.timing.stolen.preempted
        return [tuple(row) for row in spent.tolist()]

    def _watch(self, rows: Any) -> None:
        self.timing.watch(rows)
        self.driven.watch(rows)
        if self.began < 0:
            entries = rows.of_vcpu("kvm_entry")
            if len(entries):
                self.began = int(rows.time[entries[0]])


def _run(
    plan: Plan, settings: Settings, vm: Mapping[str, Any], ad_disabled: bool, measured: Measured, open_: bool
) -> list[Timed]:
    evidence = plan.evidence
    groups = any(target.axes.prefetch > 1 for target in plan.targets)
    cases = {
        (target.kernel.name, run.case): target.kernel
        for target in plan.targets
        if target.policy is None
        for run in target.runs
    }
    lowerings = {key: Lowering(kernel, key[1], ad_disabled) for key, kernel in cases.items()}
    timings = {key: timing_of(evidence, vm) for key in cases}
    aparts = {key: Apart(len(timing.timeline.totals)) for key, timing in timings.items()}

    def watch(rows: Any) -> None:
        for timing in timings.values():
            timing.watch(rows)

    stimuli = VmStimuli(evidence, vm, groups=groups, watch=watch)
    running = [
        (target, run, _clock(target, run, lowerings[target.kernel.name, run.case].words, len(stimuli.vcpus), measured))
        for target in plan.targets
        if target.policy is None
        for run in target.runs
    ]
    done = dict.fromkeys(cases, 0)
    for stretch in stimuli:
        for key, lowering in lowerings.items():
            timed = timings[key].join(lowering.apply(stretch))
            if open_:
                timed = aparts[key].part(timed, measured.began)
            for target, run, clock in running:
                if (target.kernel.name, run.case) == key:
                    clock.feed(timed, stretch.ranges, done[key])
            done[key] += len(timed)
    for key, timing in timings.items():
        (lead, guest), (before, ran) = timing.rest(), aparts[key].rest()
        last = tail(lead + before, guest + ran)
        for target, run, clock in running:
            if (target.kernel.name, run.case) == key:
                clock.feed(last, Ranges(), done[key])
    outcomes = []
    for target, run, clock in running:
        clock.finish()
        outcomes.append(_outcome(target, run, clock, stimuli.vcpus, settings, measured))
    return outcomes


def _clock(target: Target, run: Run, words: list[Word], vcpus: int, measured: Measured) -> TimedEngine:
    return TimedEngine(replace(target.axes, revive=run.revive), words, vcpus, measured.fitted.costs, log=False)


def _outcome(
    target: Target,
    run: Run,
    clock: TimedEngine,
    ids: list[int],
    settings: Settings,
    measured: Measured,
) -> Timed:
    vcpus = []
    ended, parts, causes = clock.clock, clock.spent, clock.causes
    for i, samples in enumerate(clock.samples):
        spent = parts[i].tolist()
        progress = np.vstack([np.zeros((1, samples.shape[1]), np.int64), samples, [[ended[i], causes[i], *spent]]])
        others = int(measured.timing.stolen.preempted[i])
        if not target.recorded:
            others = round(others * _rows(measured, i, clock)) + _interrupted(measured, i, spent)
        spent[Spent.OTHER] += others
        wall = sum(spent)
        hangs = soft_hangs(progress, settings.rule)
        more = int(clock.vcpus.faults[i]) - measured.faults[i]
        error = _error(measured, i, spent, more)
        vcpus.append(VcpuTime(ids[i], wall, tuple(spent), hangs, error, -more * measured.fitted.open, progress))
    return Timed(target, run, vcpus, clock.jobs, clock.worked)


def _interrupted(measured: Measured, vcpu: int, spent: list[int]) -> int:
    """Take the host's interrupts out of `spent`; ns of as many as a run of that length has."""
    timing = measured.timing
    switches = min(int(timing.interrupts[vcpu]) * measured.fitted.costs.switch, spent[Spent.GUEST])
    within = min(int(timing.interrupted[vcpu]), spent[Spent.OTHER])
    spent[Spent.GUEST] -= switches
    spent[Spent.OTHER] -= within
    recorded = int(timing.totals[vcpu].sum()) - switches - within
    return sum(spent) * (switches + within) // max(recorded, 1)


def _rows(measured: Measured, vcpu: int, clock: TimedEngine) -> float:
    """How many times as many rows of the vCPU a recording of this run would have as there are.

    What others take on the lab's one CPU is above all the recorder's work, 8 to 9 us a row (smi-storm on 6.1, roots
    kept and freed: 24.9 ms at 3,047 rows, 482 ms at 52,109).
    """
    timing = measured.timing
    rows = max(int(timing.rows[vcpu]), 1)
    each = 1 + int(timing.fault_rows[vcpu]) / max(int(timing.faults[vcpu]), 1)
    more = int(clock.vcpus.faults[vcpu]) - measured.faults[vcpu]
    return max(1 + more * each / rows, 0.0)


def _error(measured: Measured, vcpu: int, spent: list[int], more: int) -> float:
    """Relative standard error: of one run against another, and of the costs of faults added or taken away (`more`)."""
    costs, errors = measured.fitted.costs, measured.fitted.error
    noise = NOISE_LAB if costs.cpus else NOISE
    of_switch = more * costs.switch * errors.get("switch", _UNKNOWN)
    of_faults = (spent[Spent.FAULT] - measured.recorded[vcpu][Spent.FAULT]) * errors.get("fault", _UNKNOWN)
    return float(np.hypot(noise, np.hypot(of_switch, of_faults) / max(sum(spent), 1)))


def timing_of(evidence: Evidence, vm: Mapping[str, Any]) -> Timing:
    """What measures a VM's times, before its first row."""
    vcpus = len({int(vcpu["id"]) for vcpu in vm["vcpus"]})
    named = [t for t in evidence.trace.metadata.threads if str(t.get("comm", "")).startswith("kworker")]
    workers = [t["tid"] for t in named if isinstance(t.get("tid"), int) and 0 <= t["tid"] < 1 << 31]
    return Timing(vcpus, _cpus(evidence), workers, evidence.own, evidence.intel)


def _cpus(evidence: Evidence) -> int:
    """CPUs that vCPUs and the worker share: the lab's one, else enough."""
    return _LAB_CPUS if evidence.trace.metadata.raw.get("lab") else 0
