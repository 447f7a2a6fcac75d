# SPDX-License-Identifier: Apache-2.0
"""The reference clock: a discrete-event simulation of one VM over its reference model, one operation at a time.

The actors are the vCPUs, the wall clock (which acts on vCPUs and on the VM), and the zap worker. The next event is the
one with the least (time, priority, queue), so a replay is the same to the ns wherever blocks are cut. The guest's own
work does not change: an operation's `lead` passes as recorded. What changes is which operations cost an exit, and how
much:

- A touch that hits takes no exit: its handling and the switch are saved. - A fault takes its recorded handling time,
adjusted for the number of tables that it builds now. A refill takes that for each leaf. - A load takes its recorded
time if it ends as recorded, else the cost of the other kind of load. - Faults, loads and unloads hold mmu_lock for a
while, for read or for write as in the kernel; others queue for it. - The last put of a root zaps inline, if the policy
does so: the vCPU pays, and others wait for mmu_lock. Or it queues the zap for the worker, which holds mmu_lock for read
meanwhile: loads that want it for write wait, and if CPUs are short, all vCPUs do.

Waits for mmu_lock that the recorded costs contain were removed before (`lock_waits`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from replay.simulate import dispatch
from replay.simulate.model_state import Happened, Vcpu
from replay.simulate.operations import Op, Ranges
from replay.simulate.reference import Vm
from replay.simulate.timed_operations import CREATED, FOUND, LAST, NEVER, Timed
from replay.timing.costs import Costs

SAMPLE = 1_000_000  # ns between two samples of a vCPU's progress


class TimeCategory(IntEnum):
    """The time breakdown of a vCPU: what its virtual time is spent on."""

    GUEST = 0
    FAULT = 1
    LOAD = 2
    UNLOAD = 3  # including inline zaps
    WAIT = 4  # waiting for mmu_lock, or for a CPU that the zap worker uses
    OTHER = 5  # exits that no policy changes
    SWITCH = 6  # switches to the guest and back for faults; a recording shows them as guest time
    IDLE = 7  # the guest has halted
    # The clock does not compute these two: they are added to its result (`steal_curve`; PAUSED as recorded).
    STEAL = 8  # the thread could run and had no CPU
    PAUSED = 9  # userspace does not run the vCPU


@dataclass
class Pace:
    """One vCPU's progress through its operations."""

    clock: int = 0  # ns
    lead: int = -1  # ns left of the next operation's lead; -1: all of it
    guest: int = 0  # the part of `lead` in the guest
    idle: int = 0  # the part of `lead` for which the guest had halted
    inside: bool = False  # an SMI is under way
    spent: list[int] = field(default_factory=lambda: [0] * len(TimeCategory))
    sampled: int = 0
    samples: list[tuple[int, ...]] = field(default_factory=list)  # (clock, Cause of the last unload, *spent)


@dataclass
class _Todo:
    op: int
    gfn: int
    lead: int
    guest: int
    idle: int
    cost: int
    was: int
    wall: int
    at: int
    ranges: Ranges


