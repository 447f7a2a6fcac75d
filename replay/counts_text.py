# SPDX-License-Identifier: Apache-2.0
"""The output of `kvmtrace replay`: one table of counts for all VMs, or a JSON document with the same counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from replay import bounds, own_policy, worst_off
from replay.counted import VM_END, WITHIN, Outcome
from replay.own_policy import Agreement, OwnPolicyCheck
from replay.plan import Target
from replay.result import OF_VCPU
from replay.run import Replayed, document, left_open
from traces import source_notes
from traces.command_line.layout import TextColumn
from traces.command_line.screen import VMS_SHOWN, Page
from traces.vm_names import VmNames

# Counts, their column titles, and their levels: on a narrow screen the columns of the highest level are left out first.
_COUNTS: Final = (
    ("creations", "roots", 0),
    ("reuses", "reused", 3),
    ("frees", "freed", 2),
    ("faults", "faults", 0),
    ("refaults", "re-faults", 0),
    ("hits", "hits", 3),
    ("tables_built", "tables", 1),
    ("zapped", "SPTEs zapped", 3),
    ("flushes", "flushes", 3),
    ("roots_peak", "roots alive", 3),
    ("tables_peak", "tables alive", 3),
)


def to_dict(replayed: Replayed, share: float = 0.0) -> dict[str, Any]:
    """Return the document that `--json` prints.

    A count is a number, or [low, high] where the trace does not determine it.
    """
    plan = replayed.plan
    return {
        **document(replayed),
        "vms": [
            {
                "vm": vm,
                "policies": [
                    {"policy": target.name, **_of_policy(of_target, replayed, share)}
                    for target in plan.targets
                    if (of_target := _of(replayed, target, vm))
                ],
            }
            for vm in _vms(replayed)
        ],
    }


def _of_policy(outcomes: list[Outcome], replayed: Replayed, share: float) -> dict[str, Any]:
    counts = bounds.counts(outcomes, replayed.plan.refault, share)
    ends = {"low": outcomes[0], "high": outcomes[-1]}
    unseen = {VM_END: 0} if VM_END in outcomes[0].spreads else {}
    return {
        **{name: count.value for name, count in counts.items()},
        # Without an upper bound, the count of a single cause may also be less than in this run, so none is given: a
        # root that one cause frees earlier is not there for another cause to free.
        "frees_by_cause": {}
        if outcomes[0].target.at_least
        else _merged(outcomes[0], *({**unseen, **end.frees} for end in ends.values())),
        "roots_by_role": {}
        if replayed.plan.capabilities.open_roles
        else _merged(outcomes[0], *({f"{word:#x}": n for word, n in end.roles.items()} for end in ends.values())),
        "vcpus": [_of_vcpu(outcomes, index, vcpu) for index, vcpu in enumerate(outcomes[0].vcpu_ids)],
    }


def _of_vcpu(outcomes: list[Outcome], index: int, vcpu: int) -> dict[str, Any]:
    row: dict[str, Any] = {"vcpu": vcpu}
    for name in OF_VCPU:
        low, high = (int(getattr(outcome.vcpus, name)[index]) for outcome in (outcomes[0], outcomes[-1]))
        row[name] = bounds.interval(low, high, outcomes[0], outcomes[0].spreads.get(name, WITHIN)).value
    row["stuck_at"] = outcomes[-1].stuck[index]
    return row


def _merged(of: Outcome, low: Any, high: Any) -> dict[str, Any]:
    names = sorted({*low, *high})
    return {
        name: bounds.interval(low.get(name, 0), high.get(name, 0), of, of.spreads.get(name, WITHIN)).value
        for name in names
    }


def _vms(replayed: Replayed) -> list[int]:
    return list(dict.fromkeys(outcome.vm for outcome in replayed.outcomes))


def _of(replayed: Replayed, target: Target, vm: int) -> list[Outcome]:
    return [outcome for outcome in replayed.outcomes if outcome.target is target and outcome.vm == vm]


def render(replayed: Replayed, share: float = 0.0) -> str:
    """Return the counts as text: a table that shows the VMs that are worst off, and the remarks below it."""
    page = Page()
    trace = replayed.plan.capabilities.trace
    meta = trace.metadata
    page.say(f"{trace.path}: kernel {meta.kernel}, {meta.policy} roots, by {meta.policy_by}")
    _say_untrusted(page, replayed.checks)
    vms = worst_off.vms(worst_off.ranked(replayed))
    if len(vms) > 1:
        page.say("VMs, the worst first:")
    if vms:
        page.table(_columns(vms), list(_rows(replayed, vms[:VMS_SHOWN], share)))
    page.more(len(vms) - VMS_SHOWN, "VMs, none worse off")
    _say_remarks(page, replayed)
    return page.text


def untrusted(checks: Sequence[OwnPolicyCheck]) -> str:
    """Return the warning to print before answers if the replay contradicts the recorded rows; empty if it does not."""
    page = Page()
    _say_untrusted(page, checks)
    return page.text


def _say_untrusted(page: Page, checks: Sequence[OwnPolicyCheck]) -> None:
    lines = own_policy.untrusted(checks)
    for line in lines[:VMS_SHOWN]:
        page.say(line, "bold red")
    page.more(len(lines) - VMS_SHOWN, "such VMs")


def _columns(vms: Sequence[int]) -> list[TextColumn]:
    first = TextColumn("VM", level=0 if len(vms) > 1 else 1)
    names = [TextColumn("process", right=False, level=1), TextColumn("policy", right=False)]
    counts = (TextColumn(title, level=level) for _, title, level in _COUNTS)
    return [first, *names, *counts, TextColumn("freed by", right=False, level=2)]


def _rows(replayed: Replayed, vms: Sequence[int], share: float) -> Iterator[list[str]]:
    names = VmNames(replayed.plan.capabilities.trace.metadata)
    for vm in vms:
        for target in replayed.plan.targets:
            outcomes = _of(replayed, target, vm)
            counts = bounds.counts(outcomes, replayed.plan.refault, share)
            name = target.name + (" (recorded)" if target.recorded else "")
            causes = [] if target.at_least else outcomes[-1].frees.most_common(3)
            why = ", ".join(f"{cause} {number:,}" for cause, number in causes)
            yield [str(vm), names.process(vm), name, *(counts[column].text for column, _, _ in _COUNTS), why]


def _say_remarks(page: Page, replayed: Replayed) -> None:
    plan = replayed.plan
    for target in plan.targets:
        for why in left_open(replayed, target):
            page.say(f"{target.name}: {why} ({bounds.bounds_text(plan.refault.text, at_least=target.at_least)})")
        if target.assumes:
            page.say(f"{target.name}: {target.assumes}")
        ended = {
            f"{target.name}: VM {outcome.vm}, vCPU {vcpu} makes no progress from row {seq:,} on": None
            for outcome in replayed.outcomes
            if outcome.target is target
            for vcpu, seq in zip(outcome.vcpu_ids, outcome.stuck, strict=True)
            if seq is not None
        }
        for line in list(ended)[:VMS_SHOWN]:
            page.say(line)
        page.more(len(ended) - VMS_SHOWN, "such vCPUs")
    if inferred := replayed.notes.get("inferred removals"):
        page.say(f"{inferred:,} removals by the host are inferred: this kernel has no event for them")
    for line in _compared(replayed):
        page.say(line)
    source = source_notes.notes(plan.capabilities.trace.metadata.raw)
    missing = [line for line in replayed.missing if line not in source]
    for line in source:
        page.say(f"source: {line}")
    for what, lines in (("incomplete", missing), ("broken", replayed.broken)):
        for line in lines[:VMS_SHOWN]:
            page.say(f"{what}: {line}", "bold red")
        page.more(len(lines) - VMS_SHOWN, "such lines")


def _compared(replayed: Replayed) -> list[str]:
    """Say in how many VMs the replay under the recorded policy equals the rows, and why other VMs were not compared."""
    agree = sum(check.agreement is Agreement.AGREES for check in replayed.checks)
    lines = [f"own policy's replay: equals the rows in {agree:,} of {len(replayed.checks):,} VMs"]
    unseen = list(dict.fromkeys(name for check in replayed.checks for name, _ in check.unseen))
    if unseen:
        lines[0] += f" (not observable: {', '.join(unseen)})"
    open_ = [check.text for check in replayed.checks if check.agreement is Agreement.OPEN]
    more = [f"... {len(open_) - VMS_SHOWN} more VMs not compared: --json has them"] if len(open_) > VMS_SHOWN else []
    return [*lines, *open_[:VMS_SHOWN], *more]
