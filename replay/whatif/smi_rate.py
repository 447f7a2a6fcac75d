# SPDX-License-Identifier: Apache-2.0
"""What if SMIs came more often, the working set were larger, or other vCPUs held the root as well?

The recorded program is kept without its SMIs, and copies of its last SMI strike each vCPU at a steady rate of the wall
clock. What the guest needs after each is in no recording made at another rate: every page that is mapped is taken to be
accessed again at once, so that policies which free roots come out at their worst.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.capabilities import Capabilities
from replay.decode.cases import Case
from replay.decode.row_counts import RowCounts
from replay.decode.specialize import Specialization
from replay.decode.vm_inputs import vcpu_ids
from replay.own_policy import OwnPolicyCheck, compare
from replay.simulate.operations import VCPU_SHIFT, Block, Op, Ranges
from replay.simulate.timed_operations import LAST, MORE, Timed, joined, tail, take
from replay.spool import Spool
from replay.timing.costs import Costs
from replay.timing.measured_vm import measure_vm
from replay.timing.timed_engine import TimedEngine
from replay.whatif.each_vm import UnansweredVm, ask_each_vm
from traces.errors import Problem
from traces.kernels.policies import PolicyParameters

Ints = NDArray[np.int64]
_SMIS: Final = 500  # of a run, and of one with twice as many, by which the first is judged
_PROGRESS: Final = 0.001  # of its undisturbed speed: a program slower than that hangs
_POINTS: Final = 3  # of a sweep, in each factor of ten
_BISECTIONS: Final = 12


@dataclass(frozen=True)
class SmiChange:
    """What is otherwise. `holders` vCPUs have the root loaded, of which all but the recorded ones do nothing."""

    working_set: float = 1.0
    holders: int = 1


@dataclass(frozen=True)
class Sweep:
    """SMIs a second to try: from `low` to `high`, by equal factors (`log`) or in equal steps."""

    low: float
    high: float
    log: bool = True

    @property
    def rates(self) -> list[float]:
        """The points."""
        if self.low == self.high:
            return [self.low]
        if not self.log:
            return [float(rate) for rate in np.linspace(self.low, self.high, 10)]
        points = max(2, round(_POINTS * float(np.log10(self.high / self.low))) + 1)
        return [float(rate) for rate in np.geomspace(self.low, self.high, points)]


@dataclass(frozen=True)
class Swept:
    """One policy: at each rate how many times its undisturbed time the program takes, None where it hangs.

    `tips` is the rate from which on it hangs (None: at none that was tried); `limit` is the arithmetic: SMIs a second
    at which each leaves no time until the next, `refill` ns to fault everything in again and `smi` ns of its own.
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
    """Parse --sweep: `smi-rate=10:10000:log`, or `:lin`."""
    match = re.fullmatch(r"smi-rate=(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)(?::(log|lin))?", text)
    if match is None or not 0 < float(match[1]) <= float(match[2]):
        raise Problem(f"--sweep {text}: write it like smi-rate=10:10000:log")
    return Sweep(float(match[1]), float(match[2]), match[3] != "lin")


class SmiProgram:
    """One VM's program without its SMIs, and an SMI of each vCPU that had one; by the recorded kernel's triggers."""

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
            specialized = Specialization(capabilities.kernel, Case(), capabilities.ad_disabled, self.recorded)
            for part in spool:
                parts.append(_shifted(specialized.timed(part, measured.began), len(self._ranges.rows)))
                self._ranges.rows += part.ranges.rows
        whole = joined([*parts, tail(*specialized.rest(inputs.rest))])
        self._smis = [self._last_smi(whole, vcpu) for vcpu in range(self.recorded)]
        if all(smi is None for smi in self._smis):
            raise UnansweredVm("it has no whole SMI to repeat: record one, or make a trace with kvmtrace synth")
        self._program = take(whole, np.flatnonzero(whole.queue < self.recorded))
        # The exit of the VM's process, which empties every root, is to be like any other moment.
        ends = self._program.block.op & 15 == Op.ZAP_ALL
        self._program.block.op[ends] = int(Op.ROLE) | self._program.queue[ends].astype(np.uint32) << VCPU_SHIFT
        self._program.block.gfn[ends] = 0
        self._words = specialized.words
        self._costs: Costs = replace(measured.fitted.costs, refill=round(1000 * change.working_set))

    def sweep(self, parameters: PolicyParameters, rates: Iterable[float]) -> Swept:
        """A policy at each rate, and where it tips."""
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
        """ns to fault in again all that is mapped at the end, where a policy's root does not outlive the SMI."""
        if parameters.own_reference or parameters.mmu == "shadow" or self.vcpus > 1:
            return 0
        counters, costs = engine.counters, self._costs
        leaves = int(engine.vcpus.faults.sum()) + counters.prefetched - counters.zapped
        tables = counters.tables - counters.tables_freed
        refill = leaves * (costs.fault + costs.switch) + tables * costs.table
        return refill * costs.refill // 1000 + costs.created

    def _factor(self, parameters: PolicyParameters, rate: float, alone: int) -> float | None:
        """How many times its undisturbed time the program takes; None: it does not get on.

        What is left of the program after these SMIs passes undisturbed: from that, and from what is left after twice
        as many, follow the speed and the end.
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
        """(ns of the slowest vCPU, the engine at the end)."""
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
        return replace(many, until=0)  # to be done while the program runs, not before it

    def _last_smi(self, whole: Timed, vcpu: int) -> Timed | None:
        """A vCPU's last whole SMI."""
        mine = np.flatnonzero(whole.queue == self.recorded + vcpu)
        ends = np.flatnonzero(whole.wall[mine] == LAST)
        starts = np.flatnonzero(whole.wall[mine] >= 0)
        if not len(ends):
            return None
        start = starts[np.searchsorted(starts, ends[-1]) - 1]
        return take(whole, mine[start : ends[-1] + 1])


def _entry(vcpu: int) -> Timed:
    """A vCPU that enters the guest once and stays there."""
    none = np.zeros(1, np.int64)
    block = Block(np.array([int(Op.ENTER) | vcpu << VCPU_SHIFT], np.uint32), none, none, none)
    return Timed(block, np.array([vcpu], np.int32), none, none, none, none, none.astype(np.uint8), none + MORE, until=0)


def _shifted(timed: Timed, by: int) -> Timed:
    """With ranges numbered from `by` on."""
    timed.block.gfn[np.isin(timed.block.op & 15, (int(Op.ZAP), int(Op.SPLIT)))] += by
    return timed


def swept(
    capabilities: Capabilities, policies: Iterable[PolicyParameters], sweep: Sweep, change: SmiChange
) -> tuple[dict[int, list[Swept]], list[OwnPolicyCheck], dict[int, str]]:
    """By VM, each policy at each rate; whether their own policy is what their rows show; of others why no answer."""
    chosen = list(policies)
    checks = []

    def ask(vm: Mapping[str, Any]) -> list[Swept]:
        program = SmiProgram(capabilities, vm, change)
        checks.append(program.check)
        return [program.sweep(parameters, sweep.rates) for parameters in chosen]

    answers, unanswered = ask_each_vm(capabilities, ask)
    return answers, checks, unanswered
