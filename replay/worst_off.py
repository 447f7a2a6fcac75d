# SPDX-License-Identifier: Apache-2.0
"""Which vCPU is worst off, and so which VM, in the order that reports have (analysis/worst.py).

First those that got no further in the recording, then those that stood still longest, then those that lost the most to
faults and roots, under the recorded policy or, without it, the first; then by faults.
"""

from __future__ import annotations

from collections import defaultdict

from replay.run import Replayed
from replay.timing.soft_hangs import OF_ROOTS

VcpuPlace = tuple[int, int]  # VM, and which of its vCPUs


def ranked(replayed: Replayed) -> list[VcpuPlace]:
    """Every vCPU that was replayed, the worst off first."""
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
    """The VMs of these, each where its worst vCPU is."""
    return list(dict.fromkeys(vm for vm, _ in order))
