# SPDX-License-Identifier: Apache-2.0
"""Rank vCPUs, and so VMs, by how badly off they are; reports use the same order (analysis/queries/worst.py).

First come vCPUs that made no more progress in the recording, then those with the longest soft-hang, then those that
lost most time to faults and roots, then those with most faults. Times and faults are those under the recorded policy
or, if it was not replayed, under the first one.
"""

from __future__ import annotations

from collections import defaultdict

from replay.run import Replayed
from replay.timing.soft_hangs import OF_ROOTS

VcpuPlace = tuple[int, int]  # the VM's number, and the vCPU's dense number within it


def ranked(replayed: Replayed) -> list[VcpuPlace]:
    """Return every vCPU that was replayed, the worst off first."""
    targets = replayed.plan.targets
    subject = next((target for target in targets if target.recorded), targets[0])
    stuck = {(vm.vm, each.vcpu) for vm in replayed.times for each in vm.stuck if not each.ended}
    lost: dict[VcpuPlace, tuple[int, int]] = defaultdict(lambda: (-1, -1))
    for vm in replayed.times:
        for outcome in vm.outcomes:
            for place, vcpu in enumerate(outcome.vcpus if outcome.target is subject else ()):
                spent = sum(vcpu.spent[each] for each in OF_ROOTS) if vcpu.wall else -1
                lost[vm.vm, place] = max(lost[vm.vm, place], (vcpu.longest, spent))
    faults: dict[VcpuPlace, int] = defaultdict(int)
    ids: dict[VcpuPlace, int] = {}
    for counted in replayed.outcomes:
        for place, vcpu_id in enumerate(counted.vcpu_ids):
            ids[counted.vm, place] = vcpu_id
            if counted.target is subject and counted.vcpus is not None:
                faults[counted.vm, place] = max(faults[counted.vm, place], int(counted.vcpus.faults[place]))

    def badness(at: VcpuPlace) -> tuple[bool, int, int, int, int, int]:
        return (at[0], ids[at]) in stuck, *lost[at], faults[at], -at[0], -ids[at]

    return sorted(ids, key=badness, reverse=True)


def vms(order: list[VcpuPlace]) -> list[int]:
    """Return the VMs of ranked vCPUs, each at the position of its worst vCPU."""
    return list(dict.fromkeys(vm for vm, _ in order))
