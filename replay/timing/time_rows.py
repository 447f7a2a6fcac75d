# SPDX-License-Identifier: Apache-2.0
"""Times as columns and rows of a result file; RESULT.md specifies `*_ns`, `progress` and `stall`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from replay.result import SPENT, VmWriter
from replay.timing.timed_run import PolicyTime, VcpuTime


def named(spent: Sequence[int]) -> dict[str, int]:
    """Return a time breakdown (ns by `TimeCategory`) under the names of the result's columns."""
    return dict(zip(SPENT, spent, strict=True))


def write(writer: VmWriter, policy: int, time: PolicyTime, recorded: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """Write the `progress` and `stall` rows of one policy, and return the time columns for its `vcpu` rows.

    `policy` is the policy's position in the result; `recorded` is the recorded time in ns by vCPU and TimeCategory.
    """
    bound = time.run.bound
    for vcpu in time.vcpus:
        moments = dict(zip(("clock", "cause", *SPENT), vcpu.progress.T, strict=True))
        writer.moments("progress", policy, bound, vcpu.id, moments)
        hangs = [(hang.begin, hang.cause, hang.ns, *hang.spent) for hang in vcpu.stalls]
        if hangs:
            columns = np.array(hangs, np.int64).T
            stalls = dict(zip(("clock", "cause", "wall_ns", *SPENT), columns, strict=True))
            writer.moments("stall", policy, bound, vcpu.id, stalls)
    rows = [_row(sum(spent), vcpu) for spent, vcpu in zip(recorded, time.vcpus, strict=True)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _row(recorded: int, vcpu: VcpuTime) -> dict[str, int]:
    low, high = vcpu.band
    return {
        "recorded_ns": recorded, "wall_ns": vcpu.wall, "wall_low_ns": low, "wall_high_ns": high, **named(vcpu.spent),
        "stalls": len(vcpu.stalls), "stalled_ns": sum(hang.ns for hang in vcpu.stalls),
        "longest_stall_ns": vcpu.longest,
    }  # fmt: skip
