# SPDX-License-Identifier: Apache-2.0
"""Accounting of the TDP MMU's page tables: racing links, a list compared with a counter, and leaks seen at teardown.

Faults link new tables under mmu_lock for read, so that two of them may want to fill the same entry: the one that loses
the cmpxchg frees its table, which was never counted, and retries. Tables were kept on a list, under tdp_mmu_pages_lock,
until "Track the number of TDP MMU pages, but not the actual pages" (d25ceb926436, Linux 6.2) replaced it by an atomic
counter: a fault needs no spinlock any more, and teardown still warns of leaks, which "is very, very useful for
detecting KVM bugs".

NX huge page recovery removes a table, under mmu_lock for write up to Linux 6.17 and for read since. For read it freezes
each entry of the table on the way, so that a fault that is walking the table links nothing there any more: such a table
would be in no tree, and be counted for ever. For read it may also meet a table that is linked but not yet counted. The
order does not matter to a counter; it does to a list.
"""

from __future__ import annotations

from typing import Any

from replay.explore.memory import Thing, free, freed
from replay.explore.model import Model, Mutex, RwLock, Steps, require, until
from replay.explore.scenario import HOLDS, VIOLATION, Bounds, Scenario, Variant

FROZEN = "frozen"
EMPTY = (None, None)  # a table has two entries here, instead of 512


