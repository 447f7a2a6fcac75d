"""Replays a trace under every policy of a plan, decoding it once: each batch goes to all of them before the next."""

from __future__ import annotations

import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay import roles
from replay.causes import Trigger
from replay.decode.capabilities import Evidence
from replay.decode.decoder import VmStimuli
from replay.plan import Plan, Run, Target
from replay.result import Writer, vm_counts
from replay.simulate.engine import Engine, RootLog, Vcpus
from replay.simulate.operations import Block, Cause, Op, Ranges
from replay.simulate.reference import Counters, Happened, Violation
from replay.simulate.simulator import Machine, Reference
from replay.simulate.specialize import Case, Lowering
from traces.errors import VERDICT_FAILED, Problem

_FLIPS: Final = (Trigger.CR0_WP, Trigger.CR0_SILENT, Trigger.EFER)  # of bits that old kernels have in role words
_HISTORY: Final = 6  # rows of a root's life that a violation shows
_LIVES: Final = 1 << 12  # roots of which they are kept
PROMISED: Final = 6  # roots that a VM can have under `preserve`, by its commit's text


@dataclass
class Outcome:
    """One VM under one run of one policy."""

    target: Target
    run: Run
    vm: int
    vcpu_ids: list[int]
    vcpus: Vcpus | None = None
    counters: Counters = field(default_factory=Counters)
    frees: Counter[str] = field(default_factory=Counter)  # by cause
    roles: Counter[int] = field(default_factory=Counter)  # roots created, by role word
    roots_peak: int = 0
    tables_peak: int = 0  # as seen where roots come and go, and at the end of each batch
    revived: list[NDArray[np.int64]] = field(default_factory=list)  # leaves that each new root had at once
    stuck: list[int | None] = field(default_factory=list)  # by vCPU: the trace's row at which it came to a stop

    def counts(self) -> dict[str, int]:
        """Everything that is counted, of the VM as a whole."""
        assert self.vcpus is not None
        sums = {name: int(values.sum()) for name, values in vars(self.vcpus).items() if name != "stuck"}
        return {**sums, **vm_counts(self.counters), "roots_peak": self.roots_peak, "tables_peak": self.tables_peak}


@dataclass
class Replayed:
    """All of a plan's outcomes, and what was noted on the way."""

    plan: Plan
    outcomes: list[Outcome]
    notes: Counter[str]
    missing: list[str]
    broken: list[str]  # promises of a policy that its outcome does not keep


