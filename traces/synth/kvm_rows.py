# SPDX-License-Identifier: Apache-2.0
"""The rows of a batch of steps in the vCPUs' threads, in the order and with the columns of recordings of 6.1.

Each function describes one thing that KVM does, for many steps at once: a cursor has every step's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from traces.kernels.vendors import SVM
from traces.lives import Flags, Ints
from traces.record import Columns
from traces.synth.guest import AFTER_RIP, CODE_GFN, DATA_RIP, EXIT, SMRAM_GFN, WP
from traces.synth.mmu import ALL_ROOTS, LEVEL, ROLE, SMM_ROLE, Mmu, Resolution, link
from traces.synth.parameters import SynthCosts
from traces.synth.row_columns import Cursor, blank

# SVM exit codes, and the error codes of nested page faults.
EXIT_INTR, EXIT_CR0_WRITE, EXIT_RSM, EXIT_IO, EXIT_NPF = (
    codes[0] for codes in (SVM.interrupt, SVM.cr0_write, SVM.rsm, SVM.io, SVM.nested_fault)
)
FETCH, READ, WRITE = 0x100000014, 0x100000004, 0x100000006
IO_INFO: Final = 0xE00010  # an OUT to port 0xe0, which this VMM's guests use to call out
IO_RIP: Final = 0x1016
USERSPACE_IO: Final = 2
KVM_SMI: Final = 0xAEB7
SMBASE, SMI_RIP, SMRAM = 0x30000, 0x8000, 0x38000
CR0, CR0_WP = 0x80040033, 0x10000

# How the cost of a fault is spread over its rows.
_FAULT: Final = {"kvm_page_fault": 0.1, "kvm_mmu_spte_requested": 0.6, "leaf": 0.2, "kvm_mmu_set_spte": 0.1}


@dataclass
class RowBatch:
    """Rows of one batch in order, the host time before each (ns), and each row's step.

    `root_put` is the place of the put of each step that ended a root's life, `smm_put` that of each SMI.
    """

    columns: Columns
    costs: NDArray[np.float64]
    step: Ints
    root_put: Ints
    smm_put: Ints


class RowMaker:
    """Writes the rows of one VM's steps."""

    def __init__(self, mmu: Mmu, costs: SynthCosts) -> None:
        self._mmu = mmu
        self._costs = costs
        self._resets_faults = mmu.reset_on == "exit"

    def count(self, done: Resolution) -> Ints:
        """Return the number of rows of each step."""
        at = np.zeros(len(done.steps), np.int64)
        self._write(done, at, None, None)
        return at

    def batch(self, done: Resolution, counts: Ints) -> RowBatch:
        """Return the rows of a batch; `counts` is what `count` returned for it."""
        end = np.cumsum(counts)
        total = int(end[-1]) if len(end) else 0
        columns, costs = blank(total), np.ones(total)
        step = np.repeat(np.arange(len(counts)), counts)
        columns["vcpu"][:] = done.steps.vcpu[step]
        at = end - counts
        root_put, smm_put = self._write(done, at, columns, costs)
        assert bool((at == end).all()), "a step wrote other rows than it was counted to have"
        return RowBatch(columns, costs, step, root_put, smm_put)

    def _write(
        self, done: Resolution, at: Ints, columns: Columns | None, costs: NDArray[np.float64] | None
    ) -> tuple[Ints, Ints]:
        """Write every step's rows from `at` on, which afterwards has where each ends; return the places of puts."""
        puts = np.full(len(at), -1, np.int64)

        def cursor(steps: Ints) -> Cursor:
            return Cursor(at[steps], columns, costs)

        faults = done.faults.step
        here = cursor(faults)
        self._fault(here, done, puts)
        at[faults] = here.at
        here = cursor(done.smi)
        smm_put = self._smi(here, done, puts)
        at[done.smi] = here.at
        for op, write in ((EXIT, self._exit), (WP, self._wp)):
            steps = np.flatnonzero(done.steps.op == op)
            here = cursor(steps)
            write(here, done, steps, puts)
            at[steps] = here.at
        return puts[done.ends], smm_put

    def _fault(self, at: Cursor, done: Resolution, puts: Ints) -> None:
        """Write an access that faults: missing tables from the top, the leaf, and the way back into the guest."""
        faults, host, costs = done.faults, self._mmu.host, self._costs
        gfn, root = faults.gfn, done.roots[faults.life]
        rip = done.steps.rip[faults.step]
        fetch = gfn == CODE_GFN
        address = np.where(fetch, rip, gfn << 12)
        code = np.where(fetch, FETCH, np.where((gfn * 0x9E37 >> 4) % 4 == 0, READ, WRITE))
        level = np.where(faults.huge, 2, 1)
        leaf_gfn, leaf = host.leaf_gfn(gfn), host.leaf(gfn)
        self._fault_begin(at, root, ROLE, rip, address, code, gfn, level)
        for table in (3, 2, 1):
            table_gfn = gfn >> (9 * table) << (9 * table)
            self._table(at, faults.new[table], root, ROLE, table, table_gfn, faults.frames[table])
        frame = np.where(faults.huge, faults.frames[2], faults.frames[1])
        at.row("kvm_tdp_mmu_spte_changed", costs.fault * _FAULT["leaf"], root=root, level=level, gfn=leaf_gfn, new=leaf)
        at.row(
            "kvm_mmu_set_spte", costs.fault * _FAULT["kvm_mmu_set_spte"],
            root=root, level=level, gfn=leaf_gfn, new=leaf, table=frame,
        )  # fmt: skip
        if self._resets_faults:
            root = self._reset_and_load(at, done, faults.step, puts)
        at.row("kvm_entry", costs.entry, root=root, rip=rip)

    def _smi(self, at: Cursor, done: Resolution, puts: Ints) -> Ints:
        """Write an SMI, injected by userspace after an exit, and RSM; return the places of the SMM root's puts."""
        mmu, costs, steps = self._mmu, self._costs, done.smi
        cold, smm, refs = done.smm_cold, done.smm_frames[:, 0], 1 + self._mmu.preserve
        self._call_out(at)
        at.row("ioctl", costs.userspace / 2, code=KVM_SMI)
        at.row("ioctl_end", costs.userspace / 8, code=KVM_SMI)
        at.row("kvm_smm_transition", costs.unload, addr=SMBASE, flags=1)
        puts[steps] = self._reset(at, done.roots[done.life[steps]], ROLE, mmu.refs)
        at.row("mmu_reset", costs.unload / 4, role=SMM_ROLE)
        at.row("mmu_free_roots", costs.unload / 8, role=SMM_ROLE, value=ALL_ROOTS)
        at.row("mmu_free_roots", costs.unload / 8, value=ALL_ROOTS)
        self._load(at, smm, SMM_ROLE, refs, cold)
        at.row("kvm_entry", costs.entry, root=smm, rip=SMI_RIP)
        self._smram_fault(at, done, cold)
        at.row("kvm_exit", costs.exit, code=EXIT_RSM, rip=SMI_RIP)
        at.row("kvm_smm_transition", costs.fault, addr=SMBASE)
        smm_put = self._reset(at, smm, SMM_ROLE, refs)
        root = self._load_normal(at, done, steps)
        at.row("kvm_entry", costs.entry, root=root, rip=AFTER_RIP)
        return smm_put

    def _smram_fault(self, at: Cursor, done: Resolution, cold: Flags) -> None:
        """Write the fault of a new SMM root: its code page and the tables above it."""
        mmu, costs, frames = self._mmu, self._costs, done.smm_frames
        gfn = np.full(len(frames), SMRAM_GFN)
        root, level, refs = frames[:, 0], LEVEL - mmu.smm_tables, 1 + mmu.preserve
        leaf_gfn, leaf = mmu.host.leaf_gfn(gfn), mmu.host.leaf(gfn)
        self._fault_begin(at, root, SMM_ROLE, SMI_RIP, SMRAM, FETCH, gfn, level, cold)
        for index in range(mmu.smm_tables):
            self._table(at, cold, root, SMM_ROLE, LEVEL - 1 - index, 0, frames[:, 1 + index])
        at.row(
            "kvm_tdp_mmu_spte_changed", costs.fault * _FAULT["leaf"], cold,
            root=root, level=level, as_id=1, gfn=leaf_gfn, new=leaf,
        )  # fmt: skip
        at.row(
            "kvm_mmu_set_spte", costs.fault * _FAULT["kvm_mmu_set_spte"], cold,
            root=root, level=level, gfn=leaf_gfn, new=leaf, table=frames[:, -1],
        )  # fmt: skip
        if self._resets_faults:
            self._reset(at, root, SMM_ROLE, refs, cold)
            self._load(at, root, SMM_ROLE, refs, np.zeros(len(cold), np.bool_), cold)
        at.row("kvm_entry", costs.entry, cold, root=root, rip=SMI_RIP)

    def _exit(self, at: Cursor, done: Resolution, steps: Ints, puts: Ints) -> None:
        """Write an exit that KVM handles itself (a host interrupt), after which the experiment's host resets."""
        at.row("kvm_exit", self._costs.exit, code=EXIT_INTR, rip=DATA_RIP)
        root = done.roots[done.life[steps]]
        if self._mmu.reset_on:
            root = self._reset_and_load(at, done, steps, puts)
        at.row("kvm_entry", self._costs.entry, root=root, rip=DATA_RIP)

    def _wp(self, at: Cursor, done: Resolution, steps: Ints, puts: Ints) -> None:
        """Write a write of CR0 that toggles WP, on a host that resets the MMU for it."""
        value = np.where(np.arange(len(steps)) % 2, CR0, CR0 | CR0_WP)
        at.row("kvm_exit", self._costs.exit, code=EXIT_CR0_WRITE, rip=0x101E)
        at.row("kvm_cr", self._costs.fault / 8, value=value, flags=1)
        root = self._reset_and_load(at, done, steps, puts)
        at.row("kvm_entry", self._costs.entry, root=root, rip=0x1021)

    def _call_out(self, at: Cursor) -> None:
        costs = self._costs
        at.row("kvm_exit", costs.exit, code=EXIT_IO, rip=IO_RIP, value=IO_INFO, addr=AFTER_RIP)
        at.row("kvm_userspace_exit", costs.userspace / 4, code=USERSPACE_IO)

    def _fault_begin(
        self, at: Cursor, root: Ints, role: int, rip: Any, address: Any, code: Any, gfn: Ints, level: Any,
        where: Flags | None = None,
    ) -> None:  # fmt: skip
        costs = self._costs
        at.row("kvm_exit", costs.exit, where, code=EXIT_NPF, rip=rip, value=code, addr=address)
        at.row(
            "kvm_page_fault", costs.fault * _FAULT["kvm_page_fault"], where,
            root=root, role=role, addr=address, code=code, rip=rip,
        )  # fmt: skip
        at.row(
            "kvm_mmu_spte_requested", costs.fault * _FAULT["kvm_mmu_spte_requested"], where,
            root=root, level=level, gfn=gfn, value=self._mmu.host.pfn(gfn),
        )  # fmt: skip

    def _table(self, at: Cursor, new: Flags, root: Ints, role: int, level: int, gfn: Any, frame: Ints) -> None:
        """Write a missing table of this level, and its link into the table above."""
        page = {"level": level, "gfn": gfn, "table": frame}
        at.row("kvm_mmu_get_page", self._costs.table * 0.7, new, role=role - LEVEL + level, flags=1, **page)
        at.row(
            "kvm_tdp_mmu_spte_changed", self._costs.table * 0.3, new,
            root=root, level=level + 1, as_id=int(role == SMM_ROLE), gfn=gfn, new=link(frame),
        )  # fmt: skip

    def _reset(self, at: Cursor, root: Ints, role: int, refs: int, where: Flags | None = None) -> Ints:
        """Write a reset of the vCPU's MMU context: its one root is put, the other context has none; return the puts."""
        cost = self._costs.unload
        at.row("mmu_reset", cost * 0.3, where, root=root, role=role)
        at.row("mmu_free_roots", cost * 0.3, where, root=root, role=role, value=ALL_ROOTS)
        put = at.row("root_put", cost * 0.3, where, root=root, role=role, table=root, refs=refs)
        at.row("mmu_free_roots", cost * 0.1, where, value=ALL_ROOTS)
        return put

    def _load(
        self, at: Cursor, root: Ints, role: int, refs: int, created: Flags, where: Flags | None = None
    ) -> None:  # fmt: skip
        """Write the load of a root that is created, or found by its role."""
        at.row(
            "kvm_mmu_get_page", self._costs.root, created, root=root, role=role, level=LEVEL, gfn=0, table=root, flags=1
        )
        at.row("root_get", self._costs.found * 0.5, where, root=root, role=role, refs=refs)
        at.row("mmu_load", self._costs.found * 0.5, where, root=root, role=role)

    def _load_normal(self, at: Cursor, done: Resolution, steps: Ints) -> Ints:
        """Write the load of the normal root, a new one where its life has ended; return the roots' frames."""
        root = done.roots[done.life[steps] + done.ends[steps]]
        self._load(at, root, ROLE, self._mmu.refs, done.ends[steps])
        return root

    def _reset_and_load(self, at: Cursor, done: Resolution, steps: Ints, puts: Ints) -> Ints:
        puts[steps] = self._reset(at, done.roots[done.life[steps]], ROLE, self._mmu.refs)
        return self._load_normal(at, done, steps)
