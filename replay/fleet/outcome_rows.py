# SPDX-License-Identifier: Apache-2.0
"""The outcome of one VM's replay as rows of a fleet's results: for each policy one of the VM and one of each vCPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from replay import bounds
from replay.bounds import Count
from replay.counted import Outcome
from replay.fleet.fleet_catalogue import host_facts, vm_facts
from replay.fleet.fleet_schema import COUNTS, STALLS, ends
from replay.plan import Refault, Target
from replay.result import OF_VCPU
from replay.run import Replayed
from replay.timing.time_rows import named
from replay.timing.timed_run import VcpuTime, VmTime

_OF_USER: Final = "counted only: policies of users are not timed"


def rows_of(replayed: Replayed, key: str, etag: str, vm: int) -> list[dict[str, Any]]:
    """Return the rows of a VM with the columns of `fleet_schema.RESULTS`; `key` and `etag` are those of its trace."""
    plan = replayed.plan
    trace = plan.capabilities.trace
    meta = trace.metadata
    (check,) = (check for check in replayed.checks if check.vm == vm)
    (time,) = (time for time in replayed.times if time.vm == vm)
    outcomes = [
        [each for each in replayed.outcomes if each.target is target and each.vm == vm] for target in plan.targets
    ]
    common = {
        "trace": key, "etag": etag, **host_facts(key, meta), **vm_facts(meta, vm),
        "vcpus": len(outcomes[0][0].vcpu_ids),
        "recorded_policy": plan.capabilities.own.name,
        "events": sum(group.rows for group in trace.groups(vm)), "lost": meta.lost,
        "own_policy": check.agreement.value,
    }  # fmt: skip
    return [
        {**common, "policy": target.name, **row}
        for target, of_target in zip(plan.targets, outcomes, strict=True)
        for row in _of_policy(target, of_target, time)
    ]


def _of_policy(target: Target, outcomes: list[Outcome], time: VmTime) -> Iterator[dict[str, Any]]:
    """Yield the row of the VM under one policy, and the rows of its vCPUs."""
    timed = [each.vcpus for each in time.outcomes if each.target is target]
    why = time.refused or (_OF_USER if not timed else "")
    vcpus = [_time(time, target, [end[at] for end in timed], at) for at in range(len(outcomes[0].vcpu_ids))]
    counts = bounds.counts(outcomes, Refault())
    yield {"row": "vm", "no_times": why, **_counted(counts), **_summed(vcpus)}
    for at, vcpu in enumerate(outcomes[0].vcpu_ids):
        each = {}
        for name in OF_VCPU:
            one, other = (int(getattr(end.vcpus, name)[at]) for end in (outcomes[0], outcomes[-1]))
            each[name] = bounds.interval(one, other, outcomes[0])
        yield {"row": "vcpu", "vcpu": vcpu, "no_times": why, **_counted(each), **vcpus[at]}


def _counted(counts: Mapping[str, Count]) -> dict[str, int | None]:
    """Return the columns with both bounds of each count. Counts of the whole VM are absent in rows of vCPUs."""
    found: dict[str, int | None] = {}
    for name in COUNTS:
        if name in counts:
            low, high = ends(name)
            found[low], found[high] = counts[name].low, counts[name].high
    return found


def _time(time: VmTime, target: Target, under: Sequence[VcpuTime], at: int) -> dict[str, int | None]:
    """Return a vCPU's time columns; `under` has its times at one bound or at both."""
    if not under:
        return {}
    open_ = target.at_least
    bands = [each.band for each in under]
    stalls = [(len(each.stalls), sum(hang.ns for hang in each.stalls), each.longest) for each in under]
    found: dict[str, int | None] = {
        "recorded_ns": sum(time.recorded[at]),
        "wall_ns": under[0].wall,
        "wall_low_ns": min(low for low, _ in bands),
        "wall_high_ns": None if open_ else max(high for _, high in bands),
        **named(under[0].spent),
    }
    for name, values in zip(STALLS, zip(*stalls, strict=True), strict=True):
        low, high = ends(name)
        found[low], found[high] = min(values), None if open_ else max(values)
    return found


def _summed(vcpus: Sequence[dict[str, int | None]]) -> dict[str, int | None]:
    """Return the time columns of a VM: the sums over its vCPUs, and the maximum of the longest stall."""
    if not vcpus or not vcpus[0]:
        return {}
    longest = ends(STALLS[-1])
    found: dict[str, int | None] = {}
    for name in vcpus[0]:
        values = [vcpu[name] for vcpu in vcpus]
        known = [value for value in values if value is not None]
        found[name] = None if len(known) < len(values) else max(known) if name in longest else sum(known)
    return found
