# SPDX-License-Identifier: Apache-2.0
"""A lockless walk of a reverse map, while others add SPTEs to it and zap SPTEs from it.

"KVM: x86/mmu: Add support for lockless walks of rmap SPTEs" (November 2024, merged in Linux 6.15). A zap first makes an
SPTE non-present, then takes it off its rmap, both under mmu_lock for write. A walker that holds that lock never sees
the state in between, and treated a non-present SPTE as a BUG(). A walker without the lock does see it, and must skip
such SPTEs. The chain itself, and its descriptors, are kept from changing under a walker without mmu_lock by the LOCKED
bit in the rmap's head, which whoever changes the chain also takes. A walker locks only a head that is not empty, and
unlocks by writing back the head that it found.

A head here is empty, one SPTE, or descriptors of two SPTEs each, of which only the first may have room.
"""

from __future__ import annotations

from typing import Any

from replay.explore.memory import Thing, free
from replay.explore.model import Model, RwLock, Steps, require, until
from replay.explore.scenario import HOLDS, VIOLATION, Bounds, Scenario, Variant

ROOM = 2  # PTE_LIST_EXT is 14; two are enough for everything that can happen to a descriptor


def build(model: Model, variant: str, bounds: Bounds) -> None:
    """SPTEs of one rmap: a zap removes the last and the first, a fault
    adds one, and walkers age those that are there.
    """
    mmu_lock = RwLock(model, "mmu_lock")
    count = bounds["sptes"]
    sptes = tuple(model.thing(f"spte{n}", present=False, accessed=True) for n in range(count))
    descs = tuple(model.thing(f"desc{n}", "rmap descriptor", sptes=(), more=None) for n in range(count))
    slab = model.thing("slab", made=0)
    rmap = model.thing("rmap", head=None, locked=False)
    fatal, under_mmu_lock = variant.startswith("fatal"), variant.endswith("mmu-lock")
    bit = not under_mmu_lock and variant != "walk-unlocked"

    def walk() -> Steps:
        if under_mmu_lock:
            yield from mmu_lock.write()
        head = (yield from lock_to_walk()) if bit else (yield from read_head())
        if head in sptes:
            yield from age(head)
        desc = head if head in descs else None
        while desc is not None:
            desc = yield from age_all_of(desc)
        if bit and head is not None:
            yield "writes back the head, without LOCKED"
            require(rmap.head is head, "to unlock a walk undoes nothing", f"the head goes from {rmap.head} to {head}")
            rmap.head, rmap.locked = head, False
        if under_mmu_lock:
            mmu_lock.write_unlock()

    def read_head() -> Steps:
        yield "reads the head"
        return rmap.head

    def lock_to_walk() -> Steps:
        while True:
            yield until("reads the head, not LOCKED", lambda: not rmap.locked)
            head = rmap.head
            if head is None:  # an empty rmap is never locked
                return None
            yield "sets LOCKED, if the head is the same"
            if rmap.head is head and not rmap.locked:
                rmap.locked = True
                return head

    def age_all_of(desc: Thing) -> Steps:
        for position in range(ROOM):
            yield f"reads entry {position} of {desc}"
            if position < len(desc.sptes):
                yield from age(desc.sptes[position])
        yield f"goes on from {desc}"
        return desc.more

    def age(spte: Thing) -> Steps:
        yield f"looks whether {spte} is present"
        if not spte.present:
            require(not fatal, "no walker to which that is fatal meets a non-present SPTE", f"{spte}")
            return
        yield f"clears the accessed bit of {spte}, if it has not changed"
        if spte.present:
            spte.accessed = False

    def zap(doomed: tuple[Thing, ...]) -> Steps:
        yield from mmu_lock.write()
        for spte in doomed:
            yield f"makes {spte} non-present"
            spte.present = False
            yield from change(remove, spte, variant != "remove-unlocked")
        mmu_lock.write_unlock()

    def fault(spte: Thing) -> Steps:
        yield from mmu_lock.write()
        yield f"makes {spte} present"
        spte.present = True
        yield from change(add, spte, variant != "add-unlocked")
        mmu_lock.write_unlock()

    def change(how: Any, spte: Thing, locks: bool) -> Steps:
        if locks:
            yield until("sets LOCKED", lambda: not rmap.locked)
            rmap.locked = rmap.head is not None
        yield f"{how.__name__}s {spte}, stores the head without LOCKED"
        how(spte)
        rmap.locked = False

    def add(spte: Thing) -> None:
        head = rmap.head
        if head is None:
            rmap.head = spte
        elif head in descs and len(head.sptes) < ROOM:
            head.sptes += (spte,)
        else:
            desc = descs[slab.made]
            slab.made += 1
            desc.sptes, desc.more = ((spte,), head) if head in descs else ((head, spte), None)
            rmap.head = desc

    def remove(spte: Thing) -> None:
        head = rmap.head
        if head is spte:
            rmap.head = None
            return
        desc = head
        while spte not in desc.sptes:
            desc = desc.more
        *kept, last = head.sptes
        head.sptes = tuple(kept)
        if last is not spte:  # the last SPTE of the first descriptor takes its place
            desc.sptes = tuple(last if other is spte else other for other in desc.sptes)
        if not head.sptes:
            rmap.head = head.more
            free(head)

    def chained() -> tuple[Thing, ...]:
        on: tuple[Thing, ...] = (rmap.head,) if rmap.head in sptes else ()
        desc = rmap.head if rmap.head in descs else None
        while desc is not None:
            on, desc = on + desc.sptes, desc.more
        return on

    for spte in sptes[:-1]:
        spte.present = True
        add(spte)
    for n in range(bounds["walkers"]):
        model.actor(f"walker{n}", walk)
    model.actor("zap", zap, (sptes[-2], sptes[0]))
    model.actor("fault", fault, sptes[-1])
    model.at_end(
        "the rmap holds every present SPTE, and no other",
        lambda: sorted(map(str, chained())) == sorted(str(spte) for spte in sptes if spte.present),
    )


SCENARIO = Scenario(
    name="rmap",
    title="A lockless walk of a reverse map against zap, add and remove",
    variants=(
        Variant("fatal-lockless", VIOLATION, "without mmu_lock, a non-present SPTE is fatal: meets one being zapped"),
        Variant("fatal-mmu-lock", HOLDS, "the same under mmu_lock for write: there is never one to meet"),
        Variant("walk-unlocked", VIOLATION, "skips non-present SPTEs, but does not set LOCKED: the chain is freed"),
        Variant("remove-unlocked", VIOLATION, "the walker sets LOCKED, but who removes does not heed it"),
        Variant("add-unlocked", VIOLATION, "who adds does not heed it: the walker's unlock undoes the add"),
        Variant("skip-lockless", HOLDS, "LOCKED held by all three, non-present SPTEs skipped, as in the series"),
    ),
    build=build,
    bounds={"sptes": 5, "walkers": 2},
)
