"""What `kvmtrace replay` prints: one table a VM, or the same as a JSON document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from replay import bounds, own_policy
from replay.bounds import Count
from replay.counted import Outcome
from replay.own_policy import Agreement, OwnPolicyCheck
from replay.plan import Target
from replay.result import OF_VCPU
from replay.run import Replayed, document, left_open
from traces.screen import VMS_SHOWN, page, text_of
from traces.text import printable

_COLUMNS: Final = (
    ("creations", "roots"),
    ("reuses", "reused"),
    ("frees", "freed"),
    ("faults", "faults"),
    ("refaults", "re-faults"),
    ("hits", "hits"),
    ("tables_built", "tables"),
    ("zapped", "SPTEs zapped"),
    ("flushes", "flushes"),
    ("roots_peak", "roots alive"),
    ("tables_peak", "tables alive"),
)


def to_dict(replayed: Replayed, share: float = 0.0) -> dict[str, Any]:
    """The document of `--json`. A count is a number, or [low, high] where the trace leaves it open."""
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
    return {
        **{name: count.value for name, count in counts.items()},
        "frees_by_cause": _merged(ends["low"].frees, ends["high"].frees),
        "roots_by_role": _merged(*({f"{word:#x}": n for word, n in end.roles.items()} for end in ends.values())),
        "vcpus": [_of_vcpu(outcomes, index, vcpu) for index, vcpu in enumerate(outcomes[0].vcpu_ids)],
    }


def _of_vcpu(outcomes: list[Outcome], index: int, vcpu: int) -> dict[str, Any]:
    row: dict[str, Any] = {"vcpu": vcpu}
    for name in OF_VCPU:
        ends = [int(getattr(outcome.vcpus, name)[index]) for outcome in (outcomes[0], outcomes[-1])]
        row[name] = Count(min(ends), max(ends)).value
    row["stuck_at"] = outcomes[-1].stuck[index]
    return row


def _merged(low: Any, high: Any) -> dict[str, int | list[int]]:
    names = sorted({*low, *high})
    return {name: Count(*sorted((low.get(name, 0), high.get(name, 0)))).value for name in names}


def _vms(replayed: Replayed) -> list[int]:
    return list(dict.fromkeys(outcome.vm for outcome in replayed.outcomes))


def _of(replayed: Replayed, target: Target, vm: int) -> list[Outcome]:
    return [outcome for outcome in replayed.outcomes if outcome.target is target and outcome.vm == vm]


def render(replayed: Replayed, share: float = 0.0) -> str:
    """The same for people; plain text where standard output is no terminal."""
    console = page()
    plan = replayed.plan
    meta = plan.capabilities.trace.metadata
    console.print(
        Text(
            printable(f"{plan.capabilities.trace.path}: kernel {meta.kernel}, {meta.policy} roots, by {meta.policy_by}")
        )
    )
    _say_untrusted(console, replayed.checks)
    vms = _vms(replayed)
    for vm in vms[:VMS_SHOWN]:
        console.print(_table(replayed, vm, share))
    if len(vms) > VMS_SHOWN:
        console.print(Text(f"{len(vms) - VMS_SHOWN} VMs more: see --json, or -o"))
    for line in _remarks(replayed):
        console.print(line, soft_wrap=True)
    return text_of(console)


def untrusted(checks: Sequence[OwnPolicyCheck]) -> str:
    """What is to be said before answers that rest on a replay which the rows contradict; empty where none does."""
    console = page()
    _say_untrusted(console, checks)
    return text_of(console)


def _say_untrusted(console: Console, checks: Sequence[OwnPolicyCheck]) -> None:
    for line in own_policy.untrusted(checks)[:VMS_SHOWN]:
        console.print(Text(printable(line), style="bold red"), soft_wrap=True)


def _table(replayed: Replayed, vm: int, share: float) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title_justify="left")
    table.add_column(f"VM {vm}")
    for _, title in _COLUMNS:
        table.add_column(title, justify="right")
    table.add_column("freed by")
    for target in replayed.plan.targets:
        outcomes = _of(replayed, target, vm)
        counts = bounds.counts(outcomes, replayed.plan.refault, share)
        name = target.name + (" (recorded)" if target.recorded else "")
        frees: Counter[str] = outcomes[-1].frees
        why = ", ".join(f"{cause} {count:,}" for cause, count in frees.most_common(3))
        table.add_row(Text(printable(name)), *(counts[column].text for column, _ in _COLUMNS), why)
    return table


def _remarks(replayed: Replayed) -> list[Text]:
    plan = replayed.plan
    lines: list[Text] = []
    for target in plan.targets:
        for why in left_open(replayed, target):
            given = f"assumed: --refault {plan.refault.text}" if plan.refault.name else "least .. most"
            lines.append(Text(f"{printable(target.name)}: {why} ({given})"))
        if target.assumes:
            lines.append(Text(f"{printable(target.name)}: {target.assumes}"))
        for outcome in replayed.outcomes:
            for index, seq in enumerate(outcome.stuck):
                if outcome.target is target and seq is not None:
                    where = f"VM {outcome.vm}, vCPU {outcome.vcpu_ids[index]}"
                    line = f"{printable(target.name)}: {where} makes no progress from row {seq:,} on"
                    lines += [] if any(line == each.plain for each in lines) else [Text(line)]
    if inferred := replayed.notes.get("inferred removals"):
        lines.append(Text(f"{inferred:,} removals by the host are inferred: this kernel has no event for them"))
    lines += [Text(printable(line)) for line in _compared(replayed)]
    lines += [Text(f"incomplete: {printable(line)}", style="bold red") for line in replayed.missing]
    lines += [Text(f"broken: {printable(line)}", style="bold red") for line in replayed.broken]
    return lines


def _compared(replayed: Replayed) -> list[str]:
    """How many VMs are what their rows show under the recorded policy, and why it is not said of the others."""
    agree = sum(check.agreement is Agreement.AGREES for check in replayed.checks)
    lines = [f"own policy's replay: equals the rows in {agree:,} of {len(replayed.checks):,} VMs"]
    unseen = list(dict.fromkeys(name for check in replayed.checks for name, _ in check.unseen))
    if unseen:
        lines[0] += f" (not observable: {', '.join(unseen)})"
    open_ = [check.text for check in replayed.checks if check.agreement is Agreement.OPEN]
    more = [f"... {len(open_) - VMS_SHOWN} more VMs not compared: --json has them"] if len(open_) > VMS_SHOWN else []
    return [*lines, *open_[:VMS_SHOWN], *more]
