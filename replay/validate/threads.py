"""The conformance check: the recording says which thread runs next, the model predicts what it does.

Rows that no root policy decides (entries, exits, faults' addresses, SMM transitions, ioctls, what the host maps) are
put into the model; every row that is the MMU's response is predicted by the thread's activity (`steps`) and compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

from replay.simulate.reference import CURRENT, Vcpu
from replay.validate.expect import Activity, Expect
from replay.validate.kernel_steps import KernelSteps
from replay.validate.row_tuples import RowTuple
from replay.validate.vm_state import Memslot
from traces.kernels.triggers import CR0_WP, EFER_MSR, EFER_NX

# What the kernel does in response, and the model therefore predicts.
RESPONSES: Final = (
    "kvm_mmu_get_page",
    "kvm_mmu_prepare_zap_page",
    "kvm_tdp_mmu_spte_changed",
    "kvm_mmu_set_spte",
    "mark_mmio_spte",
    "check_mmio_spte",
    "handle_mmio_page_fault",
    "fast_page_fault",
    "kvm_mmu_spte_requested",
    "kvm_mmu_split_huge_page",
    "root_get",
    "mmu_load",
    "root_put",
    "zap_root_begin",
    "zap_root_end",
    "table_free",
)
# The host's scheduler and power management: they come in the middle of anything, and KVM does nothing in response.
_OF_THE_HOST: Final = ("sched_in", "host_suspend")
_LOG_DIRTY: Final = 1
_GET_DIRTY_LOG: Final = 0x4010AE42
# A load's first sign: a root passed over in the search (6.9), one built, one found.
_LOADING: Final = ("root_put", "kvm_mmu_get_page", "root_get", "mmu_load")
_CONTEXT: Final = 6


@dataclass
class MatchTally:
    """Rows of one kind: as predicted, not as predicted (or not predicted at all), and predicted but never recorded."""

    matched: int = 0
    mismatched: int = 0
    missing: int = 0


@dataclass(frozen=True)
class Divergence:
    """The first difference: what was recorded, what the model had predicted, and the rows before and after."""

    row: RowTuple
    why: str
    before: tuple[RowTuple, ...]
    after: list[RowTuple]


@dataclass
class Thread:
    activities: list[Activity] = field(default_factory=list)
    pending: Expect | None = None  # what the top activity has said, unless it waits
    vcpu: int | None = None
    obsolete: bool = False  # in kvm_mmu_free_obsolete_roots
    unloads: int | None = None  # in kvm_mmu_unload of this vCPU, which need not be the thread's own
    ioctl: int = 0


class VmCheck(ABC):
    """A VM's threads, each with what it is in the middle of; subclasses say what begins and what happens."""

    responses: Collection[str] = RESPONSES

    def __init__(self) -> None:
        self.tallies: dict[str, MatchTally] = {}
        self.first: Divergence | None = None
        self._threads: dict[int, Thread] = {}
        self._recent: deque[RowTuple] = deque(maxlen=_CONTEXT)

    def run(self, rows: Iterable[RowTuple]) -> None:
        """Go through a VM's rows in order of recording."""
        for row in rows:
            if row.kind in _OF_THE_HOST:
                continue
            thread = self._threads.setdefault(row.tid, Thread())
            if row.vcpu is not None:
                thread.vcpu = row.vcpu
            if row.kind in self.responses:
                self._respond(thread, row)
            else:
                self._happen(thread, row)
            self._recent.append(row)
            if self.first is not None and len(self.first.after) < _CONTEXT:
                self.first.after.append(row)

    def finish(self) -> None:
        """The recording ended: what threads are still expected to show will not come."""
        for thread in self._threads.values():
            self._settle(thread, None)

    @abstractmethod
    def _begun_by(self, thread: Thread, row: RowTuple) -> Activity | None:
        """The activity whose first sign a response is, where nothing was expected of the thread."""

    @abstractmethod
    def _happen(self, thread: Thread, row: RowTuple) -> None:
        """What is no response is put into the model."""

    def _respond(self, thread: Thread, row: RowTuple) -> None:
        expected = self._expected(thread)
        if expected is None:
            activity = self._begun_by(thread, row)
            if activity is None:
                self._diverge(row, f"{row.kind} recorded, nothing expected of this thread")
                return
            thread.activities.append(activity)
            expected = self._expected(thread)
        while expected is not None:
            why = expected.misfit(row)
            if not why:
                self._tally(row.kind).matched += 1
                self._send(thread, row)
                return
            if expected.optional:
                self._send(thread, None)
                expected = self._expected(thread)
                continue
            if expected.may_stop:
                thread.activities.pop()
                thread.pending = None
                self._respond(thread, row)
                return
            self._diverge(row, why)
            self._drop(thread)
            return
        self._diverge(row, f"{row.kind} recorded, nothing more expected of this thread")

    def _expected(self, thread: Thread) -> Expect | None:
        """What the thread's innermost unfinished activity expects now, given what other threads did meanwhile."""
        while thread.activities:
            if thread.pending is None:
                try:
                    thread.pending = next(thread.activities[-1])
                except StopIteration:
                    thread.activities.pop()
                    continue
            if thread.pending is not None:
                return thread.pending
        return None

    def _send(self, thread: Thread, row: RowTuple | None) -> None:
        thread.pending = None
        try:
            thread.pending = thread.activities[-1].send(row)
        except StopIteration:
            thread.activities.pop()

    def _drop(self, thread: Thread) -> None:
        for activity in thread.activities:
            activity.close()
        thread.activities.clear()
        thread.pending = None

    def _begin(self, thread: Thread, activity: Activity) -> None:
        thread.activities.append(activity)
        thread.pending = None

    def _check(self, row: RowTuple, holds: bool, why: str) -> None:
        if holds:
            self._tally(row.kind).matched += 1
        else:
            self._diverge(row, why)

    def _settle(self, thread: Thread, row: RowTuple | None) -> None:
        """The thread goes on to something else: what its activities still expect never came."""
        while (expected := self._expected(thread)) is not None:
            if expected.optional:
                self._send(thread, None)
                continue
            if not expected.may_stop:
                self._tally(expected.kind).missing += 1
                if row is not None:
                    self._remember(row, f"{expected} expected, {row.kind} recorded")
            thread.activities.pop().close()
            thread.pending = None

    def _tally(self, kind: str) -> MatchTally:
        return self.tallies.setdefault(kind, MatchTally())

    def _diverge(self, row: RowTuple, why: str) -> None:
        self._tally(row.kind).mismatched += 1
        self._remember(row, why)

    def _remember(self, row: RowTuple, why: str) -> None:
        if self.first is None:
            self.first = Divergence(row, why, tuple(self._recent), [])


