# SPDX-License-Identifier: Apache-2.0
"""One VM from its creation to its end: batches of steps, the memslot changes between them, and the workers' rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from traces.lives import Ints
from traces.record import Columns
from traces.synth.guest import AFTER_RIP, RESET_RIP, Guest, Steps, huge_regions
from traces.synth.kvm_rows import RowBatch, RowMaker
from traces.synth.life import Fallen, Life, Threads, put
from traces.synth.mmu import (
    ROLE,
    SMM_ROLE,
    HostPages,
    Leaves,
    Mmu,
    Resolution,
    Tables,
    frames_needed,
)
from traces.synth.parameters import Parameters
from traces.synth.root_zaps import Dying, free, zap
from traces.synth.row_columns import Listing, join, take

START: Final = 60_000_000_000  # ns after boot
STAGGER: Final = 1_000_000  # ns between the VMs' beginnings
BATCH_STEPS: Final = 1 << 15  # of all VMs together
ZAP_BATCH_STEPS: Final = 1 << 10
MIN_BATCH_STEPS: Final = 1 << 9

_KVM: Final = 0xFFFF888100000000  # struct kvm of the first VM: tells VMs apart, and is never stored
_GUEST_FRAMES: Final = 0x100000
_GUEST_GAP: Final = 4 << 18


class SynthVm:
    """Makes one VM's rows. `vm` counts from 0; after about `share` rows it ends (None: after its duration)."""

    def __init__(self, parameters: Parameters, vm: int, share: int | None) -> None:
        self._parameters, self._vm, self._share = parameters, vm, share
        self._costs = parameters.costs
        self.threads = Threads(vm, parameters.vcpus)
        stuck = parameters.reset_on == "exit" and parameters.policy == "async" and parameters.vcpus == 1
        self._guest = Guest(parameters, vm, stuck)
        room = (parameters.memory >> 12) + _GUEST_GAP
        host = HostPages(_GUEST_FRAMES + vm * room, huge_regions(parameters, vm))
        tables = _GUEST_FRAMES + parameters.vms * room + vm * frames_needed(parameters)
        self._mmu = Mmu(parameters, host, tables)
        self._host = RowMaker(self._mmu, self._costs)
        self._life = Life(parameters, self.threads, self._mmu)
        self._jitter = np.random.default_rng([parameters.seed, vm, 3])
        limit = (ZAP_BATCH_STEPS if parameters.zap_rows else BATCH_STEPS) // parameters.vms
        self._span = max(1, int(max(limit, MIN_BATCH_STEPS) / self._guest.steps_per_ns))
        self._begin = START + vm * STAGGER
        self._elapsed = 0.0  # host time since `_begin`, ns
        self._later: list[Columns] = []  # rows of other threads that lie in the future
        self._worker_free = 0  # when the worker will be done with the roots it has now
        self._busy = 0  # until when workers and RCU have something to do
        self._written = 0

    def batches(self) -> Iterator[Columns]:
        """Yield the VM's rows in order of time, in parts that follow each other."""
        columns = self._listed(self._life.before(), 0)
        columns["kvm"][:] = 0
        yield self._out(columns)
        yield self._out(self._listed(self._life.create(), 0))
        duration = self._parameters.duration
        end = np.inf if duration is None else int(duration * 1e9)
        now, fetch = 0, RESET_RIP
        while now < end and not self._enough():
            churn = self._guest.memslots.peek
            until = int(min(now + self._span, churn, end))
            columns = self._run(self._guest.steps(now, until, fetch))
            now, fetch = until, 0
            if len(columns["time"]):
                yield self._out(columns)
            if churn == now and now < end and not self._enough():
                self._guest.memslots.until(churn + 1)
                self._wait(self._worker_free, now)  # the ioctl waits for the worker, too, before its roots are zapped
                listing, fallen = self._life.churn(now % self._parameters.vcpus)
                columns = self._listed(listing, now)
                self._fell(fallen, int(columns["time"][-1]))
                yield self._out(columns)
                fetch = AFTER_RIP
        yield self._end(now)

    def _end(self, now: int) -> Columns:
        """Return the rows of the VM's end, once its workers are done."""
        self._wait(self._busy, now)
        listing, fallen = self._life.destroy()
        columns = self._listed(listing, now)
        self._fell(fallen, int(columns["time"][-1]))
        columns = join([columns, *self._later])
        return take(columns, np.argsort(columns["time"], kind="stable"))

    def _wait(self, until: int, now: int) -> None:
        """Let host time pass until `until`, while the guest's own time stays at `now`."""
        self._elapsed = max(self._elapsed, float(until - self._begin - now))

    def _enough(self) -> bool:
        return self._share is not None and self._written >= self._share

    def _out(self, columns: Columns) -> Columns:
        """Return these rows, with those of other threads whose time has come."""
        now = columns["time"][-1]
        if self._later:
            columns = join([columns, *self._later])
            columns = take(columns, np.argsort(columns["time"], kind="stable"))
            due = int(np.searchsorted(columns["time"], now, side="right"))
            self._later = [take(columns, slice(due, None))] if due < len(columns["time"]) else []
            columns = take(columns, slice(due))
        self._written += len(columns["time"])
        return columns

    def _run(self, steps: Steps) -> Columns:
        """Return the rows of a batch of steps, which is cut where the VM has its share of rows."""
        done = self._mmu.resolve(steps)
        counts = self._host.count(done)
        if self._share is not None and counts.sum() > self._share - self._written:
            steps = steps.first(int(np.searchsorted(np.cumsum(counts), self._share - self._written)) + 1)
            done = self._mmu.resolve(steps)
            counts = self._host.count(done)
        batch = self._host.batch(done, counts)
        columns = batch.columns
        for name, value in self.threads.vcpu(columns["vcpu"].astype(np.int64)).items():
            columns[name][:] = value
        self._stamp(columns, batch.costs, steps.time[batch.step])
        if not self._mmu.preserve:
            self._bury(done, batch)
        self._mmu.commit(done)
        return columns

    def _bury(self, done: Resolution, batch: RowBatch) -> None:
        """Under async, the last put of a root leaves its tree to the worker: normal roots and SMM roots, in turn."""
        time = batch.columns["time"].astype(np.int64)
        since = np.concatenate([time[batch.root_put], time[batch.smm_put]])
        if not len(since):
            return
        lives = len(batch.root_put)
        frames = np.concatenate([done.roots[:lives], done.smm_frames[:, 0]])
        roles = np.where(np.arange(len(frames)) < lives, ROLE, SMM_ROLE)
        trees = [self._trees(done)] if lives else []
        if len(done.smi):
            tables, leaves = self._mmu.smm_tree(done.smm_frames)
            tables.job, leaves.job = tables.job + lives, leaves.job + lives
            trees.append((tables, leaves))
        order = np.argsort(since, kind="stable")
        turn = np.argsort(order)
        tables = Tables(*_columns([tree[0] for tree in trees]))
        leaves = Leaves(*_columns([tree[1] for tree in trees]))
        tables.job, leaves.job = turn[tables.job], turn[leaves.job]
        self._worker(Dying(frames[order], roles[order], 1), tables, leaves, since[order])

    def _trees(self, done: Resolution) -> tuple[Tables, Leaves]:
        """Return the tables and leaves of the lives that ended in the batch, those from before it included."""
        faults, host, tree = done.faults, self._mmu.host, self._mmu.tree
        ended = faults.life < len(done.roots) - 1
        tables = [tree.tables()]
        for level in (1, 2, 3):
            new = ended & faults.new[level]
            gfn = faults.gfn[new] >> (9 * level) << (9 * level)
            tables.append(Tables(faults.life[new], np.full(len(gfn), level), gfn, faults.frames[level][new]))
        life, gfn = faults.life[ended], host.leaf_gfn(faults.gfn[ended])
        leaves = [tree.leaves(host), Leaves(life, 1 + host.huge[gfn >> 9].astype(np.int64), gfn, host.leaf(gfn))]
        return Tables(*_columns(tables)), Leaves(*_columns(leaves))

    def _worker(self, roots: Dying, tables: Tables, leaves: Leaves, since: Ints) -> None:
        """Make the worker's and RCU's rows for roots that were put last at these times, which ascend."""
        last = put(roots, roots.refs)
        columns, job = last, np.arange(len(since))
        if self._parameters.zap_rows:
            zaps, owner = zap(roots, tables, leaves, shared=True)
            columns, job = join([zaps, last]), np.concatenate([owner, job])
            order = np.argsort(job, kind="stable")
            columns, job = take(columns, order), job[order]
        spent = np.bincount(job, minlength=len(since)) * self._costs.zap_entry
        before = np.cumsum(spent) - spent
        # One worker: a root waits for those before it.
        start = np.maximum(np.maximum.accumulate(since + self._costs.worker - before), self._worker_free) + before
        self._worker_free = int(start[-1] + spent[-1])
        columns["time"][:] = start[job] + (1 + _within(job)) * self._costs.zap_entry - 1
        self._after(columns, self.threads.worker())
        self._free(roots, tables, start + spent)

    def _fell(self, fallen: list[Fallen], since: int) -> None:
        for root in fallen:
            self._free(root.roots, root.tables, np.array([since]))

    def _free(self, roots: Dying, tables: Tables, since: Ints) -> None:
        columns, job = free(roots, tables)
        columns["time"][:] = since[job] + self._costs.rcu + _within(job)
        self._after(columns, self.threads.rcu())

    def _after(self, columns: Columns, thread: dict[str, Any]) -> None:
        for name, value in thread.items():
            columns[name][:] = value
        columns["kvm"][:] = self._pointer
        self._busy = max(self._busy, int(columns["time"].max()))
        self._later.append(columns)

    @property
    def _pointer(self) -> int:
        return _KVM + self._vm * 0x10000

    def _listed(self, listing: Listing, now: int) -> Columns:
        columns, costs = listing.done()
        self._stamp(columns, costs, now)
        return columns

    def _stamp(self, columns: Columns, costs: NDArray[np.float64], guest: Any) -> None:
        """Set the rows' times: the guest's clock, with the host's work so far on top."""
        spent = np.cumsum(np.maximum(1.0, costs * (0.75 + 0.5 * self._jitter.random(len(costs)))))
        columns["time"][:] = self._begin + guest + (self._elapsed + spent).astype(np.int64)
        columns["kvm"][:] = self._pointer
        if len(spent):
            self._elapsed += float(spent[-1])


def _within(job: Ints) -> Ints:
    """Return the number of each row among those of its job; the rows are in order of jobs."""
    return np.arange(len(job)) - np.searchsorted(job, job)


def _columns(parts: list[Any]) -> list[Ints]:
    return [np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])]
