# SPDX-License-Identifier: Apache-2.0
"""--aging: how long faults wait for an ager that holds mmu_lock for write, and what an ager meets that takes no lock.

One ager (kswapd) makes one aging call after another, at a given rate. Locked: a call waits for the readers of mmu_lock,
and later faults wait for the call. Lockless (6.15): nobody waits, but a walk may meet an SPTE that is being zapped, and
skips it.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from replay.timing.costs import LockCosts
from replay.whatif.answers import VCPUS, Answer, Asked, spread
from replay.whatif.locks import Lock, skipped
from replay.whatif.workload import FaultProgram, Workload
from traces.command_line.durations import duration
from traces.text import count

_AGER: Final = -1
FACTORS: Final = (0.5, 1.0, 2.0)  # by which the costs from the table may be off


@dataclass
class AgingRun:
    """The result of one simulated run; times are in ns.

    `waited` and `longest` are the total and the longest wait of the `faults`, `end` is when the last vCPU is done, and
    `ager_waited` is how long the ager waited in its `calls`.
    """

    waited: int = 0
    longest: int = 0
    faults: int = 0
    end: int = 0
    calls: int = 0
    ager_waited: int = 0


def walk(work: Workload, costs: LockCosts, pages: int) -> int:
    """Return the ns that one aging call over `pages` pages takes."""
    return costs.call + pages * work.sptes * costs.age_leaf


def meet(work: Workload, vcpus: int, period: float | None, ns: int, locks: bool = True) -> AgingRun:
    """Simulate `vcpus` vCPUs that fault at their pace, and an ager that walks for `ns` each `period` ns (None: never).

    With `locks` the ager holds mmu_lock for write during a walk.
    """
    lock = Lock()
    met = AgingRun()
    crowd = work.crowd(vcpus)
    heap = [(begin + int(program.gap[0]), vcpu, 0) for vcpu, (program, begin) in enumerate(crowd)]
    gaps = [program.gap.tolist() for program, _ in crowd]
    if period is not None:
        heap.append((0, _AGER, 0))
    heapq.heapify(heap)
    left = vcpus
    while left:
        at, who, i = heapq.heappop(heap)
        if who == _AGER:
            start = lock.take(at, ns, shares=False) if locks else at
            met.calls += 1
            met.ager_waited += start - at
            assert period is not None
            more = skipped(i, start + ns, heap[0][0], period, ns)
            met.calls += more
            ended = start + ns * (1 + more) if ns > period else start + ns
            heapq.heappush(heap, (max(round((i + more + 1) * period), ended), who, i + more + 1))
            continue
        start = lock.take(at, work.hold, work.faults_share)
        end = start + work.hold
        met.waited += start - at
        met.longest = max(met.longest, start - at)
        met.faults += 1
        if i + 1 < len(gaps[who]):
            heapq.heappush(heap, (end + gaps[who][i + 1], who, i + 1))
        else:
            met.end = max(met.end, end)
            left -= 1
    return met


def limit(work: Workload, vcpus: int, calls: int, rate: float, ns: int) -> tuple[float, float]:
    """Return by arithmetic the least and the most ns that faults wait for a lock taken for `ns`, `rate` times a second.

    The calls come at random moments. The least: each call keeps faults out for its own `ns`. The most: it also keeps
    them out while it waits for a reader, for `hold` at the longest; the run gets longer, so that more calls fall into
    it; and no fault waits for more than one call and one reader. Where faults exclude each other they queue, and each
    of the `calls` delays every vCPU by at most `ns`.
    """
    rate = min(rate, 1e9 / ns) / 1e9
    least = sum(_kept_out(program, work.hold, ns) * rate for program, _ in work.crowd(vcpus))
    if not work.faults_share:
        return least, max(least, float(calls * vcpus * ns))
    longest = ns + work.hold
    most = 0.0
    for program, _ in work.crowd(vcpus):
        kept_out = _kept_out(program, work.hold, longest) * rate
        alone = int(program.gap.sum()) + len(program.gap) * work.hold
        prolonged = kept_out / max(1 - kept_out / alone, 1e-9)
        most += min(prolonged, float(len(program.gap) * longest))
    return least, most


def _kept_out(program: FaultProgram, hold: int, ns: int) -> float:
    """Return the sum of ns * ns over all requests of a vCPU: multiplied by a rate, the ns that it waits.

    If a vCPU's next request is due in r < `ns` when the lock is taken, it waits for `ns` - r, once.
    """
    short = np.minimum(program.gap + hold, ns).astype(np.float64)
    return float((short * ns - short * short / 2).sum())


def non_present(work: Workload, rate: float, ns: int, pages: int) -> float:
    """Return how many lockless walks meet an SPTE while it is being zapped,
    at most: those in a zap's range while it lasts.
    """
    met = 0.0
    for leaves in work.zaps:
        lasts = work.locks.call + leaves * work.locks.zap_spte + work.locks.flush
        inside = min((leaves + pages * work.sptes - 1) / max(work.leaves, leaves, 1), 1.0) if leaves else 0.0
        met += rate / 1e9 * (lasts + ns) * inside
    return met


def answer(work: Workload, asked: Asked, own: str) -> Answer:
    """Return the answer to --aging for one VM, simulated with 1 to 64 vCPUs."""
    seconds = work.wall / 1e9
    recorded = work.aged / seconds if work.aged and seconds else 0.0
    rate = asked.rate or recorded or asked.default_rate
    pages = asked.pages or (max(work.aged_pages // work.aged, 1) if work.aged else 1)
    period = 1e9 / rate
    ns = walk(work, work.locks, pages)
    met = non_present(work, rate, ns, pages)
    rows: list[dict[str, Any]] = []
    cells = []
    for vcpus in VCPUS:
        alone = meet(work, vcpus, None, 0)
        row: dict[str, Any] = {"vcpus": vcpus, "faults": alone.faults, "without_ager": alone.waited}
        shown = [str(vcpus), f"{alone.faults:,}"]
        if "locked" in asked.variants:
            runs = [meet(work, vcpus, period, walk(work, work.locks.times(f), pages)) for f in FACTORS]
            middle = runs[1]
            least, most = limit(work, vcpus, middle.calls, rate, ns)
            waits = [run.waited - alone.waited for run in runs]
            row["locked"] = {
                "waited": waits[1], "between": [waits[0], waits[2]], "longest": middle.longest,
                "calls": middle.calls, "ager_waited": middle.ager_waited, "end": middle.end,
                "limit": [round(least), round(most)],
            }  # fmt: skip
            shown += [
                spread(*waits), duration(waits[1] / max(middle.faults, 1)), duration(middle.longest),
                f"{duration(least)} .. {duration(most)}", f"{middle.end / max(alone.end, 1) - 1:.1%}",
            ]  # fmt: skip
        if "lockless" in asked.variants:
            free = meet(work, vcpus, period, ns, locks=False)
            row["lockless"] = {
                "waited": free.waited - alone.waited, "calls": free.calls, "end": free.end, "non_present": met,
            }  # fmt: skip
            shown.append(duration(free.waited - alone.waited))
        rows.append(row)
        cells.append(shown)
    headers = ["vCPUs", "faults"]
    if "locked" in asked.variants:
        headers += ["locked: waited for the ager", "a fault", "longest", "arithmetic", "longer by"]
    if "lockless" in asked.variants:
        headers.append("lockless: waited")
    source = "asked for" if asked.rate else "as recorded" if recorded else "assumed: none is recorded"
    each = f"{count(pages, 'page')} each, {count(work.sptes, 'SPTE')} a page"
    load = f"{rate * ns / 1e9:.1%} of its time" if rate * ns < 1e9 else "all of its time"
    notes = [
        f"one ager, {rate:,.0f} calls a second ({source}), {each}: "
        f"{duration(ns)} under the lock, {load}; it cannot be more than {1e9 / ns:,.0f} a second",
        f"lockless walks that may meet a non-present SPTE: at most {met:,.3g} over the recording, of "
        f"{len(work.zaps):,} zaps that took {sum(work.zaps):,} SPTEs; under mmu_lock none can",
    ]
    return Answer("aging", own, rows, (headers, cells), notes)
