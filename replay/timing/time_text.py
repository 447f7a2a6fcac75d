"""What `kvmtrace replay` says of time: a verdict in a sentence for each vCPU, then the figures it rests on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from replay.plan import Plan
from replay.timing.diagnosis import summed_up
from replay.timing.reference_clock import TimeCategory
from replay.timing.soft_hangs import causes
from replay.timing.stalls import watchdogs
from replay.timing.time_rows import named
from replay.timing.timed_run import PolicyTime, Settings, VcpuTime, VmTime
from traces.durations import duration
from traces.screen import VMS_SHOWN, page, text_of
from traces.text import count, printable

_VCPUS_SHOWN: Final = 16  # of a VM: those that hung longest, or lost most
_STUCK_SHOWN: Final = 4  # vCPUs whose rows are shown
_PRESERVED: Final = ("preserve", "preserve-worker")


def to_dict(times: list[VmTime], settings: Settings) -> dict[str, Any]:
    """The document's part on time; all times in ns."""
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


def render(times: list[VmTime], plan: Plan) -> str:
    """Plain text where standard output is no terminal."""
    console = page()
    stuck = [each for vm in times for each in vm.stuck]
    for line in summed_up(stuck):
        console.print(Text(printable(line), style="bold"), soft_wrap=True)
    for each in sorted(stuck, key=lambda each: each.since - each.until)[:_STUCK_SHOWN]:
        if not each.ended:
            console.print(Text(f"what shows that of vCPU {each.vcpu} of VM {each.vm}:"))
            for row in each.rows:
                console.print(Text(f"  {printable(row)}"), soft_wrap=True)
    for vm in times[:VMS_SHOWN]:
        if vm.refused:
            console.print(Text(f"VM {vm.vm}: no times: {vm.refused}"))
            continue
        shown = _shown(vm)
        for line in verdicts(vm, shown):
            console.print(Text(printable(line), style="bold"), soft_wrap=True)
        console.print(_table(vm, shown))
        if len(shown) < len(vm.recorded):
            console.print(
                Text(f"... {len(vm.recorded) - len(shown)} more vCPUs, better off than these: --json has them")
            )
        for line in _trust(vm):
            console.print(Text(printable(line)), soft_wrap=True)
    if len(times) > VMS_SHOWN:
        console.print(Text(f"... {len(times) - VMS_SHOWN} more VMs: --json has them"))
    own = [target.name for target in plan.targets if target.policy is not None]
    if own:
        console.print(Text(printable(f"{', '.join(own)}: counted only; policies of users are not timed")))
    return text_of(console)


def _shown(vm: VmTime) -> list[int]:
    """Places of the vCPUs that are worst off under any policy, in their order."""
    vcpus = range(len(vm.recorded))
    if len(vcpus) <= _VCPUS_SHOWN or not vm.outcomes:
        return list(vcpus)[:_VCPUS_SHOWN]

    def badness(i: int) -> tuple[int, float]:
        under = [outcome.vcpus[i] for outcome in vm.outcomes]
        walls = [vcpu.wall for vcpu in under]
        return max(vcpu.longest for vcpu in under), max(walls) / max(min(walls), 1)

    return sorted(sorted(vcpus, key=badness, reverse=True)[:_VCPUS_SHOWN])


def verdicts(vm: VmTime, vcpus: Iterable[int]) -> Iterator[str]:
    """One sentence a policy for each of these vCPUs (places): see `compared`."""
    ends = _ends(vm)
    for i in vcpus if ends else ():
        yield from compared({name: (low.vcpus[i], high.vcpus[i]) for name, (low, high) in ends.items()})


def base_of(ends: Mapping[str, tuple[VcpuTime, VcpuTime]]) -> str:
    """The policy that others are held against: the one that keeps roots, or, without it, the quickest."""
    quickest = min(ends, key=lambda name: ends[name][1].wall)
    return next((name for name in _PRESERVED if name in ends), quickest)


def compared(ends: Mapping[str, tuple[VcpuTime, VcpuTime]]) -> Iterator[str]:
    """One vCPU under each policy (both ends of an interval, or the same twice): every other one against the base."""
    base = base_of(ends)
    for name, (low, high) in ends.items():
        if name != base:
            yield f"vCPU {low.id}: {_against(name, low, high, base, ends[base][0])}"


