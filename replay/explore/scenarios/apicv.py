# SPDX-License-Identifier: Apache-2.0
"""Inhibiting APICv while other vCPUs fault on the APIC page.

"KVM: x86: hyper-v: Deactivate APICv only when AutoEOI feature is in use" (July 2021, Linux 5.15) keeps the APIC page's
memslot and zaps its one GFN when APICv is inhibited; faults look at the flag and emulate. The thread's argument: a vCPU
that has seen the flag set may map the page after the zap, and the guest's writes then "succeed, but KVM wants to
intercept to emulate". The notifier count and sequence number make it retry, and "this is why kvm_zap_gfn_range() needs
to take mmu_lock for write. If it's allowed to run in parallel with the page fault handler, there's no guarantee that
the correct apic_access_memslot_enabled will be observed."
"""

from __future__ import annotations

from replay.explore.memory import Thing
from replay.explore.model import Model, RwLock, Steps
from replay.explore.scenario import HOLDS, VIOLATION, Bounds, Scenario, Variant


def build(model: Model, variant: str, bounds: Bounds) -> None:
    """A vCPU faults on the APIC page in each root but the last, where the page is mapped already.

    The inhibit zaps all roots.

    The name of a variant says: read or write, how the zap holds mmu_lock; count and seq, which of the two the zap
    changes; recheck, that the fault looks at the flag again under the lock; yields, that the zap is of a larger range
    and drops the lock between entries; late, that the fault reads the sequence number after the flag.
    """
    has = set(variant.split("-")).__contains__
    shared, count, seq, recheck = map(has, ("read", "count", "seq", "recheck"))
    mmu_lock = RwLock(model, "mmu_lock")
    kvm = model.thing("kvm", apicv=True, count=0, seq=0, inhibited=False)
    entries = tuple(model.thing(f"spte{n}", mapped=n >= bounds["vcpus"]) for n in range(bounds["vcpus"] + 1))

    def fault(spte: Thing) -> Steps:
        while True:
            if not has("late"):
                yield "faults, reads mmu_seq"
                before = kvm.seq
            yield "looks whether APICv is on"
            if not kvm.apicv:
                break
            if has("late"):
                yield "reads mmu_seq"
                before = kvm.seq
            yield from mmu_lock.read()
            if recheck:
                yield "looks again, under mmu_lock"
                if not kvm.apicv:
                    mmu_lock.read_unlock()
                    break
            yield "looks whether it must retry"
            if kvm.count or kvm.seq != before:
                mmu_lock.read_unlock()
                continue
            yield f"maps the APIC page in {spte}"
            spte.mapped = True
            mmu_lock.read_unlock()
            return
        yield "emulates the access"

    def inhibit() -> Steps:
        yield "turns APICv off"
        kvm.apicv = False
        yield from lock()
        if count:
            yield "raises the notifier count"
            kvm.count += 1
        for spte in entries:
            if has("yields") and spte is not entries[0]:
                unlock()
                yield from lock()
            yield f"zaps {spte}"
            spte.mapped = False
        if count or seq:
            yield "ends the notifier range"
            kvm.seq += seq
            kvm.count -= count
        yield "unlocks mmu_lock; APICv is inhibited"
        unlock()
        kvm.inhibited = True

    def lock() -> Steps:
        return mmu_lock.read() if shared else mmu_lock.write()

    def unlock() -> None:
        if shared:
            mmu_lock.read_unlock()
        else:
            mmu_lock.write_unlock()

    for n, spte in enumerate(entries[:-1]):
        model.actor(f"vcpu{n}", fault, spte)
    model.actor("inhibit", inhibit)
    model.always(
        "the APIC page is not mapped once APICv is inhibited",
        lambda: not (kvm.inhibited and any(spte.mapped for spte in entries)),
    )


SCENARIO = Scenario(
    name="apicv",
    title="Inhibiting APICv while vCPUs fault on the APIC page",
    variants=(
        Variant("read", VIOLATION, "zap under mmu_lock for read"),
        Variant(
            "read-count-seq", VIOLATION, "for read with count and sequence: both may change after the fault looked"
        ),
        Variant("read-recheck", VIOLATION, "for read, the fault looks at the flag under mmu_lock: not enough either"),
        Variant(
            "write", VIOLATION, "for write alone: a fault that saw the flag before maps after (the thread's table)"
        ),
        Variant("write-recheck", HOLDS, "for write alone, if the fault looked at the flag under mmu_lock"),
        Variant("write-count", VIOLATION, "count alone: raised and lowered under the lock, no fault ever sees it"),
        Variant("write-seq", HOLDS, "sequence alone, as long as the zap does not yield"),
        Variant("write-seq-yields", VIOLATION, "a zap that yields: the sequence number moves only at its end"),
        Variant("write-count-seq-yields", HOLDS, "a zap that yields, with both"),
        Variant("write-count-seq-late", VIOLATION, "with both, but the fault reads the sequence number after the flag"),
        Variant("write-count-seq", HOLDS, "as proposed and merged: for write, with both"),
    ),
    build=build,
    bounds={"vcpus": 3},
)
