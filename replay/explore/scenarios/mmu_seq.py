# SPDX-License-Identifier: Apache-2.0
"""The sign extension of mmu_seq: after 2^31 invalidations every fault looks stale, and is retried for ever.

A fault notes the VM's mmu_notifier_seq, an unsigned long, and retries if it has changed by the time it holds mmu_lock.
In kernels 5.17 to 6.2 (and their stable series, until fixed in 2023) the note was handed on as an int. Up to 2^31 - 1
that is the same number; from there on the int is negative, its sign is extended for the comparison, and it is never
equal to the sequence number it was taken from. The guest faults on the same page again and again.
"""

from __future__ import annotations

from replay.explore.model import Model, RwLock, Steps
from replay.explore.scenario import HOLDS, VIOLATION, Bounds, Scenario, Variant


def as_int(value: int) -> int:
    """Return the value of an unsigned long that was passed as an int and
    is then compared with an unsigned long again.
    """
    low = value & 0xFFFF_FFFF
    return low if low < 1 << 31 else low + 0xFFFF_FFFF_0000_0000


def build(model: Model, variant: str, bounds: Bounds) -> None:
    """Each vCPU faults on a page of its own, in a range that an MMU notifier invalidates a few times."""
    start = 1000 if variant == "int-early" else (1 << 31) - bounds["invalidations"]
    passed = as_int if variant.startswith("int") else int
    mmu_lock = RwLock(model, "mmu_lock")
    kvm = model.thing("kvm", seq=start, in_progress=0)
    entries = tuple(model.thing(f"spte{n}", mapped=False) for n in range(bounds["vcpus"]))

    def fault(n: int) -> Steps:
        while True:
            yield "faults, notes mmu_notifier_seq"
            noted = passed(kvm.seq)
            yield from mmu_lock.read()
            yield "looks whether the fault is stale"
            if not kvm.in_progress and kvm.seq == noted:
                break
            mmu_lock.read_unlock()
        yield f"maps spte{n}"
        entries[n].mapped = True
        mmu_lock.read_unlock()

    def notifier() -> Steps:
        for _ in range(bounds["invalidations"]):
            yield from mmu_lock.write()
            yield "begins to invalidate, zaps"
            kvm.in_progress += 1
            for spte in entries:
                spte.mapped = False
            mmu_lock.write_unlock()
            yield from mmu_lock.write()
            yield "ends, counts mmu_notifier_seq on"
            kvm.seq += 1
            kvm.in_progress -= 1
            mmu_lock.write_unlock()

    for n in range(bounds["vcpus"]):
        model.actor(f"vcpu{n}", fault, n)
    model.actor("notifier", notifier)
    model.always(
        "no page is mapped while it is invalidated",
        lambda: not (kvm.in_progress and any(spte.mapped for spte in entries)),
    )


SCENARIO = Scenario(
    name="mmu-seq",
    title="mmu_seq as an int: a fault that is retried for ever",
    variants=(
        Variant("int", VIOLATION, "an int, while the sequence number passes 2^31: every fault from there on is stale"),
        Variant("int-early", HOLDS, "an int, long before that: why nobody saw it for months"),
        Variant("unsigned-long", HOLDS, "an unsigned long, while the sequence number passes 2^31"),
    ),
    build=build,
    bounds={"vcpus": 4, "invalidations": 2},
)