def _against(name: str, low: VcpuTime, high: VcpuTime, base: str, other: VcpuTime) -> str:
    least, most = (each.wall / max(other.wall, 1) for each in (low, high))
    factor = f"{least:.2f}x" if low is high else f"{least:.2f}x to {most:.2f}x"
    hangs = [_hangs(low)] if low is high else [_hangs(low), _hangs(high)]
    if not (low.stalls or high.stalls or other.stalls):
        return f"{factor} the time under {name} as under {base}; no soft-hang"
    under = f"up to {hangs[-1]}" if high.stalls and not low.stalls else " to ".join(dict.fromkeys(hangs))
    return f"{factor} the time under {name} as under {base}; under {name} {under}; under {base} {_hangs(other)}"


def _hangs(vcpu: VcpuTime) -> str:
    if not vcpu.stalls:
        return "no soft-hang"
    worst = max(vcpu.stalls, key=lambda stall: stall.ns)
    number = count(len(vcpu.stalls), "soft-hang")
    fires = watchdogs(worst.ns)
    guest = f", long enough for the guest's {' and '.join(fires)} watchdog" if fires else ""
    longest = f"longest {duration(worst.ns)} at {duration(worst.begin)} to {duration(worst.end)}"
    return f"{number}, {longest}, {causes(vcpu.stalls)}{guest}"


def _ends(vm: VmTime) -> dict[str, tuple[PolicyTime, PolicyTime]]:
    """By policy, its one outcome or both ends."""
    found: dict[str, tuple[PolicyTime, PolicyTime]] = {}
    for outcome in vm.outcomes:
        name = outcome.target.name
        found[name] = (found[name][0], outcome) if name in found else (outcome, outcome)
    return found


def _table(vm: VmTime, vcpus: list[int]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(f"VM {vm.vm}")
    for name in ("vCPU", "time", "from", "to"):
        table.add_column(name, justify="right")
    spent = [*vm.recorded, *(vcpu.spent for outcome in vm.outcomes for vcpu in outcome.vcpus)]
    shown = [each for each in TimeCategory if each <= TimeCategory.SWITCH or any(row[each] for row in spent)]
    for each in shown:
        table.add_column(each.name.lower(), justify="right")
    for name in ("soft-hangs", "longest"):
        table.add_column(name, justify="right")
    for i in vcpus:
        recorded = vm.recorded[i]
        vcpu_id = str(vm.outcomes[0].vcpus[i].id) if vm.outcomes else ""
        wall = sum(recorded)
        shares = ("" if on == TimeCategory.SWITCH else f"{recorded[on] / wall:.1%}" for on in shown if wall)
        table.add_row("as recorded (guest with switch)", vcpu_id, duration(wall), "", "", *shares)
    for outcome in vm.outcomes:
        name = outcome.target.name + ("" if outcome.run.bound == "exact" else f", {outcome.run.bound}")
        for vcpu in (outcome.vcpus[i] for i in vcpus):
            low, high = vcpu.band
            shares = (f"{vcpu.spent[on] / vcpu.wall:.1%}" if vcpu.wall else "" for on in shown)
            hangs = (str(len(vcpu.stalls)), duration(vcpu.longest)) if vcpu.stalls else ("", "")
            table.add_row(
                printable(name), str(vcpu.id), duration(vcpu.wall), duration(low), duration(high), *shares, *hangs
            )
    return table


def _trust(vm: VmTime) -> Iterator[str]:
    if vm.marked:
        yield f"marked: {vm.marked}"
    costs = vm.fitted.costs
    measured = [name for name, source in vm.fitted.source.items() if source.startswith("measured")]
    assumed: dict[str, list[str]] = {}
    for name, source in vm.fitted.source.items():
        if name not in measured:
            assumed.setdefault(source, []).append(f"{name} {duration(getattr(costs, name))}")
    yield "costs measured: " + (", ".join(f"{name} {duration(getattr(costs, name))}" for name in measured) or "none")
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