class ConformanceCheck(VmCheck):
    """One VM whose roots map guest-physical addresses."""

    def __init__(self, machine: KernelSteps) -> None:
        super().__init__()
        self.machine = machine

    @property
    def ended(self) -> bool:
        """Whether the VM was destroyed."""
        return self.machine.destroyed

    def left(self, shows_frees: bool) -> int:
        """Removed tables that were never freed, where that is recorded, and roots still alive."""
        return len(self.machine.removed) * shows_frees + len(self.machine.roots)

    def _respond(self, thread: Thread, row: RowTuple) -> None:
        if row.kind == "table_free" and not self._awaits(thread, "table_free"):
            self._free(row)
            return
        super()._respond(thread, row)

    def _awaits(self, thread: Thread, kind: str) -> bool:
        expected = self._expected(thread)
        return expected is not None and expected.kind == kind

    def _begun_by(self, thread: Thread, row: RowTuple) -> Activity | None:
        """The activity whose first sign a row is: loads, the zap worker and dirty logs have no event at their start."""
        machine = self.machine
        if row.kind in _LOADING and thread.vcpu is not None:
            vcpu = self._vcpu(thread.vcpu)
            return machine.load(vcpu) if vcpu.slots[CURRENT] is None else None
        if row.kind == "kvm_mmu_prepare_zap_page" and machine.parameters.mmu == "shadow":
            return machine.zap_all()
        if row.kind == "zap_root_begin":
            root = machine.recorded.get(row.root)
            return machine.worker(root) if root in machine.queued and root is not None else None
        if row.kind == "kvm_tdp_mmu_spte_changed" and thread.ioctl == _GET_DIRTY_LOG and row.gfn is not None:
            slot = machine.slot_of(row.as_id, row.gfn)
            return machine.clear_dirty(slot) if slot is not None and slot.logged else None
        return None

    def _free(self, row: RowTuple) -> None:
        """A grace period after a table was removed its page is freed, by whatever thread the callback interrupts."""
        found = self.machine.removed.pop(row.table, None)
        if found is None:
            self._diverge(row, f"page {row.table:#x} is freed, which no removed table has")
        elif found != (row.role, row.level, row.gfn or 0):
            self._diverge(row, f"page {row.table:#x} is freed as another table than was removed")
        else:
            self._tally("table_free").matched += 1

    def _happen(self, thread: Thread, row: RowTuple) -> None:
        machine = self.machine
        if row.kind in ("kvm_unmap_hva_range", "kvm_set_spte_hva"):
            if row.kind == "kvm_unmap_hva_range":
                self._begin(thread, machine.unmap(row.addr, row.value))  # may interrupt a fault of the same thread
            return
        if row.kind == "zap_all" and thread.ioctl and not machine.kernel.spte_changed:
            return  # 5.10's way to empty the roots in kvm_mmu_zap_all_fast
        self._settle(thread, row)
        if row.kind != "mmu_free_roots":
            thread.unloads = row.vcpu if row.kind == "mmu_unload" else None
        if row.kind == "kvm_page_fault" and row.vcpu is not None:
            self._begin(thread, machine.fault(self._vcpu(row.vcpu), row.addr, row.code))
        elif row.kind == "kvm_smm_transition" and row.vcpu is not None:
            (machine.smm.add if row.flags & 1 else machine.smm.discard)(row.vcpu)
        elif row.kind == "kvm_cr" and row.vcpu is not None and row.flags & 1 and row.code == 0:
            machine.guest_bit(row.vcpu, machine.wp_bit, bool(row.value & CR0_WP))
        elif row.kind == "kvm_exit" and row.vcpu is not None and row.code in machine.kernel.vendor.cr0_write:
            machine.guest.pop(row.vcpu, None)  # to what, only kvm_cr says, and emulated writes have none
        elif row.kind == "kvm_exit" and row.vcpu is not None and row.code in machine.kernel.vendor.mmio:
            self._begin(thread, machine.misconfigured(self._vcpu(row.vcpu)))
        elif row.kind == "kvm_msr" and row.vcpu is not None and row.flags & 1 and row.code == EFER_MSR:
            machine.guest_bit(row.vcpu, machine.nx_bit, bool(row.value & EFER_NX))
        elif row.kind == "mmu_free_obsolete_roots":
            thread.obsolete = True
        elif row.kind == "mmu_free_roots":
            self._free_roots(thread, row)
        elif row.kind == "kvm_mmu_zap_all_fast":
            zap = machine.invalidate()
            if zap is not None:
                self._begin(thread, zap)
        elif row.kind == "zap_invalidated_begin":
            if machine.destroyed:
                machine.invalidate()
            if machine.parameters.teardown != "worker":
                self._begin(thread, machine.zap_invalidated())
        elif row.kind == "zap_all":
            self._begin(thread, machine.zap_all())
        elif row.kind == "memslot":
            self._memslot(thread, row)
        elif row.kind == "ioctl":
            thread.ioctl = row.code
            if row.code == _GET_DIRTY_LOG:
                machine.read_dirty_log()
        elif row.kind == "ioctl_end":
            thread.ioctl = 0
        elif row.kind == "vm_destroy":
            machine.destroyed = True

    def _free_roots(self, thread: Thread, row: RowTuple) -> None:
        index = thread.vcpu if thread.unloads is None else thread.unloads
        if index is None or (self.machine.destroyed and not row.root):
            return  # at the VM's end one thread frees the slots of all vCPUs, and once more when they are empty
        vcpu = self._vcpu(index)
        mask = row.value & 15
        if thread.obsolete:
            invalid = sum(1 << i for i, root in enumerate(vcpu.slots) if root is not None and not root.valid)
            self._check(row, mask == invalid, f"slots {mask:#x} are emptied as obsolete, the model has {invalid:#x}")
            thread.obsolete = False
        current = vcpu.slots[CURRENT]
        if row.root:
            name = 0 if current is None else self.machine.name(current)
            self._check(row, name == row.root, f"root {row.root} is the current one, the model has {name or 'none'}")
        self._begin(thread, self.machine.free_slots(vcpu, mask))

    def _memslot(self, thread: Thread, row: RowTuple) -> None:
        machine = self.machine
        key = (row.as_id, row.slot)
        before = machine.slots.get(key)
        if row.value == 0:
            machine.slots.pop(key, None)
            return
        assert row.gfn is not None
        slot = Memslot(row.as_id, row.slot, row.gfn, row.value, row.addr, bool(row.code & _LOG_DIRTY))
        machine.slots[key] = slot
        if before is not None and before.logged != slot.logged:
            self._begin(thread, machine.log_on(slot) if slot.logged else machine.log_off(slot))

    def _vcpu(self, index: int) -> Vcpu:
        return self.machine.vcpus.setdefault(index, Vcpu(index))
