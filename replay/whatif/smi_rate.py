# SPDX-License-Identifier: Apache-2.0
"""--sweep, --smi-rate: what if SMIs came more often, the working set were larger, or other vCPUs held the root as well?

The recorded program is replayed without its SMIs, and copies of its last SMI interrupt each vCPU at a steady rate of
the wall clock. Which pages the guest needs after each of them is in no recording made at another rate. So every mapped
page is taken to be accessed again at once, which is the worst case for policies that free roots.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.capabilities import Capabilities
from replay.decode.row_counts import RowCounts
from replay.decode.vm_inputs import vcpu_ids
from replay.own_policy import OwnPolicyCheck, compare
from replay.simulate.operations import VCPU_SHIFT, Block, Op, Ranges
from replay.simulate.timed_operations import LAST, MORE, Timed, joined, tail, take
from replay.spool import Spool
from replay.timing.costs import Costs
from replay.timing.measuring.measured_vm import measure_vm
from replay.timing.smis_apart import SmisApart
from replay.timing.timed_engine import TimedEngine
from replay.whatif.each_vm import UnansweredVm, ask_each_vm
from traces.errors import Problem
from traces.kernels.policies import PolicyParameters

Ints = NDArray[np.int64]
_SMIS: Final = 500  # SMIs in a run; a second run with twice as many shows the speed
_PROGRESS: Final = 0.001  # a program hangs if it is slower than this share of its undisturbed speed
_POINTS: Final = 3  # rates that a sweep tries in each factor of ten
_BISECTIONS: Final = 12  # steps in which the rate is narrowed down from which a program hangs


@dataclass(frozen=True)
class SmiChange:
    """What differs from the recording: the working set by a factor, and how many vCPUs hold the root.

    `holders` vCPUs have the root loaded; those in excess of the recorded ones do nothing.
    """

    working_set: float = 1.0
    holders: int = 1


@dataclass(frozen=True)
class Sweep:
    """The SMIs a second to try: from `low` to `high`, by equal factors (`log`) or in equal steps."""

    low: float
    high: float
    log: bool = True

    @property
    def rates(self) -> list[float]:
        """The rates to try, in SMIs a second."""
        if self.low == self.high:
            return [self.low]
        if not self.log:
            return [float(rate) for rate in np.linspace(self.low, self.high, 10)]
        points = max(2, round(_POINTS * float(np.log10(self.high / self.low))) + 1)
        return [float(rate) for rate in np.geomspace(self.low, self.high, points)]


@dataclass(frozen=True)
class Swept:
    """The result of a sweep under one policy.

    `factors` has for each rate the program's time relative to its undisturbed time, or None where it hangs. `tips` is
    the rate from which on it hangs (None: at no rate that was tried). The arithmetic `limit` is the rate in SMIs a
    second at which an SMI leaves no time until the next one: it takes `smi` ns itself, and `refill` ns to fault
    everything in again.
    """

    policy: str
    factors: list[float | None]
    tips: float | None
    refill: int
    smi: int

    @property
    def limit(self) -> float:
        return 1e9 / max(self.refill + self.smi, 1)


def parse(text: str) -> Sweep:
    """Parse the value of --sweep, such as `smi-rate=10:10000:log` or `:lin`. Raises Problem if it is invalid."""
    match = re.fullmatch(r"smi-rate=(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)(?::(log|lin))?", text)
    if match is None or not 0 < float(match[1]) <= float(match[2]):
        raise Problem(f"--sweep {text}: write it like smi-rate=10:10000:log")
    return Sweep(float(match[1]), float(match[2]), match[3] != "lin")


class SmiProgram:
    """One VM's program without its SMIs, and the last SMI of each vCPU that
    had one, with the recorded kernel's triggers.
    """

    def __init__(self, capabilities: Capabilities, vm: Mapping[str, Any], change: SmiChange) -> None:
        parts = []
        self._ranges = Ranges()
        with Spool() as spool:
            rows = RowCounts(capabilities, len(vcpu_ids(vm)))
            found = measure_vm(capabilities, vm, spool, row_counts=rows)
            inputs, measured = found.inputs, found.measured
            self.check = compare(capabilities, vm, inputs, rows, found.engine)
            if measured.refused:
                raise UnansweredVm(measured.refused)
            self.recorded = len(inputs.vcpus)
            self.vcpus = max(self.recorded, change.holders)
            apart = SmisApart(self.recorded, measured.began)
            for part, ranges in spool:
                parts.append(_shifted(apart.move(part), len(self._ranges.rows)))
                self._ranges.rows += ranges.rows
        whole = joined([*parts, tail(*apart.rest(*measured.rest))])
        self._smis = [self._last_smi(whole, vcpu) for vcpu in range(self.recorded)]
        if all(smi is None for smi in self._smis):
            raise UnansweredVm("it has no whole SMI to repeat: record one, or make a trace with kvmtrace synth")
        self._program = take(whole, np.flatnonzero(whole.queue < self.recorded))
        # Ignore the exit of the VM's process, which empties every root: turn it into an operation without effect.
        ends = self._program.block.op & 15 == Op.ZAP_ALL
        self._program.block.op[ends] = int(Op.ROLE) | self._program.queue[ends].astype(np.uint32) << VCPU_SHIFT
        self._program.block.gfn[ends] = 0
        self._words = found.engine.words
        self._costs: Costs = replace(measured.fitted.costs, refill=round(1000 * change.working_set))

    def sweep(self, parameters: PolicyParameters, rates: Iterable[float]) -> Swept:
        """Replay a policy at each rate, and find the rate from which on the program hangs."""
        alone, engine = self._run(parameters, None, 0)
        tried = {rate: self._factor(parameters, rate, alone) for rate in rates}
        hangs = min((rate for rate, factor in tried.items() if factor is None), default=None)
        slow = max((rate for rate, factor in tried.items() if factor is not None), default=None)
        tips = hangs
        if hangs is not None and slow is not None and slow < hangs:
            for _ in range(_BISECTIONS):
                middle = float(np.sqrt(slow * hangs))
                slow, hangs = (middle, hangs) if self._factor(parameters, middle, alone) is not None else (slow, middle)
            tips = hangs
        smi = max(int(each.lead.sum() + each.cost.sum()) for each in self._smis if each is not None)
        return Swept(parameters.name, list(tried.values()), tips, self._refill(parameters, engine), smi)

    def _refill(self, parameters: PolicyParameters, engine: TimedEngine) -> int:
        """Return the ns to fault in again everything that is mapped at the end; 0 if a root outlives the SMI."""
        if parameters.own_reference or parameters.mmu == "shadow" or self.vcpus > 1:
            return 0
        counters, costs = engine.counters, self._costs
        leaves = int(engine.vcpus.faults.sum()) + counters.prefetched - counters.zapped
        tables = counters.tables - counters.tables_freed
        refill = leaves * (costs.fault + costs.switch) + tables * costs.table
        return refill * costs.refill // 1000 + costs.created

    def _factor(self, parameters: PolicyParameters, rate: float, alone: int) -> float | None:
        """Return the program's time relative to its undisturbed time, or None if it makes no progress.

        A run has _SMIS SMIs, after which the rest of the program passes undisturbed. The rests after that many and
        after twice as many SMIs give the program's speed under SMIs, and so its end.
        """
        period = 1e9 / rate
        ended, _ = self._run(parameters, period, _SMIS)
        if ended <= _SMIS * period:
            return ended / alone
        later, _ = self._run(parameters, period, 2 * _SMIS)
        if later <= 2 * _SMIS * period:
            return later / alone
        left, then = ended - _SMIS * period, later - 2 * _SMIS * period
        speed = (left - then) / (_SMIS * period)
        return (2 * _SMIS * period + then / speed) / alone if speed > _PROGRESS else None

    def _run(self, parameters: PolicyParameters, period: float | None, count: int) -> tuple[int, TimedEngine]:
        """Return the ns of the slowest vCPU, and the engine at the end."""
        frees = not (parameters.own_reference or parameters.mmu == "shadow")
        parameters = replace(parameters, assume_refault=frees)
        engine = TimedEngine(parameters, self._words, self.vcpus, self._costs, log=False)
        for idle in range(self.recorded, self.vcpus):
            engine.feed(_entry(idle), self._ranges)
        if period is not None:
            for vcpu, smi in enumerate(self._smis):
                if smi is not None:
                    engine.feed(self._storm(vcpu, smi, period, count), self._ranges)
        engine.feed(self._program, self._ranges)
        engine.finish()
        return int(engine.clock[: self.recorded].max()), engine

    def _storm(self, vcpu: int, smi: Timed, period: float, count: int) -> Timed:
        many = take(smi, np.tile(np.arange(len(smi)), count))
        many.queue[:] = self.vcpus + vcpu
        many.wall[:: len(smi)] = (np.arange(1, count + 1) * period).astype(np.int64)
        return replace(many, until=0)  # they must happen while the program runs, not before it

    def _last_smi(self, whole: Timed, vcpu: int) -> Timed | None:
        """Return a vCPU's last complete SMI, or None if it has none."""
        mine = np.flatnonzero(whole.queue == self.recorded + vcpu)
        ends = np.flatnonzero(whole.wall[mine] == LAST)
        starts = np.flatnonzero(whole.wall[mine] >= 0)
        if not len(ends):
            return None
        start = starts[np.searchsorted(starts, ends[-1]) - 1]
        return take(whole, mine[start : ends[-1] + 1])