class Clock:
    """One VM in virtual time: `feed` it timed blocks, then call `finish`. All times are in ns."""

    def __init__(self, vm: Vm, costs: Costs, weights: Sequence[int] = ()) -> None:
        """`weights` is each vCPU's relative share in the time that a zap worker takes when CPUs are short.

        By default equal.
        """
        self.vm = vm
        self._weights = weights or [1] * len(vm.vcpus)
        self.costs = costs
        self.paces = [Pace() for _ in vm.vcpus]
        self.begun = 0  # when the zap worker begins its current work
        self.worker = 0  # when the zap worker finishes it
        self.locked = 0  # until when mmu_lock is held for write
        self.shared = 0  # until when mmu_lock is held for read, not counting the worker
        self.worked = 0  # ns that the worker took in all
        self.jobs = 0
        self._hold = costs.hold if len(vm.vcpus) > 1 else 0
        self._queues: list[deque[_Todo]] = [deque() for _ in range(2 * len(vm.vcpus) + 1)]

    def feed(self, timed: Timed, ranges: Ranges, first: int = 0) -> None:
        """Take in operations, and perform those whose turn does not depend on operations that are still to come."""
        block = timed.block
        columns = (block.op, block.gfn, timed.lead, timed.guest, timed.idle, timed.cost, timed.was, timed.wall)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for i, (op, gfn, lead, guest, idle, cost, was, wall) in enumerate(rows):
            todo = _Todo(op, gfn, lead, guest, idle, cost, was, wall, first + i, ranges)
            self._queues[int(timed.queue[i])].append(todo)
        self._run(final=False, until=timed.until)

    def finish(self) -> None:
        """Perform the rest after the last block: wall-clock operations happen until every vCPU's program has ended."""
        self._run(final=True, until=NEVER)

    def _run(self, final: bool, until: int) -> None:
        while not final or any(self._queues[: len(self.paces)]):
            best: tuple[int, int, int] | None = None
            for queue in range(len(self._queues)):
                when = self._when(queue, final)
                if when == -1:
                    return
                if when is not None and (best is None or (when, self._priority(queue), queue) < best):
                    best = (when, self._priority(queue), queue)
            if best is None or best[0] >= until:
                return
            self._do(best[0], best[2])

    def _priority(self, queue: int) -> int:
        vcpus = len(self.paces)
        return 0 if queue == 2 * vcpus else 1 if queue >= vcpus else 2

    def _when(self, queue: int, final: bool) -> int | None:
        """Return when a queue's next operation is due; None: it has none, or must wait; -1: not known yet."""
        vcpus = len(self.paces)
        todo = self._queues[queue][0] if self._queues[queue] else None
        if todo is None:
            awaited = queue < vcpus or (queue < 2 * vcpus and self.paces[queue - vcpus].inside)
            return -1 if awaited and not final else None
        if queue == 2 * vcpus:
            return max(todo.wall, 0)
        pace = self.paces[queue % vcpus]
        if queue < vcpus:
            if pace.inside:
                return None
            return pace.clock + (todo.lead if pace.lead < 0 else pace.lead)
        return max(todo.wall, pace.clock) if todo.wall >= 0 else pace.clock + todo.lead

    def _do(self, when: int, queue: int) -> None:
        vcpus = len(self.paces)
        todo = self._queues[queue].popleft()
        if queue == 2 * vcpus:
            self._perform(todo)  # its time does not depend on the policy, and is already in the recorded leads
            return
        number = queue % vcpus
        pace = self.paces[number]
        if queue < vcpus:
            if pace.lead < 0:
                pace.lead, pace.guest, pace.idle = todo.lead, todo.guest, todo.idle
            guest = pace.guest
            self._pass(pace, pace.lead, guest, pace.idle)
            pace.lead = -1
        elif todo.wall >= 0:
            self._interrupt(pace, queue - vcpus, when)
            guest = 0
        else:
            guest = todo.guest
            self._pass(pace, todo.lead, guest, todo.idle)
        if queue >= vcpus:
            pace.inside = todo.wall != LAST
        self._step(pace, self.vm.vcpus[number], todo, guest)
        self._sample(pace, self.vm.vcpus[number])

    def _pass(self, pace: Pace, lead: int, guest: int, idle: int) -> None:
        pace.clock += lead
        pace.spent[TimeCategory.GUEST] += guest
        pace.spent[TimeCategory.IDLE] += idle
        pace.spent[TimeCategory.OTHER] += lead - guest - idle

    def _interrupt(self, pace: Pace, program: int, when: int) -> None:
        """Let the part of the program's lead pass that precedes a wall-clock event.

        Guest time passes first, then idle time.
        """
        passed = when - pace.clock
        head = self._queues[program][0] if self._queues[program] else None
        if head is None:
            self._pass(pace, passed, 0, 0)
            return
        if pace.lead < 0:
            pace.lead, pace.guest, pace.idle = head.lead, head.guest, head.idle
        ran = min(passed, pace.guest)
        halted = min(passed - ran, pace.idle)
        self._pass(pace, passed, ran, halted)
        pace.lead -= passed
        pace.guest -= ran
        pace.idle -= halted

    def _step(self, pace: Pace, vcpu: Vcpu, todo: _Todo, guest: int) -> None:
        kind = todo.op & 15
        counters, costs = self.vm.counters, self.costs
        faults, hits, tables = vcpu.faults, vcpu.hits, counters.tables
        prefetched = counters.prefetched
        held = any(root is not None for root in vcpu.slots)
        fixes, creations, reuses, logged = vcpu.fixes, vcpu.creations, vcpu.reuses, len(self.vm.log)
        self._perform(todo)
        refilled = [row for row in self.vm.log[logged:] if row.event == Happened.CREATED and row.leaves + row.tables]
        leaves, built = sum(row.leaves for row in refilled), sum(row.tables for row in refilled)
        built_now = counters.tables - tables - built
        own = vcpu.faults - faults - leaves
        created, found = vcpu.creations - creations, vcpu.reuses - reuses

        parameters = self.vm.parameters
        loads = created + found > 0 or kind == Op.UNLOAD
        exclusive = (loads and not parameters.loads_share) or (own > 0 and not parameters.faults_share)
        if loads or own:
            self._wait(pace, exclusive)
        since = pace.clock
        if leaves or built:
            self._spend(pace, TimeCategory.FAULT, (leaves * costs.fault + built * costs.table) * costs.refill // 1000)
            self._spend(pace, TimeCategory.SWITCH, leaves * costs.switch * costs.refill // 1000)
        if kind in (Op.TOUCH, Op.FIX):
            if vcpu.hits > hits:
                saved = min(costs.switch, guest) if todo.was else 0
                self._spend(pace, TimeCategory.GUEST, -saved)
            elif own or vcpu.fixes > fixes:
                time = todo.cost if todo.was else costs.fault
                time += (built_now - max(todo.was - 1, 0)) * costs.table if own else 0
                self._spend(
                    pace, TimeCategory.FAULT, max(time, 0) + (counters.prefetched - prefetched) * costs.prefetch
                )
                self._switch(pace, todo.was, guest)
        elif kind == Op.UNLOAD:
            self._spend(pace, TimeCategory.UNLOAD, todo.cost if todo.was else costs.unload if held else 0)
        if created + found:
            ended = CREATED if created else FOUND
            expected = costs.created if created else costs.found
            time = expected
            if kind == Op.ENTER and todo.was:
                recorded = costs.created if todo.was == CREATED else costs.found
                time = todo.cost + (expected - recorded if ended != todo.was else 0)
            self._spend(pace, TimeCategory.LOAD, max(time, 0))
        if loads or own:
            self._take(exclusive, since, min(since + self._hold, pace.clock))
        self._account_frees(pace, logged)

    def _switch(self, pace: Pace, was: int, guest: int) -> None:
        """Account a fault's exit and entry as SWITCH.

        If the fault was recorded they are part of the guest time before it; if it was not, their time is added.
        """
        if not was:
            self._spend(pace, TimeCategory.SWITCH, self.costs.switch)
            return
        within = min(self.costs.switch, guest)
        pace.spent[TimeCategory.GUEST] -= within
        pace.spent[TimeCategory.SWITCH] += within

    def _spend(self, pace: Pace, on: TimeCategory, ns: int) -> None:
        pace.clock += ns
        pace.spent[on] += ns

    def _wait(self, pace: Pace, exclusive: bool) -> None:
        """Wait for mmu_lock.

        A holder for write stops everyone; a holder for read, like the worker, stops who wants it for write.

        The lock is granted in order of request, as the kernel's queued locks do; vCPUs request it in the order of their
        exits.
        """
        until = max(self.locked, self.shared) if exclusive else self.locked
        if exclusive and self.begun <= pace.clock < self.worker:
            left = self.worker - pace.clock
            until = max(until, pace.clock + (min(left, self.costs.chunk) if self.costs.chunk else left))
        if until > pace.clock:
            self._spend(pace, TimeCategory.WAIT, until - pace.clock)

    def _take(self, exclusive: bool, since: int, until: int) -> None:
        """Hold mmu_lock, which is free at `since`, until `until`."""
        if until > since and exclusive:
            self.locked = max(self.locked, until)
        elif until > since:
            self.shared = max(self.shared, until)

    def _account_frees(self, pace: Pace, logged: int) -> None:
        """Account the zaps of roots that were freed, inline or by the worker as the policy has it."""
        teardown, costs = self.vm.parameters.teardown, self.costs
        for row in self.vm.log[logged:]:
            if row.event != Happened.FREED or not row.tables:
                continue
            work = row.leaves * costs.zap_leaf + row.tables * costs.zap_table
            if teardown == "inline":
                self._spend(pace, TimeCategory.UNLOAD, work)
                self.locked = max(self.locked, pace.clock)
            elif teardown == "worker":
                self._queue_zap(pace.clock, work)

    def _queue_zap(self, now: int, work: int) -> None:
        begins = now + self.costs.job
        if begins > self.worker:
            self.begun = self.worker = begins
        self.worker += work
        self.worked += work
        self.jobs += 1
        busy = len(self.paces) + 1
        if 0 < self.costs.cpus < busy:
            for pace, weight in zip(self.paces, self._weights, strict=True):  # each vCPU gives up its share
                self._spend(pace, TimeCategory.WAIT, work * (busy - self.costs.cpus) * weight // sum(self._weights))

    def _perform(self, todo: _Todo) -> None:
        self.vm.at = todo.at
        dispatch.perform(self.vm, todo.op, todo.gfn, todo.ranges)

    def _sample(self, pace: Pace, vcpu: Vcpu) -> None:
        if pace.clock - pace.sampled >= SAMPLE:
            pace.sampled = pace.clock
            pace.samples.append((pace.clock, int(vcpu.cause), *pace.spent))