class _Running:
    """A VM under one run, while it is replayed."""

    def __init__(self, number: int, target: Target, run: Run, stimuli: VmStimuli, lowering: Lowering) -> None:
        vcpus = len(stimuli.vcpus)
        self.number = number
        self.lowering = lowering
        self.outcome = Outcome(target, run, stimuli.id, stimuli.vcpus, stuck=[None] * vcpus)
        self.machine: Machine
        if target.policy is not None:
            self.machine = Reference(target.policy(), run.revive, lowering.words, vcpus)
        else:
            self.machine = Engine(replace(target.axes, revive=run.revive), lowering.words, vcpus)
        self._done = 0
        # What happened to each root last, in words, the latest root last: users' own policies may break invariants.
        self._lives: OrderedDict[int, list[str]] | None = OrderedDict() if target.policy is not None else None

    def feed(self, block: Block, ranges: Ranges, writer: Writer | None) -> None:
        """Do a block; the memory that tables take is looked at before they all go."""
        first = self._done
        ends = np.flatnonzero((block.op & 15 == Op.ZAP_ALL) | (block.op & 15 == Op.END))
        start = 0
        for end in [*ends.tolist(), len(block)]:
            part = slice(start, end)
            try:
                self.machine.feed(
                    Block(block.op[part], block.gfn[part], block.time[part], block.seq[part]), ranges, first + start
                )
            except Violation as violation:
                raise self._broken(violation, block, first) from None
            counters = self.machine.counters
            self.outcome.tables_peak = max(self.outcome.tables_peak, counters.tables - counters.tables_freed)
            start = end
        self._done += len(block)
        log = self.machine.take_log()
        self._read(log)
        self._remember(log, block, first)
        self._stop(block, first)
        if writer is not None:
            words, ids = self.lowering.words, self.outcome.vcpu_ids
            writer.log(self.number, self.outcome.run.bound, self.outcome.vm, words, ids, log, block, first)

    def _broken(self, violation: Violation, block: Block, first: int) -> Problem:
        """What an invariant's violation looks like to a user: the event, the root, and its history as far as logged."""
        log = self.machine.take_log()
        self._remember(log, block, first)
        told = self._lives.get(violation.root, []) if self._lives and violation.root is not None else []
        if not told:
            rows = np.flatnonzero(log.root == violation.root)
            rows = rows if len(rows) else np.arange(len(log))
            told = [_told(log, i, block, first) for i in rows[-_HISTORY:].tolist()]
        at = violation.at - first
        where = f"row {block.seq[at]:,}, {Op(int(block.op[at]) & 15).name}" if at >= 0 else "an earlier row"
        name, vm = self.outcome.target.name, self.outcome.vm
        history = f"; before: {', '.join(told)}" if told else ""
        return Problem(f"{name}: VM {vm}, {where}: {violation}{history}", VERDICT_FAILED)

    def _remember(self, log: RootLog, block: Block, first: int) -> None:
        lives = self._lives
        if lives is None:
            return
        for i in range(len(log)):
            root = int(log.root[i])
            lives[root] = [*lives.pop(root, []), _told(log, i, block, first)][-_HISTORY:]
        while len(lives) > _LIVES:
            lives.popitem(last=False)

    def _stop(self, block: Block, first: int) -> None:
        for index, at in enumerate(self.machine.vcpus.stuck.tolist()):
            if at >= first:
                self.outcome.stuck[index] = int(block.seq[at - first])

    def _read(self, log: RootLog) -> None:
        if not len(log):
            return
        outcome = self.outcome
        freed = log.event == Happened.FREED
        for cause, count in enumerate(np.bincount(log.cause[freed]).tolist()):
            if count:
                outcome.frees[Cause(cause).name.lower()] += count
        created = log.event == Happened.CREATED
        for word, count in enumerate(np.bincount(log.word[created]).tolist()):
            if count:
                outcome.roles[self.lowering.words[word].word] += count
        outcome.roots_peak = max(outcome.roots_peak, int(log.roots_alive.max()))
        outcome.tables_peak = max(outcome.tables_peak, int((log.tables_alive + np.where(freed, log.tables, 0)).max()))
        if outcome.run.revive:
            outcome.revived.append(log.leaves[created])

    def finish(self, writer: Writer | None) -> Outcome:
        """The outcome."""
        outcome = self.outcome
        outcome.vcpus, outcome.counters = self.machine.vcpus, self.machine.counters
        if writer is not None:
            peaks = {"roots_peak": outcome.roots_peak, "tables_peak": outcome.tables_peak}
            whole = {**vm_counts(outcome.counters), **peaks}
            writer.counts(
                self.number, outcome.run.bound, outcome.vm, outcome.vcpu_ids, outcome.vcpus, whole, outcome.stuck
            )
        return outcome


def replay(plan: Plan, writer: Writer | None = None) -> Replayed:
    """Run a plan. With a writer the root logs go to it as they come; it is for the caller to close."""
    evidence = plan.evidence
    ad_disabled = has_ad_disabled(evidence)
    done = Replayed(plan, [], Counter(), list(evidence.missing), [])
    groups = any(target.axes.prefetch > 1 for target in plan.targets)
    progress = Progress(evidence.trace.metadata.events)
    for vm in evidence.trace.metadata.vms:
        stimuli = VmStimuli(evidence, vm, groups=groups)
        if stimuli.vcpus:
            done.outcomes += _replay_vm(plan, stimuli, ad_disabled, writer, progress)
            done.notes.update(stimuli.notes)
            done.missing += evidence.of_vm(vm)
    progress.end()
    done.missing += _nested(done.notes)
    done.broken += _broken(done.outcomes)
    return done