def _entry(vcpu: int) -> Timed:
    """Return the operation of a vCPU that enters the guest once and stays there."""
    none = np.zeros(1, np.int64)
    block = Block(np.array([int(Op.ENTER) | vcpu << VCPU_SHIFT], np.uint32), none, none, none)
    return Timed(block, np.array([vcpu], np.int32), none, none, none, none, none.astype(np.uint8), none + MORE, until=0)


def _shifted(timed: Timed, by: int) -> Timed:
    """Renumber the ranges of a block, in place, so that they begin at `by`."""
    timed.block.gfn[np.isin(timed.block.op & 15, (int(Op.ZAP), int(Op.SPLIT)))] += by
    return timed


def swept(
    capabilities: Capabilities, policies: Iterable[PolicyParameters], sweep: Sweep, change: SmiChange
) -> tuple[dict[int, list[Swept]], list[OwnPolicyCheck], dict[int, str]]:
    """Return by VM the sweep of each policy, the checks of the recorded
    policy, and by VM the reasons why there is no answer.
    """
    chosen = list(policies)
    checks = []

    def ask(vm: Mapping[str, Any]) -> list[Swept]:
        program = SmiProgram(capabilities, vm, change)
        checks.append(program.check)
        return [program.sweep(parameters, sweep.rates) for parameters in chosen]

    answers, unanswered = ask_each_vm(capabilities, ask)
    return answers, checks, unanswered
