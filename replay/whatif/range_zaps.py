# SPDX-License-Identifier: Apache-2.0
"""--zap-lock: kvm_zap_gfn_range under mmu_lock for read or write, with or without the notifier's count and sequence.

For write, faults wait until the range is zapped and flushed once. For read nobody waits, but each SPTE is frozen and
flushed by itself. A fault looks up the page that it will map before it takes mmu_lock. If it does so before a zap
begins, and installs the SPTE after that, the SPTE is stale (the APIC page, as if APICv were still on). With count and
sequence, the fault checks under mmu_lock whether a zap has ended since the lookup or is under way, and if so tries
again. With the lock held for read that is not enough: a zap may begin between the check and the install.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from replay.timing.costs import LockCosts
from replay.whatif.aging import FACTORS, limit
from replay.whatif.answers import VCPUS, Answer, Asked, spread
from replay.whatif.locks import Lock, skipped
from replay.whatif.workload import Workload
from traces.command_line.durations import duration
from traces.text import count

_ZAPPER: Final = -1
_TRIES: Final = 100  # tries after which a fault counts as hung


@dataclass
class RangeZapRun:
    """The result of one simulated run; times are in ns.

    `waited` and `longest` are the total and the longest wait of the `faults`; `retried` is the number of retries and
    `again` the time that they took; `end` is when the last vCPU is done. `stale` is the number of faults that installed
    what they had looked up before a zap began, and `hung` the number of faults that gave up trying.
    """

    waited: int = 0
    longest: int = 0
    faults: int = 0
    retried: int = 0
    again: int = 0
    stale: int = 0
    hung: int = 0
    zaps: int = 0
    end: int = 0


def last(work: Workload, costs: LockCosts, pages: int, shared: bool) -> int:
    """Return the ns that one zap takes, under the lock for read (`shared`) or for write."""
    leaves = min(pages * work.sptes, max(work.leaves, 1))
    if shared:
        return costs.call + leaves * (costs.zap_spte + costs.flush)
    return costs.call + leaves * costs.zap_spte + costs.flush


def meet(work: Workload, vcpus: int, period: float, ns: int, shared: bool, counted: bool) -> RangeZapRun:
    """Simulate `vcpus` vCPUs that fault at their pace, while a range zap begins every `period` ns and takes `ns`.

    With `counted` a fault compares the notifier's count and sequence, and is retried.
    """
    lock = Lock()
    met = RangeZapRun()
    crowd = work.crowd(vcpus)
    gaps = [program.gap.tolist() for program, _ in crowd]
    # (time of the request, vCPU, number of the fault, when it looked up its page, tries)
    heap = [(0, _ZAPPER, 0, 0, 0)]
    for vcpu, (program, begin) in enumerate(crowd):
        at = begin + int(program.gap[0])
        heap.append((at, vcpu, 0, max(at - work.window, 0), 0))
    heapq.heapify(heap)
    again = work.costs.switch + work.window
    zaps = [(-1, -1), (-1, -1)]  # begin and end of the last two zaps
    holding: list[tuple[int, int]] = []  # from when and until when each fault since the last zap holds the lock
    left = vcpus
    while left:
        at, who, i, read, tries = heapq.heappop(heap)
        if who == _ZAPPER:
            begin = lock.take(at, ns, shared)
            met.zaps += 1
            met.stale += sum(since < begin < until for since, until in holding)
            holding = [(since, until) for since, until in holding if until > begin]
            zaps = [zaps[1], (begin, begin + ns)]
            more = 0 if holding else skipped(i, begin + ns, heap[0][0], period, ns)
            met.zaps += more
            ended = begin + ns * (1 + more) if ns > period else begin + ns
            heapq.heappush(heap, (max(round((i + more + 1) * period), ended), who, i + more + 1, 0, 0))
            continue
        start = lock.free(at, work.faults_share)
        met.waited += start - at
        met.longest = max(met.longest, start - at)
        sees = any(read < ended and begin <= start for begin, ended in zaps)
        if sees and counted and tries < _TRIES:  # the fault sees that the sequence changed, and drops the lock
            met.retried += 1
            met.again += again
            heapq.heappush(heap, (start + again, who, i, start + again - work.window, tries + 1))
            continue
        met.hung += sees and counted
        met.stale += not counted and any(read < begin <= start for begin, _ in zaps)
        met.faults += 1
        end = lock.take(at, work.hold, work.faults_share) + work.hold
        if shared:
            holding.append((start, end))
        if i + 1 < len(gaps[who]):
            at = end + gaps[who][i + 1]
            heapq.heappush(heap, (at, who, i + 1, max(at - work.window, end), 0))
        else:
            met.end = max(met.end, end)
            left -= 1
    return met


def caught(
    work: Workload, vcpus: int, rate: float, ns: int, shared: bool, counted: bool, waited: int
) -> tuple[float, float]:
    """Return by arithmetic how many faults are retried and how many install a stale page, if zaps come at random.

    Stale are faults that have looked up their page and not yet asked for the lock, or that wait for other reasons
    (`waited` ns in all), when a zap begins; under a shared lock also those that hold it then. Retried are these, and
    those that ask for the lock while a zap is under way.
    """
    crowd = work.crowd(vcpus)
    faults = sum(len(program.gap) for program, _ in crowd)
    each = rate / 1e9
    read = sum(float(np.minimum(program.gap, work.window).sum()) for program, _ in crowd) + waited
    held = faults * work.hold if shared else 0
    if not counted:
        return 0.0, each * (read + held)
    if shared:
        return each * (read + faults * ns), each * held
    reach = sum(float(np.minimum(program.gap, work.window + ns).sum()) for program, _ in crowd) + waited
    return each * reach, 0.0


WAYS: Final = (("write", True), ("write", False), ("read", True), ("read", False))


def answer(work: Workload, asked: Asked, own: str) -> Answer:
    """Return the answer to --zap-lock for one VM, simulated with 1 to 64 vCPUs."""
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
            free = shared and work.faults_share  # readers on both sides: nobody waits, whatever a zap costs
            ns = last(work, work.locks, pages, shared)
            middle = meet(work, vcpus, period, ns, shared, counted)
            runs = [
                middle if free or f == 1 else
                meet(work, vcpus, period, last(work, work.locks.times(f), pages, shared), shared, counted)
                for f in FACTORS
            ]  # fmt: skip
            waits = [run.waited - alone.waited for run in runs]
            least, most = (0.0, 0.0) if free else limit(work, vcpus, middle.zaps, rate, ns)
            retried, stale = caught(work, vcpus, rate, ns, free, counted, alone.waited)
            rows.append({
                "vcpus": vcpus, "lock": lock, "counted": counted, "faults": middle.faults, "zaps": middle.zaps,
                "zap": ns, "waited": waits[1], "between": [waits[0], waits[2]], "longest": middle.longest,
                "limit": [round(least), round(most)], "retried": middle.retried, "retried_limit": retried,
                "retries_took": middle.again, "stale": middle.stale, "stale_limit": stale, "hung": middle.hung,
            })  # fmt: skip
            arithmetic = duration(0) if free else f"{duration(least)} .. {duration(most)}"
            cells.append([
                str(vcpus), f"{lock}{', counted' if counted else ''}", duration(ns), spread(*waits), arithmetic,
                f"{middle.retried:,}", f"{retried:,.0f}", duration(middle.again), f"{middle.stale:,}", f"{stale:,.0f}",
            ])  # fmt: skip
    headers = [
        "vCPUs", "zap under the lock for", "a zap", "faults waited", "arithmetic", "retried", "arithmetic",
        "retries took", "may install what is stale", "arithmetic",
    ]  # fmt: skip
    notes = [
        f"{rate:,.0f} zaps a second ({'asked for' if asked.rate else 'assumed'}) of "
        f"{count(pages, 'page')}, {count(work.sptes, 'SPTE')} a page",
        f"a fault is taken to have read what it will map {duration(work.window)} before it asks for mmu_lock, the most "
        "that its handling leaves room for: retries and stale installs are upper ends, the lower is 0",
        "the sequence tells of every zap, whatever its range: each fault in flight tries again; a stale install is "
        "wrong only if it is of a zapped page",
    ]
    if not work.faults_share:
        notes.append(
            "this MMU's faults have mmu_lock for write or as a spinlock: a zap for read keeps them out as well"
        )
    return Answer("zap_lock", own, rows, (headers, cells), notes)
