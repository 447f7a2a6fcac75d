# SPDX-License-Identifier: Apache-2.0
"""--tdp-pages: compare keeping linked tables in a list under tdp_mmu_pages_lock with counting them.

The faults are the recorded ones with the tables that they linked; neither way accounts roots. A table that is linked in
place of a huge page which the NX workaround forbids takes the spinlock either way, and a trace does not show how many
do.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

from replay.timing.costs import LockCosts
from replay.whatif.aging import FACTORS
from replay.whatif.answers import VCPUS, Answer, Asked, spread
from replay.whatif.locks import Lock
from replay.whatif.workload import Workload
from traces.command_line.durations import duration
from traces.text import count


@dataclass
class AccountingRun:
    """The result of one simulated run; times are in ns.

    `links` is the number of tables linked, of which `contended` waited, for `waited` ns in all; `held` is the time for
    which the list's lock or the counter's cache line was held. `end` is when the last of the `faults` is done.
    """

    links: int = 0
    contended: int = 0
    waited: int = 0
    held: int = 0
    faults: int = 0
    end: int = 0


def hold(costs: LockCosts, variant: str, vcpus: int) -> int:
    """Return the ns for which one link keeps the next one out.

    With other vCPUs, the cache lines of the lock and of the list (or of the counter) have to be fetched from them.
    """
    lines = 0 if vcpus == 1 else 2 if variant == "list" else 1
    return (costs.link if variant == "list" else costs.atomic) + lines * costs.line


def meet(work: Workload, vcpus: int, ns: int) -> AccountingRun:
    """Simulate `vcpus` vCPUs that fault at their pace.

    Each table that they link takes the lock or the counter for `ns`.
    """
    turn = Lock()
    met = AccountingRun()
    crowd = work.crowd(vcpus)
    gaps = [program.gap.tolist() for program, _ in crowd]
    links = [program.links.tolist() for program, _ in crowd]
    heap = [(begin + int(program.gap[0]), vcpu, 0, 0) for vcpu, (program, begin) in enumerate(crowd)]
    heapq.heapify(heap)
    left = vcpus
    while left:
        at, who, i, done = heapq.heappop(heap)
        if done < links[who][i]:
            start = turn.take(at, ns, shares=False)
            met.links += 1
            met.contended += start > at
            met.waited += start - at
            met.held += ns
            heapq.heappush(heap, (start + ns + work.costs.table, who, i, done + 1))
            continue
        met.faults += 1
        end = at + max(work.hold - done * work.costs.table, 0)
        if i + 1 < len(gaps[who]):
            heapq.heappush(heap, (end + gaps[who][i + 1], who, i + 1, 0))
        else:
            met.end = max(met.end, end)
            left -= 1
    return met


def answer(work: Workload, asked: Asked, own: str) -> Answer:
    """Return the answer to --tdp-pages for one VM, simulated with 1 to 64 vCPUs."""
    rows: list[dict[str, Any]] = []
    cells = []
    handling = work.costs.fault
    for vcpus in VCPUS:
        for variant in asked.variants:
            runs = [meet(work, vcpus, hold(work.locks.times(f), variant, vcpus)) for f in FACTORS]
            middle = runs[1]
            ns = hold(work.locks, variant, vcpus)
            spent = [run.waited + run.held for run in runs]
            path = middle.faults * handling + middle.links * work.costs.table
            demand = middle.links / max(middle.end, 1)  # links a ns
            busy = min(demand * ns, 1.0)
            chance = middle.links * busy * ns / 2  # links at random moments: on average half a hold is left
            at_once = middle.links * (vcpus - 1) * ns // 2  # all vCPUs link at once, and half of the others are ahead
            taken = (middle.links, middle.links) if variant == "list" else (0, middle.links if work.nx else 0)
            rows.append({
                "vcpus": vcpus, "variant": variant, "faults": middle.faults, "links": middle.links,
                "acquisitions": list(taken), "contended": middle.contended, "waited": middle.waited,
                "spent": spent[1], "between": [spent[0], spent[2]], "share": spent[1] / max(path, 1),
                "limit": [min(round(chance), at_once), at_once], "ceiling": 1e9 / ns, "demand": demand * 1e9,
            })  # fmt: skip
            cells.append([
                str(vcpus), variant, f"{middle.links:,}",
                f"{taken[0]:,}" if taken[0] == taken[1] else f"{taken[0]:,} .. {taken[1]:,}",
                f"{middle.contended:,}", duration(middle.waited),
                f"{duration(min(chance, at_once))} .. {duration(at_once)}",
                spread(*spent), f"{spent[1] / max(path, 1):.3%}", f"{demand * 1e9:,.3g} of {1e9 / ns:,.3g}",
            ])  # fmt: skip
    headers = [
        "vCPUs", "tables", "linked", "spinlock taken", "links that waited", "waited", "arithmetic", "time in it",
        "of the fault path", "links a second",
    ]  # fmt: skip
    unlinks = f", and {work.freed:,} times by the zap worker" if work.freed else ""
    notes = [
        f"the recording links {work.tables:,} tables: the list takes the spinlock {work.tables:,} times{unlinks}, the "
        f"counter for those that the NX workaround tracks only ({'0 to all' if work.nx else 'none: it was off'})",
        f"its {count(work.roots, 'root')} stand in neither; the list of roots has the same spinlock under either",
        "a counter's waits are for its cache line",
        "arithmetic: waits at random moments .. with all vCPUs at once (in step they can also meet more rarely)",
    ]
    if work.shadow:
        notes.append("recorded with the shadow MMU, which has neither: as the TDP MMU would link such tables")
    return Answer("tdp_pages", own, rows, (headers, cells), notes)