def build(model: Model, variant: str, bounds: Bounds) -> None:
    """vCPUs fault in pages under one entry of the root, with two levels of tables missing; recovery; then teardown.

    mmu_lock is modelled only in variants that take it for write. Tables that RCU would free are freed at teardown; see
    vm-destroy for RCU.
    """
    listed = variant.startswith("list")
    exclusive = variant in ("list", "list-unlocked")  # how recovery holds mmu_lock
    vcpus = bounds["vcpus"]
    mmu_lock = RwLock(model, "mmu_lock")
    pages_lock = Mutex(model, "tdp_mmu_pages_lock")
    root = model.thing("root", entries=(None,))
    kvm = model.thing("kvm", tdp_mmu_pages=0, pages_list=frozenset(), removed=())
    caches = tuple(  # the tables that each vCPU may allocate, in order; after a lost race it takes the next one
        tuple(model.thing(f"T{n}{letter}", "page table", entries=EMPTY) for letter in "abcdef"[: vcpus + 2])
        for n in range(vcpus)
    )
    parts = tuple(model.thing(name, done=False, taken=0) for name in (*(f"vcpu{n}" for n in range(vcpus)), "recovery"))

    def fault(vcpu: Thing, cache: tuple[Thing, ...], index: int) -> Steps:
        mapped = False
        while not mapped:
            if exclusive:
                yield from mmu_lock.read()
            table = yield from step_down(root, 0, vcpu, cache)
            if table is not None:
                mapped = (yield from step_down(table, index, vcpu, cache)) is not None
            if exclusive:
                mmu_lock.read_unlock()
        vcpu.done = True

    def step_down(table: Thing, index: int, vcpu: Thing, cache: tuple[Thing, ...]) -> Steps:
        """To the table of an entry; None: retry."""
        yield f"reads entry {index} of {table}"
        entry = table.entries[index]
        if entry is FROZEN:
            return None
        if entry is not None:
            return entry
        child = cache[vcpu.taken]
        vcpu.taken += 1
        if variant == "count-first":
            yield from account(child)
        yield f"links {child} into {table}" + ("" if variant == "plain-link" else ", if the entry is still empty")
        if variant != "plain-link" and table.entries[index] is not None:
            free(child)
            return None
        put(table, index, child)
        if variant != "count-first":
            yield from account(child)
        return child

    def account(table: Thing) -> Steps:
        if variant == "plain-counter":
            yield "reads tdp_mmu_pages"
            before = kvm.tdp_mmu_pages
            yield "stores tdp_mmu_pages, one more"
            kvm.tdp_mmu_pages = before + 1
        elif variant == "list-unlocked":
            yield f"reads the list, to add {table}"
            listed_before = kvm.pages_list
            yield f"stores the list with {table}"
            kvm.pages_list = listed_before | {table}
        elif listed:
            yield from pages_lock.lock()
            yield f"adds {table} to the list"
            kvm.pages_list |= {table}
            pages_lock.unlock()
        else:
            yield f"counts {table}"
            kvm.tdp_mmu_pages += 1

    def unaccount(table: Thing) -> None:
        if listed:
            require(table in kvm.pages_list, "a table that is taken off the list is on it", f"{table}")
            kvm.pages_list -= {table}
        else:
            kvm.tdp_mmu_pages -= 1

    def recover(recovery: Thing) -> Steps:
        if exclusive:
            yield from mmu_lock.write()
        yield "freezes the root's entry, if there is a table"
        table = root.entries[0]
        if table is not None:
            put(root, 0, FROZEN)
            yield from remove(table)
            put(root, 0, None)
        if exclusive:
            mmu_lock.write_unlock()
        recovery.done = True

    def remove(table: Thing) -> Steps:
        if listed:
            yield from pages_lock.lock()
            yield f"takes {table} off the list"
            unaccount(table)
            pages_lock.unlock()
        else:
            yield f"uncounts {table}"
            unaccount(table)
        for index in range(len(EMPTY)):
            yield f"{'empties' if variant == 'no-freeze' else 'freezes'} entry {index} of {table}"
            child = table.entries[index]
            put(table, index, None if variant == "no-freeze" else FROZEN)
            if child is not None:
                yield from remove(child)
        kvm.removed += (table,)

    def teardown() -> Steps:
        yield until("teardown: removes all tables, looks at what is counted", lambda: all(part.done for part in parts))
        for table in kvm.removed:
            free(table)
        remove_all(root)
        require(not kvm.tdp_mmu_pages, "no table is counted at teardown", f"tdp_mmu_pages is {kvm.tdp_mmu_pages}")
        require(not kvm.pages_list, "no table is on the list at teardown", " ".join(sorted(map(str, kvm.pages_list))))

    def remove_all(table: Thing) -> None:
        for child in table.entries:
            if child is not None:
                unaccount(child)
                remove_all(child)
                free(child)

    def put(table: Thing, index: int, entry: Any) -> None:
        table.entries = (*table.entries[:index], entry, *table.entries[index + 1 :])

    for n, cache in enumerate(caches):
        model.actor(f"vcpu{n}", fault, parts[n], cache, n % len(EMPTY))
    model.actor("recovery", recover, parts[-1])
    model.actor("teardown", teardown)
    model.at_end(
        "every table that was allocated is freed",
        lambda: all(freed(t) for n, cache in enumerate(caches) for t in cache[: parts[n].taken]),
    )


SCENARIO = Scenario(
    name="accounting",
    title="Page tables of the TDP MMU: racing links, list against counter, leaks at teardown",
    variants=(
        Variant("plain-link", VIOLATION, "an entry is filled without cmpxchg: the first of two tables is leaked"),
        Variant("count-first", VIOLATION, "counted before it is linked: who loses the race stays counted"),
        Variant("plain-counter", VIOLATION, "a counter that is not atomic"),
        Variant("no-freeze", VIOLATION, "recovery empties entries, does not freeze them: teardown sees the leak"),
        Variant("counter", HOLDS, "atomic counter, after the link; recovery for read (6.18)"),
        Variant("list-unlocked", VIOLATION, "a list without its spinlock: an addition is lost"),
        Variant("list-read-recovery", VIOLATION, "the list with recovery for read: removes what is not yet on it"),
        Variant("list", HOLDS, "the list under tdp_mmu_pages_lock; recovery for write (up to 6.1)"),
    ),
    build=build,
    bounds={"vcpus": 3},
)
