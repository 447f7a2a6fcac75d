"""Times as columns and rows of a result: what RESULT.md says of `*_ns`, `progress` and `stall`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from replay.result import SPENT, Writer
from replay.timing.timed_run import VcpuTime, VmTime


def named(spent: Sequence[int]) -> dict[str, int]:
    """ns by what they went on (`Spent`), under the names of a result's columns."""
    return dict(zip(SPENT, spent, strict=True))


def write(writer: Writer, times: Iterable[VmTime], policies: Sequence[str]) -> None:
    """Rows of kind `progress` and `stall`, and the times that rows of vCPUs get with their counts."""
    for vm in times:
        for outcome in vm.outcomes:
            key = (policies.index(outcome.target.name), outcome.run.bound, vm.vm)
            rows = [_row(sum(recorded), vcpu) for recorded, vcpu in zip(vm.recorded, outcome.vcpus, strict=True)]
            writer.timed[key] = {name: [row[name] for row in rows] for name in rows[0]}
            for vcpu in outcome.vcpus:
                moments = dict(zip(("clock", "cause", *SPENT), vcpu.progress.T, strict=True))
                writer.moments("progress", *key, vcpu.id, moments)
                hangs = [(hang.begin, hang.cause, hang.ns, *hang.spent) for hang in vcpu.stalls]
                if hangs:
                    columns = np.array(hangs, np.int64).T
                    stalls = dict(zip(("clock", "cause", "wall_ns", *SPENT), columns, strict=True))
                    writer.moments("stall", *key, vcpu.id, stalls)


def _row(recorded: int, vcpu: VcpuTime) -> dict[str, int]:
    low, high = vcpu.band
    return {
        "recorded_ns": recorded, "wall_ns": vcpu.wall, "wall_low_ns": low, "wall_high_ns": high, **named(vcpu.spent),
        "stalls": len(vcpu.stalls), "stalled_ns": sum(hang.ns for hang in vcpu.stalls),
        "longest_stall_ns": vcpu.longest,
    }  # fmt: skip
