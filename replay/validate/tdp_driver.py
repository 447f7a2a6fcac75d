# SPDX-License-Identifier: Apache-2.0
"""The conformance check of nested paging: compare a recording with the model of its roots, thread by thread."""

from __future__ import annotations

from typing import Final

from replay.simulate.model_state import CURRENT, Vcpu
from replay.validate.expect import Activity
from replay.validate.nested_paging import NestedPaging
from replay.validate.row_tuples import RowTuple
from replay.validate.steps.kernel_steps import KernelSteps
from replay.validate.steps.slot_lookup import Memslot
from replay.validate.threads import Thread, VmCheck
from traces.kernels.triggers import CR0_WP, EFER_MSR, EFER_NX

_NOTIFIERS: Final = ("kvm_unmap_hva_range", "kvm_set_spte_hva", "kvm_age_hva", "kvm_test_age_hva")
_GET_DIRTY_LOG: Final = 0x4010AE42
_LOG_ANEW: Final = (0xC018AEC0, 0xAEC7)  # KVM_CLEAR_DIRTY_LOG, KVM_RESET_DIRTY_RINGS
_LOGS_ANEW: Final = ("root_put", "kvm_mmu_get_page", "kvm_tdp_mmu_spte_changed")
_RECOVERS: Final = ("kvm_tdp_mmu_spte_changed", "kvm_mmu_prepare_zap_page")
_SET_MEMORY: Final = (0x4020AE46, 0x40A0AE49)  # KVM_SET_USER_MEMORY_REGION, KVM_SET_USER_MEMORY_REGION2
_ENABLE_CAP: Final = 0x4068AEA3
# The first row of a load: a root that the search passes over (from 6.9 on), a new root, or an existing one.
_LOADING: Final = ("root_put", "kvm_mmu_get_page", "root_get", "mmu_load")


