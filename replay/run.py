# SPDX-License-Identifier: Apache-2.0
"""Replay a trace under every policy of a plan, while decoding the trace only once.

The rows of each VM go through the decoder in batches, and each batch's inputs are counted under all policies before the
next batch is read. If times are wanted, the inputs are also kept until the costs are measured, because the virtual
clock needs the costs. VMs do not depend on each other and run on all CPUs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from replay import own_policy
from replay.counted import CountedRun, Outcome
from replay.decode.capabilities import Capabilities
from replay.decode.cases import Case
from replay.decode.inputs import Inputs
from replay.decode.row_counts import RowCounts
from replay.decode.specialize import Specialization
from replay.decode.vm_inputs import RowReader, VmInputs, parts_of, vcpu_ids
from replay.own_policy import OwnPolicyCheck, compare
from replay.plan import Plan, Run, Target
from replay.result import ResultWriter, VmWriter
from replay.simulate.operations import Block
from replay.spool import Spool
from replay.spread import spreads
from replay.timing import time_rows
from replay.timing.measuring.measure import Measurement, SpanTimes
from replay.timing.timed_run import PolicyClock, Settings, VmTime, vm_time
from traces.command_line.progress import Progress
from traces.kernels.triggers import Trigger

_FLIPS: Final = (Trigger.CR0_WP, Trigger.CR0_SILENT, Trigger.EFER)  # they change role bits that kernels up to 5.18 have
PROMISED: Final = 6  # the most roots that a VM can have under `preserve`, according to that policy's commit message


@dataclass
class Replayed:
    """The outcomes of all VMs and policies of a plan, with their times if
    they were wanted, and notes taken on the way.
    """

    plan: Plan
    outcomes: list[Outcome]
    times: list[VmTime]
    notes: Counter[str]
    missing: list[str]
    broken: list[str] = field(default_factory=list)  # lines about policies that have more role words than promised
    checks: list[OwnPolicyCheck] = field(default_factory=list)  # by VM: the own policy's replay compared with its rows


def replay(
    plan: Plan,
    settings: Settings | None = None,
    writer: ResultWriter | None = None,
    beside: RowReader | None = None,
    only: int | None = None,
) -> Replayed:
    """Replay the VMs of a plan's trace; with `settings`, in virtual time as well.

    `writer` gets the result's rows; the caller closes it. `beside` is also given the rows of every VM that has a vCPU.
    If `only` is given, no other VM is replayed.
    """
    capabilities = plan.capabilities
    vms = [
        vm
        for vm in capabilities.trace.metadata.vms
        if any(True for _ in vm["vcpus"]) and (only is None or vm["id"] == only)
    ]
    done = Replayed(plan, [], [], Counter(), list(capabilities.missing))
    progress = Progress("replaying", capabilities.trace.metadata.events)
    workers = min(os.cpu_count() or 1, len(vms))

    def one(vm: Mapping[str, Any]) -> _Vm:
        own = capabilities.reopened() if workers > 1 else capabilities
        into = None if writer is None else writer.of_vm(int(vm["id"]), held=workers > 1)
        return _Vm(plan, own, vm, settings, into, progress, beside).run()

    with progress, ThreadPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        for vm, found in zip(vms, pool.map(one, vms) if pool else map(one, vms), strict=True):
            if found.writer is not None:
                found.writer.release()
            done.outcomes += found.outcomes
            done.checks.append(found.check)
            done.times += found.times
            done.notes.update(found.notes)
            done.missing += capabilities.of_vm(vm)
    done.missing += _nested(done.notes)
    done.broken += _broken(done.outcomes)
    return done


def replay_into(
    plan: Plan,
    path: Path,
    settings: Settings | None,
    inputs: Sequence[Path] = (),
    *,
    force: bool = False,
    beside: RowReader | None = None,
) -> Replayed:
    """Replay a plan and write the result to `path`.

    `inputs` and `force` are passed to `ResultWriter`, `beside` to `replay`. Raises Problem if `path` must not be
    written.
    """
    from replay.timing import time_text

    with ResultWriter(path, [target.name for target in plan.targets], inputs, force=force) as writer:
        replayed = replay(plan, settings, writer, beside)
        times = time_text.to_dict(replayed.times, settings) if settings is not None else None
        writer.close({**document(replayed), "time": times})
    return replayed


class _Vm:
    """The replay of one VM."""

    def __init__(
        self,
        plan: Plan,
        capabilities: Capabilities,
        vm: Mapping[str, Any],
        settings: Settings | None,
        writer: VmWriter | None,
        progress: Progress,
        beside: RowReader | None,
    ) -> None:
        self._plan, self._capabilities, self._settings, self._progress = plan, capabilities, settings, progress
        self.writer = writer
        groups = any(target.parameters.prefetch > 1 for target in plan.targets)
        parts = parts_of(capabilities.trace, vm, settings.parts) if settings is not None and settings.parts else None
        times = SpanTimes(capabilities, vm, parts) if settings is not None else None
        self._rows = RowCounts(capabilities, len(vcpu_ids(vm)))
        self._inputs = VmInputs(capabilities, vm, groups=groups, times=times, row_counts=self._rows, beside=beside)
        self._vm, self._times = vm, times
        self.check: OwnPolicyCheck
        self.outcomes: list[Outcome] = []
        self.times: list[VmTime] = []
        self.notes: Counter[str] = Counter()  # how often decoding had to infer something, or could not determine it

    def run(self) -> _Vm:
        """Replay the VM and return it with its outcomes.

        Inputs and measurements are dropped, since a finished VM may wait for the VMs before it.
        """
        self._replay(self._inputs)
        self.notes = self._inputs.notes
        for outcome in self.outcomes:
            exact = outcome.target.recorded and outcome.run.bound == "exact"
            ended = self._inputs.decoder.ended
            outcome.spreads = spreads(self._capabilities, self.notes, self.check, exact=exact, ended=ended)
        del self._inputs, self._times
        return self

    def _replay(self, inputs: VmInputs) -> None:
        if self._settings is None or self._times is None:
            counting, own = self._counting(self._specialized())
            kernels = dict.fromkeys(each.specialized for each in [*counting, own])
            for part in inputs:
                self._count(counting, own, part, {kernel: kernel.block(part) for kernel in kernels})
            self._compare(own)
            self.outcomes = [each.finish(self.writer) for each in counting]
            return
        measurement = Measurement(self._capabilities, inputs, self._times)
        counting, own = self._counting(self._specialized(measurement.own))
        kernels = dict.fromkeys([measurement.own, *(each.specialized for each in [*counting, own])])
        clocked = dict.fromkeys(each.specialized for each in counting if each.outcome.target.policy is None)
        with ExitStack() as stack:
            spools = {kernel: stack.enter_context(Spool()) for kernel in clocked}
            for part in inputs:
                timed = {
                    kernel: measurement.take(part) if kernel is measurement.own else kernel.timed(part)
                    for kernel in kernels
                }
                self._count(counting, own, part, {kernel: each.block for kernel, each in timed.items()})
                for kernel, spool in spools.items():
                    spool.append(timed[kernel], part.ranges)
            self._compare(own)
            assert own.outcome.vcpus is not None
            measured = measurement.result(own.outcome.vcpus.faults, own.outcome.freed_tables)
            clocks: dict[int, PolicyClock] = {}
            if not measured.refused:
                for number, each in enumerate(counting):
                    target, run = each.outcome.target, each.outcome.run
                    if target.policy is None:
                        clocks[number] = PolicyClock(target, run, each.specialized, len(inputs.vcpus), measured)
                began = measured.began if self._settings.smis_open(measured) else -1
                for kernel, spool in spools.items():
                    rest = measured.rest if kernel is measurement.own else kernel.rest(inputs.rest)
                    mine = [clock for clock in clocks.values() if clock.specialized is kernel]
                    PolicyClock.run_all(mine, spool, rest, began)
        timed_runs = {number: clock.outcome(inputs.vcpus, self._settings) for number, clock in clocks.items()}
        time = vm_time(self._vm, inputs.vcpus, self._capabilities, measured, list(timed_runs.values()), self._settings)
        self.times = [time]
        for number, each in enumerate(counting):
            columns = None
            if self.writer is not None and number in timed_runs:
                columns = time_rows.write(self.writer, each.number, timed_runs[number], time.recorded)
            self.outcomes.append(each.finish(self.writer, columns))

    def _counting(self, specialized: Mapping[tuple[str, Case], Specialization]) -> tuple[list[CountedRun], CountedRun]:
        """Return the runs of the plan, and the run of the recorded policy, which says what the recorded kernel did.

        The latter is one of the former unless the plan does not contain the recorded policy.
        """
        counting = [
            CountedRun(
                number, target, run, self._inputs.id, self._inputs.vcpus, specialized[target.kernel.name, run.case]
            )
            for number, target in enumerate(self._plan.targets)
            for run in target.runs
        ]
        for each in counting:
            if each.outcome.target.recorded:
                return counting, each
        kernel, own = self._capabilities.kernel, self._capabilities.own
        target = Target(own.name, kernel, own, None, True, (), (Run("exact", False, Case()),))
        of_own = specialized[kernel.name, Case()]
        return counting, CountedRun(-1, target, target.runs[0], self._inputs.id, self._inputs.vcpus, of_own)

    def _compare(self, own: CountedRun) -> None:
        """Compare the recorded policy's run with the rows, after all rows were taken in."""
        own.finish(None)
        self.check = compare(self._capabilities, self._vm, self._inputs, self._rows, own.simulator)

    def _specialized(self, own: Specialization | None = None) -> dict[tuple[str, Case], Specialization]:
        """Return one specialization for each pair of kernel and case in the plan, and that of the recorded kernel.

        The latter is `own` if that is given.
        """
        recorded, vcpus = self._capabilities.kernel, len(self._inputs.vcpus)
        pairs = [(target.kernel, run.case) for target in self._plan.targets for run in target.runs]
        found = {} if own is None else {(recorded.name, Case()): own}
        for kernel, case in [(recorded, Case()), *pairs]:
            if (kernel.name, case) not in found:
                found[kernel.name, case] = Specialization(kernel, case, self._capabilities.ad_disabled, vcpus)
        return found

    def _count(
        self, counting: list[CountedRun], own: CountedRun, part: Inputs, blocks: Mapping[Specialization, Block]
    ) -> None:
        """Count one part of the inputs under every policy; `blocks` has the part's operations for each kernel."""
        for each in counting if own in counting else [*counting, own]:
            each.feed(blocks[each.specialized], part.ranges, self.writer if each.number >= 0 else None)
        self._progress.at(int(part.seq[-1]))


