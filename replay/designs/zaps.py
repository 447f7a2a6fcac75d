"""--zap-lock: kvm_zap_gfn_range under mmu_lock for read or write, with or without the notifier's count and sequence.

For write, faults wait until the range is zapped and flushed once. For read nobody waits, but each SPTE is frozen and
flushed by itself, and a fault that has read the old state may install it behind the zap. The sequence makes that fault
try again; it is compared under mmu_lock, so that it means something only if the zap had the lock for write.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, Final

from replay.designs.aging import FACTORS, limit
from replay.designs.answers import VCPUS, Answer, Asked, count, spread, time
from replay.designs.locks import Lock
from replay.designs.workload import Workload
from replay.virtual.costs import LockCosts

_ZAPPER: Final = -1
_TRIES: Final = 100  # of one fault, before it is taken to hang


@dataclass
class Met:
    """A run: what faults waited and what retries took (ns), how many; `late` began before a zap that they end behind.

    With count and sequence they are retried, without they install what they have read.
    """

    waited: int = 0
    longest: int = 0
    faults: int = 0
    late: int = 0
    again: int = 0
    hung: int = 0
    zaps: int = 0
    end: int = 0


def last(work: Workload, costs: LockCosts, pages: int, shared: bool) -> int:
    """ns of one zap."""
    leaves = min(pages * work.sptes, max(work.leaves, 1))
    if shared:
        return costs.call + leaves * (costs.zap_spte + costs.flush)
    return costs.call + leaves * costs.zap_spte + costs.flush


def meet(work: Workload, vcpus: int, period: float, ns: int, shared: bool, counted: bool) -> Met:
    """So many vCPUs fault at their pace; each `period` a range zap takes `ns`."""
    lock = Lock()
    met = Met()
    crowd = work.crowd(vcpus)
    gaps = [program.gap.tolist() for program, _ in crowd]
    # (request, vCPU, fault, when it read what it will map, tries)
    heap = [(0, _ZAPPER, 0, 0, 0)]
    for vcpu, (program, begin) in enumerate(crowd):
        at = begin + int(program.gap[0])
        heap.append((at, vcpu, 0, max(at - work.window, 0), 0))
    heapq.heapify(heap)
    again = work.costs.switch + work.window
    zapped = -1  # when the last zap ended that has been asked for
    before = -1  # and the one before it
    left = vcpus
    while left:
        at, who, i, read, tries = heapq.heappop(heap)
        if who == _ZAPPER:
            start = lock.take(at, ns, shared)
            met.zaps += 1
            before, zapped = zapped, start + ns
            heapq.heappush(heap, (max(round((i + 1) * period), zapped), who, i + 1, 0, 0))
            continue
        start = lock.free(at, work.faults_share)
        met.waited += start - at
        met.longest = max(met.longest, start - at)
        late = read < zapped <= start or read < before <= start
        met.late += late
        if late and counted and tries < _TRIES:  # it compares, and drops the lock
            met.again += again
            heapq.heappush(heap, (start + again, who, i, start + again - work.window, tries + 1))
            continue
        met.hung += late and counted
        met.faults += 1
        end = lock.take(at, work.hold, work.faults_share) + work.hold
        if i + 1 < len(gaps[who]):
            at = end + gaps[who][i + 1]
            heapq.heappush(heap, (at, who, i + 1, max(at - work.window, end), 0))
        else:
            met.end = max(met.end, end)
            left -= 1
    return met


WAYS: Final = (("write", True), ("write", False), ("read", False))


def answer(work: Workload, asked: Asked, own: str) -> Answer:
    """The table of --zap-lock."""
    rate = asked.rate or asked.default_rate
    pages = asked.pages or 1
    period = 1e9 / rate
    ways = [way for way in WAYS if way[0] in asked.variants]
    rows: list[dict[str, Any]] = []
    cells = []
    for vcpus in VCPUS:
        alone = meet(work, vcpus, 1e18, 0, False, False)
        for lock, counted in ways:
            shared = lock == "read"
            runs = [
                meet(work, vcpus, period, last(work, work.locks.times(f), pages, shared), shared, counted)
                for f in FACTORS
            ]
            middle = runs[1]
            ns = last(work, work.locks, pages, shared)
            waits = [max(run.waited - alone.waited, 0) for run in runs]
            free = shared and work.faults_share
            least, most = (0.0, 0.0) if free else limit(work, vcpus, middle.faults, middle.zaps, rate, ns)
            # In flight when a zap ends: for as long as a fault takes to ask, and for as long as it is kept out.
            late = rate / 1e9 * (middle.faults * (work.window + (0 if free else ns)) + alone.waited)
            rows.append({
                "vcpus": vcpus, "lock": lock, "counted": counted, "faults": middle.faults, "zaps": middle.zaps,
                "zap": ns, "waited": waits[1], "between": [waits[0], waits[2]], "longest": middle.longest,
                "limit": [round(least), round(most)], "retried": middle.late if counted else 0,
                "retries_took": middle.again, "exposed": 0 if counted else middle.late, "late_limit": late,
                "hung": middle.hung,
            })  # fmt: skip
            arithmetic = time(0) if free else f"{time(least)} .. {time(most)}"
            cells.append([
                str(vcpus), f"{lock}{', counted' if counted else ''}", time(ns), spread(*waits), arithmetic,
                f"{middle.late:,}" if counted else "-", time(middle.again) if counted else "-",
                "-" if counted else f"{middle.late:,}", f"{late:,.3g}",
            ])  # fmt: skip
    headers = [
        "vCPUs", "zap under the lock for", "a zap", "faults waited", "arithmetic", "retried", "retries took",
        "may install what is stale", "arithmetic",
    ]  # fmt: skip
    notes = [
        f"{rate:,.0f} zaps a second ({'asked for' if asked.rate else 'assumed'}) of "
        f"{count(pages, 'page')}, {count(work.sptes, 'SPTE')} a page",
        f"a fault is taken to have read what it will map {time(work.window)} before it asks for mmu_lock, the most "
        "that its handling leaves room for: retries and stale installs are upper ends, the lower is 0",
        "the sequence tells of every zap, whatever its range: each fault in flight tries again; a stale install is "
        "wrong only if it is of a zapped page",
    ]
    if not work.faults_share:
        notes.append(
            "this MMU's faults have mmu_lock for write or as a spinlock: a zap for read keeps them out as well"
        )
    return Answer("zap_lock", own, rows, (headers, cells), notes)