class ConformanceCheck(VmCheck):
    """The check of one VM whose roots map guest-physical addresses."""

    def __init__(self, machine: KernelSteps) -> None:
        super().__init__()
        self.machine = machine
        self.nested = NestedPaging(machine.guest_mode_bit, machine.direct_bit)
        machine.tracked = self.nested.tracked
        self.mistaken = 0  # rows whose root is of another address space than the row itself

    @property
    def ended(self) -> bool:
        """Whether the VM was destroyed."""
        return self.machine.destroyed

    def left(self, shows_frees: bool) -> int:
        """Return the number of roots still alive plus, if frees are recorded, of removed tables never freed."""
        return len(self.machine.removed) * shows_frees + len(self.machine.roots)

    def _respond(self, thread: Thread, row: RowTuple, stopped: str = "") -> None:
        if self.nested.has(row):
            return
        if row.kind == "table_free" and not self._awaits(thread, "table_free"):
            self._free(row)
            return
        root = self.machine.recorded.get(row.root) if row.kind == "kvm_tdp_mmu_spte_changed" else None
        if root is not None and self.machine.as_id(root) != row.as_id:
            self.mistaken += 1
            row = row._replace(root=0)  # the address space comes from the event itself, so the root is wrong
        super()._respond(thread, row, stopped)

    def _awaits(self, thread: Thread, kind: str) -> bool:
        expected = self._expected(thread)
        return expected is not None and expected.kind == kind

    def _begun_by(self, thread: Thread, row: RowTuple) -> Activity | None:
        """Return the activity that a row begins: loads, the zap worker and dirty
        logs have no event of their own at the start.
        """
        machine = self.machine
        if thread.ioctl in _LOG_ANEW and row.kind in _LOGS_ANEW and machine.kernel.spte_changed:
            if machine.capable and machine.initially_set is None:  # only with INITIALLY_SET references are put first
                machine.initially_set = row.kind != "kvm_tdp_mmu_spte_changed"
            return machine.log_anew()
        alone = thread.responds_only and machine.parameters.mmu != "shadow"
        if alone and row.kind in _RECOVERS and row.gfn is not None and machine.nx_huge_pages is not False:
            level = row.level + (row.kind == "kvm_mmu_prepare_zap_page")  # the level of the entry that is removed
            as_id = bool(row.role & machine.smm_bit) if level > row.level else row.as_id
            return machine.recover(as_id, level, row.gfn)
        if row.kind == "kvm_tdp_mmu_spte_changed" and self.nested.entered and row.gfn is not None:
            return machine.track(row.as_id, row.gfn) if not thread.ioctl else None
        if row.kind in _LOADING and thread.vcpu is not None:
            vcpu = self._vcpu(thread.vcpu)
            return machine.load(vcpu) if vcpu.slots[CURRENT] is None else None
        if row.kind == "kvm_mmu_prepare_zap_page" and machine.parameters.mmu == "shadow":
            return machine.zap_all()
        if row.kind == "zap_root_begin":
            root = machine.recorded.get(row.root)
            return machine.worker(root) if root in machine.queued and root is not None else None
        if row.kind == "kvm_tdp_mmu_spte_changed" and thread.ioctl == _GET_DIRTY_LOG and row.gfn is not None:
            slot = machine.slots.of(row.as_id, row.gfn)
            return machine.report(slot) if slot is not None and slot.logged and not machine.initially_set else None
        return None

    def _free(self, row: RowTuple) -> None:
        """Check that a freed page was a removed table. It is freed a grace period later, in whatever thread."""
        found = self.machine.removed.pop(row.table, None)
        if found is None:
            self._diverge(row, f"page {row.table:#x} is freed, which no removed table has")
        elif found != (row.role, row.level, row.gfn or 0):
            self._diverge(row, f"page {row.table:#x} is freed as another table than was removed")
        else:
            self._tally("table_free").matched += 1

    def _happen(self, thread: Thread, row: RowTuple) -> None:
        machine = self.machine
        thread.responds_only = False
        if row.kind in _NOTIFIERS:  # they may interrupt a fault of the same thread
            start, end = row.addr, row.value
            if row.kind == "kvm_unmap_hva_range":
                self._begin_perhaps(thread, machine.unmap(start, end), lambda: not machine.finds(start, end))
            elif row.kind == "kvm_age_hva":
                self._begin_perhaps(thread, machine.age(start, end), lambda: True)
            return
        if row.kind == "zap_all" and thread.ioctl and not machine.kernel.spte_changed:
            return  # on 5.10 kvm_mmu_zap_all_fast empties the roots in this way
        self._settle(thread, row)
        if self.nested.happen(row):
            thread.obsolete = False
            return
        if row.kind != "mmu_free_roots":
            thread.unloads = row.vcpu if row.kind == "mmu_unload" else None
        if row.kind == "kvm_page_fault" and row.vcpu is not None:
            self._begin(thread, machine.fault(self._vcpu(row.vcpu), row.addr, row.code))
        elif row.kind == "kvm_smm_transition" and row.vcpu is not None:
            (machine.smm.add if row.flags & 1 else machine.smm.discard)(row.vcpu)
        elif row.kind == "kvm_cr" and row.vcpu is not None and row.flags & 1 and row.code == 0:
            machine.guest_bit(row.vcpu, machine.wp_bit, bool(row.value & CR0_WP))
        elif row.kind == "kvm_exit" and row.vcpu is not None and row.code in machine.kernel.vendor.cr0_write:
            machine.guest.pop(row.vcpu, None)  # only kvm_cr shows the new value, and emulated writes have no kvm_cr
        elif row.kind == "kvm_exit" and row.vcpu is not None and row.code in machine.kernel.vendor.mmio:
            self._begin(thread, machine.misconfigured(self._vcpu(row.vcpu)))
        elif row.kind == "kvm_msr" and row.vcpu is not None and row.flags & 1 and row.code == EFER_MSR:
            machine.guest_bit(row.vcpu, machine.nx_bit, bool(row.value & EFER_NX))
        elif row.kind == "new_pgd" and row.vcpu is not None and row.role & machine.direct_bit:
            machine.switch(self._vcpu(row.vcpu), row.role)
        elif row.kind == "mmu_free_obsolete_roots":
            thread.obsolete = True
        elif row.kind == "mmu_free_roots":
            self._free_roots(thread, row)
        elif row.kind == "kvm_mmu_zap_all_fast":
            if not thread.ioctl:  # nx_huge_pages may have been written
                machine.nx_huge_pages = None
            zap = machine.invalidate()
            if zap is not None:
                self._begin(thread, zap)
            if thread.ioctl in _SET_MEMORY:
                machine.slot_zap = False
        elif row.kind == "zap_leafs" and machine.kernel.spte_changed and row.gfn is not None:
            self._begin_perhaps(thread, machine.zap_gfns(row.as_id, row.gfn, row.value), lambda: not machine.roots)
        elif row.kind == "zap_invalidated_begin":
            if machine.destroyed:
                machine.invalidate()
            if machine.parameters.teardown != "worker":
                self._begin_perhaps(thread, machine.zap_invalidated(), lambda: not machine.roots)
        elif row.kind == "zap_all":
            self._begin_perhaps(thread, machine.zap_all(), lambda: not machine.roots)
        elif row.kind == "memslot":
            self._memslot(thread, row)
        elif row.kind == "ioctl":
            thread.ioctl = row.code
            if row.code == _GET_DIRTY_LOG:
                machine.read_dirty_log()
            machine.capable |= row.code == _ENABLE_CAP
        elif row.kind == "ioctl_end":
            thread.ioctl = 0
            machine.slots.end(row.tid, done=row.ret >= 0)
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
        assert row.gfn is not None
        slot = Memslot(row.as_id, row.slot, row.gfn, row.value, row.addr, row.code)
        update = machine.slots.begin(row.tid, slot)
        if not thread.ioctl:
            machine.slots.end(row.tid, done=True)
        before = update.before
        if before and not update.kept and machine.kernel.slot_zap and machine.slot_zap is not False:
            none = machine.slot_zap is None  # the first slot that is removed shows whether the quirk is on or off
            self._begin_perhaps(thread, machine.zap_slot(before), lambda: none or not machine.roots)
        if update.kept and before and before.logged != slot.logged and not slot.read_only:
            steps = machine.log_on(slot) if slot.logged else machine.log_off(slot)
            self._begin_perhaps(thread, steps, lambda: not any(root.valid for root in machine.roots))

    def _vcpu(self, index: int) -> Vcpu:
        return self.machine.vcpus.setdefault(index, Vcpu(index))