def _nested(notes: Mapping[str, int]) -> Iterator[str]:
    if entries := notes.get("nested entries", 0):
        yield f"{entries:,} entries of nested guests: their own roots (guest_mmu) are not replayed"


def _broken(outcomes: list[Outcome]) -> Iterator[str]:
    for outcome in outcomes:
        parameters = outcome.target.parameters
        promises = parameters.own_reference and parameters.mmu == "tdp" and not outcome.target.kernel.layout.guest_bits
        if promises and len(outcome.roles) > PROMISED:
            words = ", ".join(f"{word:#x}" for word in sorted(outcome.roles))
            what = f"{len(outcome.roles)} role words where {PROMISED} are promised"
            yield f"VM {outcome.vm}, {outcome.target.name}: {what}: {words}"


def left_open(replayed: Replayed, target: Target) -> list[str]:
    """Return what this trace does not determine of a policy's outcome, as one line for each reason."""
    writes = sum(replayed.notes.get(f"trigger {trigger.name}", 0) for trigger in target.writes)
    why = f"{writes:,} writes of CR0 or CR4 have no value: whether they unload is not in the trace"
    lines = [*target.open, *([why] if writes else [])]
    flips = any(replayed.notes.get(f"trigger {trigger.name}") for trigger in _FLIPS)
    if flips and target.merged and any(len(outcome.vcpu_ids) > 1 for outcome in replayed.outcomes):
        lines.append("vCPUs whose CR0.WP or EFER.NX differ share roots at the upper end: it may be more")
    return lines


def document(replayed: Replayed) -> dict[str, Any]:
    """Return the metadata of a result file."""
    plan = replayed.plan
    meta = plan.capabilities.trace.metadata
    return {
        "trace": {
            "path": str(plan.capabilities.trace.path), "events": plan.capabilities.trace.rows, "kernel": meta.kernel,
            "policy": meta.policy,
        },
        "policies": [
            {
                "name": target.name,
                "kernel": target.kernel.name,
                "recorded": target.recorded,
                "own": target.policy is not None,
                "parameters": vars(target.parameters),
                "bounds": [run.bound for run in target.runs],
                "at_least": target.at_least,
                "open": left_open(replayed, target),
                "assumes": target.assumes,
            }
            for target in plan.targets
        ],
        "refault": plan.refault.text,
        "complete": not replayed.missing,
        "missing": replayed.missing,
        "broken": replayed.broken,
        "own_policy": own_policy.to_dict(replayed.checks),
        "notes": {name: count for name, count in sorted(replayed.notes.items()) if count},
    }  # fmt: skip
