# SPDX-License-Identifier: Apache-2.0
"""The output of `kvmtrace replay` about time: a sentence with the verdict for each vCPU, then the times behind it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from replay.plan import Plan
from replay.timing.diagnosis import summed_up
from replay.timing.reference_clock import TimeCategory
from replay.timing.soft_hangs import causes
from replay.timing.stalls import watchdogs
from replay.timing.time_rows import named
from replay.timing.timed_run import PolicyTime, Settings, VcpuTime, VmTime
from traces.command_line.durations import duration
from traces.command_line.layout import TextColumn
from traces.command_line.screen import VMS_SHOWN, Page
from traces.text import count, vms_text
from traces.vm_names import VmNames

_VCPUS_SHOWN: Final = 16
_SENTENCES: Final = 8  # the most sentences about vCPUs that made no progress
_STUCK_SHOWN: Final = 4  # the most stuck vCPUs whose rows are shown
# The levels of columns: on a narrow screen the highest level is left out first; all other categories have level 3.
_LEVELS: Final = {TimeCategory.GUEST: 1, TimeCategory.FAULT: 2}
_PRESERVED: Final = ("preserve", "preserve-worker")


def to_dict(times: list[VmTime], settings: Settings) -> dict[str, Any]:
    """Return the part of the JSON document about time; all times are in ns."""
    return {
        "rule": {"share": settings.rule.share, "window": settings.rule.window},
        "vms": [
            {
                "vm": vm.vm,
                "refused": vm.refused,
                "marked": vm.marked,
                "began": vm.measured.began,
                "smis": {"by_guest": vm.measured.by_guest, "by_clock": vm.measured.by_clock, "open": vm.open},
                "costs": {
                    name: {"ns": getattr(vm.fitted.costs, name), "from": source, "error": vm.fitted.error.get(name)}
                    for name, source in vm.fitted.source.items()
                },
                "recorded": [sum(spent) for spent in vm.recorded],
                "recorded_spent": [named(spent) for spent in vm.recorded],
                "stuck": [each.to_dict() for each in vm.stuck],
                "policies": [_policy(outcome) for outcome in vm.outcomes],
            }
            for vm in times
        ],
    }


def render(times: list[VmTime], plan: Plan, order: Sequence[tuple[int, int]]) -> str:
    """Return the times as text, for the vCPUs that are worst off.

    `order` has (VM, dense vCPU number), the worst off first.
    """
    page = Page()
    names = VmNames(plan.capabilities.trace.metadata)
    stuck = [each for vm in times for each in vm.stuck]
    sentences = summed_up(stuck)
    for line in sentences[:_SENTENCES]:
        page.say(line, "bold")
    page.more(len(sentences) - _SENTENCES, "such sentences")
    for each in sorted(stuck, key=lambda each: each.since - each.until)[:_STUCK_SHOWN]:
        if not each.ended:
            page.say(f"what shows that of vCPU {each.vcpu} of VM {each.vm}:")
            for row in each.rows:
                page.say(f"  {row}", indent="    ")
    timed = {vm.vm: vm for vm in times if not vm.refused}
    ranked = [(timed[vm], at) for vm, at in order if vm in timed]
    worst = list(dict.fromkeys(vm.vm for vm, _ in ranked))[:VMS_SHOWN]
    shown = [(vm, at) for vm, at in ranked if vm.vm in worst][:_VCPUS_SHOWN]
    several = len(times) > 1
    for vm, at in shown:
        for sentence in verdicts(vm, [at]):
            page.say(f"{names.vm(vm.vm)}, {sentence}" if several else sentence, "bold")
    if shown:
        page.table(_columns(shown), [row for vm, at in shown for row in _rows(vm, at)])
        page.say("as recorded: guest with switch")
    page.more(len(ranked) - len(shown), "vCPUs, none worse off")
    said: dict[str, list[int]] = {}
    for vm in times:
        if vm.refused:
            said.setdefault(f"no times: {vm.refused}", []).append(vm.vm)
        elif vm.vm in worst:
            for line in _trust(vm, several):
                said.setdefault(line, []).append(vm.vm)
    for line, vms in said.items():
        page.say(f"{vms_text(vms)}: {line}" if several else line)
    own = [target.name for target in plan.targets if target.policy is not None]
    if own:
        page.say(f"{', '.join(own)}: counted only; policies of users are not timed")
    return page.text


def verdicts(vm: VmTime, vcpus: Iterable[int]) -> Iterator[str]:
    """Yield the sentences of `compared` for these vCPUs, given by their dense numbers."""
    ends = _ends(vm)
    for i in vcpus if ends else ():
        least = {outcome.target.name for outcome in vm.outcomes if outcome.target.at_least}
        yield from compared({name: (low.vcpus[i], high.vcpus[i]) for name, (low, high) in ends.items()}, least)


def base_of(ends: Mapping[str, tuple[VcpuTime, VcpuTime]]) -> str:
    """Return the policy that others are compared with: one that preserves roots, or else the fastest."""
    quickest = min(ends, key=lambda name: ends[name][1].wall)
    return next((name for name in _PRESERVED if name in ends), quickest)


def compared(ends: Mapping[str, tuple[VcpuTime, VcpuTime]], least: Collection[str] = ()) -> Iterator[str]:
    """Yield a sentence for each policy but the base, comparing one vCPU's time with that under the base.

    `ends` has the vCPU's times at both bounds (twice the same if they are exact). Times under the policies in `least`
    have no upper bound, so only the time itself is said.
    """
    base = base_of(ends)
    for name, (low, high) in ends.items():
        if name in least or (base in least and name != base):
            yield f"vCPU {low.id}: {duration(low.wall)}{' or more' if name in least else ''} under {name}"
        elif name != base:
            yield f"vCPU {low.id}: {_against(name, low, high, base, ends[base][0])}"


def _against(name: str, low: VcpuTime, high: VcpuTime, base: str, other: VcpuTime) -> str:
    least, most = (each.wall / max(other.wall, 1) for each in (low, high))
    factor = " to ".join(dict.fromkeys((f"{least:.2f}x", f"{most:.2f}x")))
    hangs = list(dict.fromkeys((_hangs(low), _hangs(high))))
    if not (low.stalls or high.stalls or other.stalls):
        return f"{factor} the time under {name} as under {base}; no soft-hang"
    if hangs == [_hangs(other)]:
        return f"{factor} the time under {name} as under {base}; under both {hangs[0]}"
    up_to = high.stalls and not low.stalls
    under = f"up to {hangs[-1]}" if up_to else hangs[0] if len(hangs) == 1 else f"between {' and '.join(hangs)}"
    return f"{factor} the time under {name} as under {base}; under {name} {under}; under {base} {_hangs(other)}"


def _hangs(vcpu: VcpuTime) -> str:
    if not vcpu.stalls:
        return "no soft-hang"
    worst = max(vcpu.stalls, key=lambda stall: stall.ns)
    number = count(len(vcpu.stalls), "soft-hang")
    fires = watchdogs(worst.ns)
    guest = f", long enough for the guest's {' and '.join(fires)} watchdog" if fires else ""
    longest = f"longest {duration(worst.ns)}, from {duration(worst.begin)} to {duration(worst.end)}"
    return f"{number} ({longest}; {causes(vcpu.stalls)}{guest})"


def _ends(vm: VmTime) -> dict[str, tuple[PolicyTime, PolicyTime]]:
    """Return by policy the outcomes at the low and the high bound; a policy with one outcome has it twice."""
    found: dict[str, tuple[PolicyTime, PolicyTime]] = {}
    for outcome in vm.outcomes:
        name = outcome.target.name
        found[name] = (found[name][0], outcome) if name in found else (outcome, outcome)
    return found


def _columns(shown: Sequence[tuple[VmTime, int]]) -> list[TextColumn]:
    one = len(shown) == 1
    places = [TextColumn("VM", level=int(one)), TextColumn("vCPU", level=int(one)), TextColumn("policy", right=False)]
    times = [TextColumn("time"), TextColumn("from", level=2), TextColumn("to", level=2)]
    spent = [TextColumn(each.name.lower(), level=_LEVELS.get(each, 3)) for each in TimeCategory]
    return [*places, *times, *spent, TextColumn("soft-hangs", level=1), TextColumn("longest")]


def _rows(vm: VmTime, at: int) -> Iterator[list[str]]:
    """Yield the table rows of a vCPU, as recorded and under each policy, with the cells of `_columns`.

    A category on which no time was spent has an empty cell.
    """
    under = [(outcome, outcome.vcpus[at]) for outcome in vm.outcomes]
    recorded = vm.recorded[at]
    own = str(under[0][1].id) if under else ""
    spent = [recorded, *(vcpu.spent for _, vcpu in under)]
    seen = [each <= TimeCategory.SWITCH or any(row[each] for row in spent) for each in TimeCategory]

    def shares(row: Sequence[int], but: TimeCategory | None = None) -> list[str]:
        wall = sum(row)
        return [
            f"{row[each] / wall:.1%}" if wall and shown and each is not but else ""
            for each, shown in zip(TimeCategory, seen, strict=True)
        ]

    yield [
        str(vm.vm), own, "as recorded", duration(sum(recorded)), "", "", *shares(recorded, TimeCategory.SWITCH), "", ""
    ]  # fmt: skip
    for outcome, vcpu in under:
        name = outcome.target.name + ("" if outcome.run.bound == "exact" else f", {outcome.run.bound}")
        hangs = (str(len(vcpu.stalls)), duration(vcpu.longest)) if vcpu.stalls else ("", "")
        band = map(duration, vcpu.band)
        yield [str(vm.vm), own, name, duration(vcpu.wall), *band, *shares(vcpu.spent), *hangs]


def _trust(vm: VmTime, several: bool) -> Iterator[str]:
    """Yield the lines about what the times rest on; when several VMs are shown, only what was measured in this one."""
    if vm.marked:
        yield f"marked: {vm.marked}"
    costs = vm.fitted.costs
    measured = [name for name, source in vm.fitted.source.items() if source.startswith("measured")]
    found = ", ".join(f"{name} {duration(getattr(costs, name))}" for name in measured) or "none"
    yield f"costs measured: {found}{f'; --vm {vm.vm} shows the others' if several else ''}"
    assumed: dict[str, list[str]] = {}
    for name, source in vm.fitted.source.items():
        if name not in measured and not several:
            assumed.setdefault(source, []).append(f"{name} {duration(getattr(costs, name))}")
    if assumed:
        yield "costs assumed: " + "; ".join(f"{', '.join(names)} ({source})" for source, names in assumed.items())
    if vm.measured.by_guest + vm.measured.by_clock:
        kept = "keep their wall-clock times" if vm.open else "move with the guest's progress"
        yield (
            f"SMIs {kept} ({vm.measured.by_guest:,} followed an exit of the guest's own making, "
            f"{vm.measured.by_clock:,} did not; --smi overrides)"
        )


def _policy(outcome: PolicyTime) -> dict[str, Any]:
    return {
        "policy": outcome.target.name,
        "bound": outcome.run.bound,
        "jobs": outcome.jobs,
        "worked": outcome.worked,
        "vcpus": [
            {
                "vcpu": vcpu.id,
                "wall": vcpu.wall,
                "band": list(vcpu.band),
                **named(vcpu.spent),
                "stalls": [
                    {"begin": hang.begin, "end": hang.end, "cause": hang.cause.name.lower(), **named(hang.spent)}
                    for hang in vcpu.stalls
                ],
            }
            for vcpu in outcome.vcpus
        ],
    }