def _replay_vm(
    plan: Plan, stimuli: VmStimuli, ad_disabled: bool, writer: Writer | None, progress: Progress
) -> list[Outcome]:
    lowerings: dict[tuple[str, Case], Lowering] = {}
    running = []
    for number, target in enumerate(plan.targets):
        for run in target.runs:
            key = (target.kernel.name, run.case)
            if key not in lowerings:
                lowerings[key] = Lowering(target.kernel, run.case, ad_disabled)
            running.append(_Running(number, target, run, stimuli, lowerings[key]))
    for stretch in stimuli:
        blocks = {id(lowering): lowering.apply(stretch) for lowering in lowerings.values()}
        for one in running:
            one.feed(blocks[id(one.lowering)], stretch.ranges, writer)
        progress.at(int(stretch.seq[-1]))
    return [one.finish(writer) for one in running]


def has_ad_disabled(evidence: Evidence) -> bool:
    """Whether the recorded module has accessed and dirty bits off: a bit of every root's word."""
    for batch in evidence.trace.batches(["root", "role"], size=1 << 12):
        root, role = (batch.column(name).to_numpy() for name in ("root", "role"))
        found = role[(root > 0) & (role > 0)]
        if len(found):
            return roles.has_ad_disabled(int(found[0]))
    return False


def _nested(notes: Mapping[str, int]) -> Iterator[str]:
    if entries := notes.get("nested entries", 0):
        yield f"{entries:,} entries of nested guests: their own roots (guest_mmu) are not replayed"


def _broken(outcomes: list[Outcome]) -> Iterator[str]:
    for outcome in outcomes:
        axes = outcome.target.axes
        promises = axes.own_reference and axes.mmu == "tdp" and not outcome.target.kernel.layout.guest_bits
        if promises and len(outcome.roles) > PROMISED:
            words = ", ".join(f"{word:#x}" for word in sorted(outcome.roles))
            what = f"{len(outcome.roles)} role words where {PROMISED} are promised"
            yield f"VM {outcome.vm}, {outcome.target.name}: {what}: {words}"


def _told(log: RootLog, i: int, block: Block, first: int) -> str:
    """One row of a root's life in words."""
    what = f"root {log.root[i]} {Happened(int(log.event[i])).name.lower()} ({Cause(int(log.cause[i])).name.lower()})"
    return f"{what} at row {block.seq[log.at[i] - first]:,}" if log.at[i] >= first else what


class Progress:
    """On stderr, where that is a terminal and it takes more than a second."""

    def __init__(self, events: int, what: str = "replaying") -> None:
        self._what = what
        self._events = max(events, 1)
        self._shown = False
        self._next = time.monotonic() + 1 if sys.stderr.isatty() else float("inf")

    def at(self, seq: int) -> None:
        """A row has been reached."""
        if time.monotonic() >= self._next:
            self._shown, self._next = True, time.monotonic() + 0.2
            print(f"\r{self._what}: {min(seq / self._events, 1):4.0%}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take the line away."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def left_open(replayed: Replayed, target: Target) -> list[str]:
    """What this trace leaves open of a policy's outcome, one line each."""
    writes = sum(replayed.notes.get(f"trigger {trigger.name}", 0) for trigger in target.writes)
    why = f"{writes:,} writes of CR0 or CR4 have no value: whether they unload is not in the trace"
    lines = [*target.open, *([why] if writes else [])]
    flips = any(replayed.notes.get(f"trigger {trigger.name}") for trigger in _FLIPS)
    if flips and target.merged and any(len(outcome.vcpu_ids) > 1 for outcome in replayed.outcomes):
        lines.append("vCPUs whose CR0.WP or EFER.NX differ share roots at the upper end: it may be more")
    return lines


def document(replayed: Replayed) -> dict[str, Any]:
    """What a result file says of itself."""
    plan = replayed.plan
    meta = plan.evidence.trace.metadata
    return {
        "trace": {
            "path": str(plan.evidence.trace.path), "events": meta.events, "kernel": meta.kernel, "policy": meta.policy
        },
        "policies": [
            {
                "name": target.name,
                "kernel": target.kernel.name,
                "recorded": target.recorded,
                "own": target.policy is not None,
                "axes": vars(target.axes),
                "bounds": [run.bound for run in target.runs],
                "open": left_open(replayed, target),
                "assumes": target.assumes,
            }
            for target in plan.targets
        ],
        "refault": plan.refault.text,
        "complete": not replayed.missing,
        "missing": replayed.missing,
        "broken": replayed.broken,
        "notes": {name: count for name, count in sorted(replayed.notes.items()) if count},
    }  # fmt: skip
