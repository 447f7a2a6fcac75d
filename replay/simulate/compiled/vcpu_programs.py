# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Run vCPUs' operations on the core, and spend each vCPU's time on what they cost, on waits, and in the guest.

Between operations the guest runs, or the vCPU is halted, as recorded. An operation costs what it took in the recording,
where the recording shows it, and else what one of its kind costs. A fault and a load wait for mmu_lock and then hold
it; the zap of a root that was put last is its vCPU's own work, or is queued for the zap worker.

What is done for each operation stands together here, so that C's compiler can put it into the loop of `_program`.
"""

from __future__ import annotations

import cython

from replay.simulate.compiled.turns import Turns
from replay.simulate.operations import Op

NONE = cython.declare(cython.longlong, -1)  # stands for no operation, and for no lead under way
FIX = cython.declare(cython.longlong, int(Op.FIX))
ENTER = cython.declare(cython.longlong, int(Op.ENTER))
UNLOAD = cython.declare(cython.longlong, int(Op.UNLOAD))
# The values of simulate.timed_operations and timing.reference_clock. The latter must not be imported from this layer;
# test_clock compares them.
WAS_FOUND = cython.declare(cython.longlong, 1)
WAS_CREATED = cython.declare(cython.longlong, 2)
SAMPLE = cython.declare(cython.longlong, 1000000)  # ns
ON_GUEST = cython.declare(cython.longlong, 0)
ON_FAULT = cython.declare(cython.longlong, 1)
ON_LOAD = cython.declare(cython.longlong, 2)
ON_UNLOAD = cython.declare(cython.longlong, 3)
ON_WAIT = cython.declare(cython.longlong, 4)
ON_OTHER = cython.declare(cython.longlong, 5)
ON_SWITCH = cython.declare(cython.longlong, 6)
ON_IDLE = cython.declare(cython.longlong, 7)


@cython.cclass
class VcpuPrograms(Turns):
    """What operations cost, what each vCPU's time went to, and until when mmu_lock and the zap worker are taken."""

    sample: cython.pointer[Sample]
    sample_room: cython.longlong
    samples: cython.longlong

    # Costs in ns, and parameters; `inline` and `by_worker` say who zaps a root after its last put
    switch: cython.longlong
    fault: cython.longlong
    table: cython.longlong
    found: cython.longlong
    created: cython.longlong
    unload: cython.longlong
    zap_leaf: cython.longlong
    zap_table: cython.longlong
    job: cython.longlong
    chunk: cython.longlong
    refill: cython.longlong
    cpus: cython.longlong
    hold: cython.longlong
    prefetch: cython.longlong
    faults_share: cython.longlong
    loads_share: cython.longlong
    inline: cython.longlong
    by_worker: cython.longlong
    weights: cython.longlong

    # State
    begun: cython.longlong
    worker: cython.longlong
    locked: cython.longlong
    shared: cython.longlong
    worked: cython.longlong
    jobs: cython.longlong

    def attach_put(self, put: cython.uchar[::1], room: cython.longlong) -> None:
        """Let the core say in this pool what it frees; it has room for all roots that one operation can free."""
        self.core.put_room = room
        if cython.compiled:
            self.core.put = cython.cast(cython.pointer[Zapped], cython.address(put[0]))
        else:
            self.core.put = put

    def attach_samples(self, sample: cython.uchar[::1], room: cython.longlong) -> None:
        """Use this pool for samples, which are written from row `samples` on."""
        if cython.compiled:
            self.sample = cython.cast(cython.pointer[Sample], cython.address(sample[0]))
        else:
            self.sample = sample
        self.sample_room = room

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _program(self, v: cython.longlong, bound: cython.longlong) -> cython.bint:
        """Run a vCPU's own operations that are due before `bound`; return True if one of them could not be finished."""
        bits: cython.pointer[cython.ulonglong] = self.core.bits
        gen: cython.pointer[cython.longlong] = self.core.gen
        vcpu: cython.pointer[Vcpu] = self.core.vcpu
        word: cython.pointer[Word] = self.core.word
        todo: cython.pointer[Todo] = self.todo
        pace: cython.pointer[Pace] = self.pace
        special: cython.longlong = 0x2070 if self.core.prefetch else 0x2060
        i: cython.longlong = self.queue[v].head
        o: cython.longlong
        level: cython.longlong
        page: cython.longlong
        k: cython.longlong
        bit: cython.longlong
        fault: cython.longlong
        lead: cython.longlong
        guest: cython.longlong
        idle: cython.longlong
        time: cython.longlong
        since: cython.longlong
        was: cython.longlong
        present: cython.ulonglong
        ever: cython.ulonglong
        one: cython.ulonglong = 1

        while i != NONE:
            lead = todo[i].lead
            guest = todo[i].guest
            idle = todo[i].idle
            if pace[v].lead >= 0:
                lead = pace[v].lead
                guest = pace[v].guest
                idle = pace[v].idle
            if pace[v].clock + lead >= bound:
                break
            if self.samples == self.sample_room:
                return True
            if pace[v].guessed == 0:
                self._guess(v, i)
            o = todo[i].op
            page = todo[i].guess
            fault = NONE
            if o & 15 == 0 and gen[page] == vcpu[v].gen:
                # The fast path, as in Core._run.
                level = o >> 4 & 7
                k = todo[i].gfn >> (level - 1) * 9 & 511
                bit = k & 63
                k = page * 16 + (k >> 6) * 2
                present = bits[k]
                fault = present >> bit & 1 ^ 1
                if o & special & -fault:
                    fault = NONE
            if fault == NONE:
                if not self.core._room():
                    return True
                self._pass(v, lead, guest, idle)
                if self._step(v, i, guest):
                    todo[i].lead = todo[i].guest = todo[i].idle = 0
                    pace[v].lead = NONE
                    return True
            else:
                self._pass(v, lead, guest, idle)
                ever = bits[k + 1]
                bits[k] = present | one << bit
                bits[k + 1] = ever | one << bit
                vcpu[v].faults += fault
                vcpu[v].refaults += ever >> bit & fault
                vcpu[v].hits += fault ^ 1
                word[vcpu[v].word].leaves += fault
                was = todo[i].was
                if fault:
                    if self.core.vcpus > 1:
                        self._wait(v, not self.faults_share)
                    since = pace[v].clock
                    time = todo[i].cost if was else self.fault
                    if was > 1:
                        time = max(time - (was - 1) * self.table, 0)
                    self._spend(v, ON_FAULT, time)
                    self._switch(v, was, guest)
                    if self.core.vcpus > 1:
                        self._take(v, not self.faults_share, since)
                elif was:
                    self._spend(v, ON_GUEST, -min(self.switch, guest))
            pace[v].lead = NONE
            pace[v].guessed -= 1
            self._pop(v, i)
            self._sample(v)
            i = self.queue[v].head
        return False

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _guess(self, v: cython.longlong, i: cython.longlong) -> cython.void:
        """Run the first pass of Core._run over the next operations of a program."""
        child: cython.pointer[cython.uint] = self.core.child
        vcpu: cython.pointer[Vcpu] = self.core.vcpu
        todo: cython.pointer[Todo] = self.todo
        g: cython.longlong
        o: cython.longlong
        level: cython.longlong
        node: cython.longlong
        low: cython.longlong
        page: cython.longlong
        guessed: cython.longlong = 0
        while guessed < 64:
            guessed += 1
            o = todo[i].op
            g = todo[i].gfn
            if o & 15 == 0:
                node = vcpu[v].top
                if vcpu[v].deep:
                    node = child[node * 512 + (g >> 36 & 511)]
                node = child[node * 512 + (g >> 27 & 511)]
                low = child[node * 512 + (g >> 18 & 511)]
                page = child[low * 512 + (g >> 9 & 511)]
                level = o >> 4 & 7
                if level != 1:
                    page = self.core.page_of[low if level == 2 else node]
                todo[i].guess = cython.cast(cython.uint, page)
            elif o & 14 == 4:
                vcpu[v].top = self.core.word[g].top
                vcpu[v].deep = self.core.word[g].level == 5
            if todo[i].next == 0:
                break
            i += todo[i].next
        self.pace[v].guessed = guessed

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _step(self, v: cython.longlong, i: cython.longlong, guest: cython.longlong) -> cython.bint:
        """Run one operation of a vCPU on the slow path, and account its time.

        Return True if it could not be finished.
        """
        o: cython.longlong = self.todo[i].op
        was: cython.longlong = self.todo[i].was
        kind: cython.longlong = o & 15
        faults: cython.longlong = self.core.vcpu[v].faults
        hits: cython.longlong = self.core.vcpu[v].hits
        tables: cython.longlong = self.core.tables
        prefetched: cython.longlong = self.core.prefetched
        held: cython.bint = (
            self.core.slots[v].slot[0] | self.core.slots[v].slot[1] | self.core.slots[v].slot[2]
            | self.core.slots[v].slot[3]
        ) != 0  # fmt: skip
        fixes: cython.longlong = self.core.slots[v].fixes
        created: cython.longlong = self.core.slots[v].creations
        found: cython.longlong = self.core.slots[v].reuses
        leaves: cython.longlong
        time: cython.longlong
        since: cython.longlong
        put: cython.longlong
        loads: cython.bint
        exclusive: cython.bint
        self.core.assumed_leaves = self.core.assumed_tables = self.core.puts = 0
        self.core.at = self.todo[i].at
        if self.core._do(o, self.todo[i].gfn):
            return True
        leaves = self.core.assumed_leaves
        faults = self.core.vcpu[v].faults - faults - leaves
        tables = self.core.tables - tables - self.core.assumed_tables
        created = self.core.slots[v].creations - created
        found = self.core.slots[v].reuses - found

        loads = created or found or kind == UNLOAD
        exclusive = (loads and not self.loads_share) or (faults > 0 and not self.faults_share)
        if loads or faults:
            self._wait(v, exclusive)
        since = self.pace[v].clock
        if leaves or self.core.assumed_tables:
            time = (leaves * self.fault + self.core.assumed_tables * self.table) * self.refill // 1000
            self._spend(v, ON_FAULT, time)
            self._spend(v, ON_SWITCH, leaves * self.switch * self.refill // 1000)
        if kind <= FIX:
            if self.core.vcpu[v].hits > hits:
                if was:
                    self._spend(v, ON_GUEST, -min(self.switch, guest))
            elif faults or self.core.slots[v].fixes > fixes:
                time = self.todo[i].cost if was else self.fault
                if faults:
                    time += (tables - max(was - 1, 0)) * self.table
                self._spend(v, ON_FAULT, max(time, 0) + (self.core.prefetched - prefetched) * self.prefetch)
                self._switch(v, was, guest)
        elif kind == UNLOAD:
            if was:
                self._spend(v, ON_UNLOAD, self.todo[i].cost)
            elif held:
                self._spend(v, ON_UNLOAD, self.unload)
        if created or found:
            time = self.created if created else self.found
            if kind == ENTER and was:
                if was == (WAS_CREATED if created else WAS_FOUND):
                    time = self.todo[i].cost
                else:
                    time += self.todo[i].cost - (self.created if was == WAS_CREATED else self.found)
            self._spend(v, ON_LOAD, max(time, 0))
        if loads or faults:
            self._take(v, exclusive, since)
        for put in range(self.core.puts):
            time = self.core.put[put].leaves * self.zap_leaf + self.core.put[put].tables * self.zap_table
            if self.inline:
                self._spend(v, ON_UNLOAD, time)
                self.locked = max(self.locked, self.pace[v].clock)
            elif self.by_worker:
                self._queue_zap(self.pace[v].clock, time)
        return False

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _wait(self, v: cython.longlong, exclusive: cython.bint) -> cython.void:
        until: cython.longlong = max(self.locked, self.shared) if exclusive else self.locked
        left: cython.longlong = self.worker - self.pace[v].clock
        if exclusive and left > 0 and self.begun <= self.pace[v].clock:
            if self.chunk:
                left = min(left, self.chunk)
            until = max(until, self.pace[v].clock + left)
        if until > self.pace[v].clock:
            self._spend(v, ON_WAIT, until - self.pace[v].clock)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _take(self, v: cython.longlong, exclusive: cython.bint, since: cython.longlong) -> cython.void:
        until: cython.longlong = min(since + (self.hold if self.core.vcpus > 1 else 0), self.pace[v].clock)
        if until > since:
            if exclusive:
                self.locked = max(self.locked, until)
            else:
                self.shared = max(self.shared, until)

    @cython.cfunc
    @cython.nogil
    @cython.exceptval(check=False)
    def _queue_zap(self, now: cython.longlong, work: cython.longlong) -> cython.void:
        vcpus: cython.longlong = self.core.vcpus
        v: cython.longlong
        if now + self.job > self.worker:
            self.begun = self.worker = now + self.job
        self.worker += work
        self.worked += work
        self.jobs += 1
        if 0 < self.cpus < vcpus + 1:
            self.moved = True
            for v in range(vcpus):
                self._spend(v, ON_WAIT, work * (vcpus + 1 - self.cpus) * self.pace[v].weight // self.weights)

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _pass(
        self, v: cython.longlong, lead: cython.longlong, guest: cython.longlong, idle: cython.longlong
    ) -> cython.void:
        self.pace[v].clock += lead
        self.pace[v].spent[ON_GUEST] += guest
        self.pace[v].spent[ON_IDLE] += idle
        self.pace[v].spent[ON_OTHER] += lead - guest - idle

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _switch(self, v: cython.longlong, was: cython.longlong, guest: cython.longlong) -> cython.void:
        within: cython.longlong
        if was:
            within = min(self.switch, guest)
            self.pace[v].spent[ON_GUEST] -= within
            self.pace[v].spent[ON_SWITCH] += within
        else:
            self._spend(v, ON_SWITCH, self.switch)

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _spend(self, v: cython.longlong, on: cython.longlong, ns: cython.longlong) -> cython.void:
        self.pace[v].clock += ns
        self.pace[v].spent[on] += ns

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _pop(self, q: cython.longlong, i: cython.longlong) -> cython.void:
        if self.todo[i].next:
            self.queue[q].head = i + self.todo[i].next
        else:
            self.queue[q].head = self.queue[q].tail = NONE

    @cython.cfunc
    @cython.nogil
    @cython.inline
    @cython.exceptval(check=False)
    def _sample(self, v: cython.longlong) -> cython.void:
        i: cython.longlong = self.samples
        on: cython.longlong
        if self.pace[v].clock - self.pace[v].sampled >= SAMPLE:
            self.pace[v].sampled = self.pace[v].clock
            self.sample[i].vcpu = v
            self.sample[i].clock = self.pace[v].clock
            self.sample[i].cause = self.core.slots[v].cause
            for on in range(8):
                self.sample[i].spent[on] = self.pace[v].spent[on]
            self.samples = i + 1
