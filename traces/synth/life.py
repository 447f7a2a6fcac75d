# SPDX-License-Identifier: Apache-2.0
"""The rare parts of a VM's life, row by row: its creation, a memslot deleted and created again, its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from traces.record import Columns
from traces.synth.guest import AFTER_RIP, DATA_GFN, DATA_RIP, LOW_PAGES, RESET_RIP
from traces.synth.kvm_rows import EXIT_INTR, EXIT_IO, IO_INFO, IO_RIP, USERSPACE_IO
from traces.synth.mmu import ALL_ROOTS, LEVEL, ROLE, SMM_ROLE, Leaves, Mmu, Tables
from traces.synth.parameters import Parameters, SynthCosts
from traces.synth.root_zaps import Dying, zap
from traces.synth.row_columns import Listing, rows

GET_API_VERSION, CREATE_VM, CHECK_EXTENSION, GET_VCPU_MMAP_SIZE = 0xAE00, 0xAE01, 0xAE03, 0xAE04
CREATE_VCPU, SET_MEMSLOT, SET_TSS_ADDR = 0xAE41, 0x4020AE46, 0xAE47
SET_REGS, GET_SREGS, SET_SREGS = 0x4090AE82, 0x8138AE83, 0x4138AE84
MMAP_SIZE: Final = 12288
_ARGUMENT: Final = 0x7FFD00000000  # where userspace keeps the ioctl's structure
_HVA: Final = 0x7F0000000000
_DEVICE_PAGES: Final = 16
_CPUS: Final = 256


@dataclass(frozen=True)
class Threads:
    """Thread ids and host CPUs of one VM: its main thread, vCPUs and worker, as columns of rows."""

    vm: int
    vcpus: int

    @property
    def tgid(self) -> int:
        return 10_000 + self.vm * (self.vcpus + 3)

    def main(self, vcpu: int = -1) -> dict[str, Any]:
        """Return the main thread's columns, perhaps at work on a vCPU."""
        return {"tid": self.tgid, "tgid": self.tgid, "cpu": self._cpu(0), "vcpu": vcpu}

    def vcpu(self, vcpu: Any) -> dict[str, Any]:
        return {"tid": self.tgid + 2 + vcpu, "tgid": self.tgid, "cpu": self._cpu(1 + vcpu), "vcpu": vcpu}

    def worker(self) -> dict[str, Any]:
        return {"tid": self.tgid + 1, "tgid": self.tgid + 1, "cpu": self._cpu(1 + self.vcpus)}

    def rcu(self) -> dict[str, Any]:
        """Return the columns of RCU callbacks, which run from the idle task."""
        return {"tid": 0, "tgid": 0, "cpu": self._cpu(1 + self.vcpus)}

    def comms(self) -> dict[str, dict[str, str]]:
        """Return the threads' names, as a recorder notes them."""
        named = {self.tgid: "synth-vmm", self.tgid + 1: f"kworker/u4:{self.vm}"}
        named |= {self.tgid + 2 + vcpu: f"CPU {vcpu}/KVM" for vcpu in range(self.vcpus)}
        return {str(tid): {"comm": comm} for tid, comm in named.items()}

    def _cpu(self, which: Any) -> Any:
        return (self.vm * (self.vcpus + 2) + which) % _CPUS


@dataclass
class Fallen:
    """A root that an invalidation or the VM's end removed, with its tables and leaves: RCU frees them."""

    roots: Dying
    tables: Tables
    leaves: Leaves


class Life:
    """Makes the rows of one VM's rare events, and changes its MMU's state accordingly."""

    def __init__(self, parameters: Parameters, threads: Threads, mmu: Mmu) -> None:
        self._costs: SynthCosts = parameters.costs
        self._zap_rows = parameters.zap_rows
        self._pages = parameters.memory >> 12
        self._threads, self._mmu = threads, mmu
        self._generation = 0

    def before(self) -> Listing:
        """Return the rows of what userspace asks before there is a VM."""
        listing = Listing()
        self._ioctl(listing, GET_API_VERSION, 0, 12)
        self._ioctl(listing, CHECK_EXTENSION, 0x75, 1)
        listing.row("ioctl", self._costs.ioctl, code=CREATE_VM, **self._threads.main())
        return listing

    def create(self) -> Listing:
        """Return rows that create the VM, its slots and vCPUs; each vCPU loads the first root and enters the guest."""
        listing, costs = Listing(), self._costs
        listing.row("vm_create", costs.ioctl, **self._threads.main())
        listing.row("ioctl_end", costs.ioctl, code=CREATE_VM, ret=4, **self._threads.main())
        self._ioctl(listing, SET_TSS_ADDR, 0xFFFBD000, 0)
        for slot in range(3):
            for as_id in (0, 1):
                self._memslot(listing, slot, as_id)
        for vcpu in range(self._mmu.vcpus):
            self._ioctl(listing, GET_VCPU_MMAP_SIZE, 0, MMAP_SIZE)
            self._ioctl(listing, CREATE_VCPU, vcpu, 5 + vcpu)
            self._ioctl(listing, GET_SREGS, _ARGUMENT, 0, vcpu)
            listing.row("ioctl", costs.ioctl, code=SET_SREGS, value=_ARGUMENT, **self._threads.main(vcpu))
            listing.row("mmu_reset", costs.unload, role=ROLE, **self._threads.main(vcpu))
            self._free_nothing(listing)
            listing.row("ioctl_end", costs.ioctl, code=SET_SREGS, **self._threads.main())
            self._ioctl(listing, SET_REGS, _ARGUMENT, 0, vcpu)
        for vcpu in range(self._mmu.vcpus):
            self._load(listing, vcpu, vcpu)
            listing.row("kvm_entry", costs.entry, root=self._mmu.tree.root, rip=RESET_RIP, **self._threads.vcpu(vcpu))
        return listing

    def churn(self, caller: int) -> tuple[Listing, list[Fallen]]:
        """Return the rows of slot 2 deleted and created again, at a call of this vCPU, and the roots removed by it."""
        listing, costs, mmu = Listing(), self._costs, self._mmu
        self._call_out(listing, caller)
        old, fallen = mmu.tree.root, self._roots(invalid=True)
        for as_id in (0, 1):
            self._memslot_begin(listing, 2, as_id, 0)
            listing.row("kvm_mmu_zap_all_fast", costs.ioctl / 2, flags=self._generation, **self._threads.main())
            self._generation ^= 1
            listing.row("roots_invalidate", costs.ioctl / 2, **self._threads.main())
            listing.row("zap_invalidated_begin", costs.unload, **self._threads.main())
            if as_id == 0:
                self._zap_invalid(listing, fallen)
            elif mmu.preserve:  # the second walk finds the root again, because the vCPUs still hold it
                self._put(listing, fallen[-1].roots, mmu.refs, self._threads.main())
            listing.row("zap_invalidated_end", costs.unload, **self._threads.main())
            listing.row("ioctl_end", costs.ioctl, code=SET_MEMSLOT, **self._threads.main())
        for as_id in (0, 1):
            self._memslot(listing, 2, as_id)
        others = [vcpu for vcpu in range(mmu.vcpus) if vcpu != caller]
        for index, vcpu in enumerate([*others, caller]):
            thread = self._threads.vcpu(vcpu)
            if vcpu != caller:
                listing.row("kvm_exit", costs.exit, code=EXIT_INTR, rip=DATA_RIP, **thread)
            listing.row("mmu_free_obsolete_roots", costs.unload / 2, root=old, role=ROLE, **thread)
            listing.row("mmu_free_roots", costs.unload / 2, root=old, role=ROLE, value=1, **thread)
            self._put(listing, fallen[-1].roots, mmu.vcpus - index, thread)
            self._load(listing, vcpu, index)
            rip = AFTER_RIP if vcpu == caller else DATA_RIP
            listing.row("kvm_entry", costs.entry, root=mmu.tree.root, rip=rip, **thread)
        return listing, fallen

    def destroy(self) -> tuple[Listing, list[Fallen]]:
        """Return the rows by which the vCPUs leave the guest and the VM's process exits, and the roots removed."""
        listing, costs, mmu, main = Listing(), self._costs, self._mmu, self._threads.main()
        for vcpu in range(mmu.vcpus):
            self._call_out(listing, vcpu)
        fallen = self._roots(invalid=False)
        listing.row("zap_all", costs.ioctl, **main)
        for root in fallen:
            self._zap(listing, root, self._threads.main(), shared=False)
            self._put(listing, root.roots, root.roots.refs, main)
        listing.row("vm_destroy", costs.ioctl, **main)
        for vcpu in range(mmu.vcpus):
            listing.row("mmu_unload", costs.unload, root=mmu.tree.root, role=ROLE, **self._threads.main(vcpu))
            listing.row("mmu_free_roots", costs.unload, root=mmu.tree.root, role=ROLE, value=ALL_ROOTS, **main)
            self._put(listing, fallen[-1].roots, mmu.refs - vcpu, main)
            listing.row("mmu_free_roots", costs.unload, value=ALL_ROOTS, **main)
        for _ in range(mmu.vcpus):
            self._free_nothing(listing)
        for root in fallen:  # roots are zapped once more, but are empty by now
            root.roots.invalid, root.roots.refs = True, 1 + mmu.preserve
        none = np.empty(0, np.int64)
        empty = [Fallen(root.roots, Tables(*[none] * 4), Leaves(*[none] * 4)) for root in fallen]
        if not mmu.preserve:
            self._zap_invalid(listing, empty)
            listing.row("roots_invalidate", costs.ioctl, **main)
        listing.row("zap_invalidated_begin", costs.unload, **main)
        if mmu.preserve:
            self._zap_invalid(listing, empty)
        listing.row("zap_invalidated_end", costs.unload, **main)
        return listing, fallen

    def _roots(self, invalid: bool) -> list[Fallen]:
        """Return the valid roots, newest first, as a walk that holds references has them; the SMM root is forgotten."""
        mmu, found = self._mmu, []
        if len(mmu.smm):
            tables, leaves = mmu.smm_tree(mmu.smm[None, :])
            found.append(Fallen(Dying(mmu.smm[:1], np.array([SMM_ROLE]), 2, invalid), tables, leaves))
            mmu.smm = mmu.smm[:0]
        tree = mmu.tree
        roots = Dying(np.array([tree.root]), np.array([ROLE]), mmu.refs + 1, invalid)
        return [*found, Fallen(roots, tree.tables(), tree.leaves(mmu.host))]

    def _zap_invalid(self, listing: Listing, fallen: list[Fallen]) -> None:
        """Add zaps of invalid roots: by the invalidating task with a reference of its own, or by the worker."""
        for root in fallen:
            thread = self._threads.main() if self._mmu.preserve else self._threads.worker()
            self._zap(listing, root, thread, shared=True)
            self._put(listing, root.roots, root.roots.refs, thread)
            if self._mmu.preserve:
                self._put(listing, root.roots, root.roots.refs - 1, thread)

    def _zap(self, listing: Listing, root: Fallen, thread: dict[str, Any], shared: bool) -> None:
        if self._zap_rows:
            columns, _ = zap(root.roots, root.tables, root.leaves, shared)
            listing.block(_on(columns, thread), self._costs.zap_entry)

    def _put(self, listing: Listing, root: Dying, refs: int, thread: dict[str, Any]) -> None:
        listing.block(_on(put(root, refs), thread), self._costs.unload / 4)

    def _load(self, listing: Listing, vcpu: int, holders: int) -> None:
        """Add the load of the normal root, which `holders` vCPUs have already; the first one creates it."""
        mmu, thread = self._mmu, self._threads.vcpu(vcpu)
        if holders == 0:
            root = mmu.create_root()
            listing.row(
                "kvm_mmu_get_page", self._costs.root,
                root=root, role=ROLE, level=LEVEL, gfn=0, table=root, flags=1, **thread,
            )  # fmt: skip
        refs = holders + 1 + mmu.preserve
        listing.row("root_get", self._costs.found / 2, root=mmu.tree.root, role=ROLE, refs=refs, **thread)
        listing.row("mmu_load", self._costs.found / 2, root=mmu.tree.root, role=ROLE, **thread)

    def _call_out(self, listing: Listing, vcpu: int) -> None:
        thread, costs = self._threads.vcpu(vcpu), self._costs
        listing.row("kvm_exit", costs.exit, code=EXIT_IO, rip=IO_RIP, value=IO_INFO, addr=AFTER_RIP, **thread)
        listing.row("kvm_userspace_exit", costs.userspace, code=USERSPACE_IO, **thread)

    def _free_nothing(self, listing: Listing) -> None:
        main = self._threads.main()
        listing.row("mmu_free_roots", self._costs.unload / 8, role=ROLE, value=ALL_ROOTS, **main)
        listing.row("mmu_free_roots", self._costs.unload / 8, value=ALL_ROOTS, **main)

    def _ioctl(self, listing: Listing, command: int, value: int, ret: int, vcpu: int = -1) -> None:
        listing.row("ioctl", self._costs.ioctl / 8, code=command, value=value, **self._threads.main(vcpu))
        listing.row("ioctl_end", self._costs.ioctl, code=command, ret=ret, **self._threads.main())

    def _memslot(self, listing: Listing, slot: int, as_id: int) -> None:
        pages = (LOW_PAGES, self._pages, _DEVICE_PAGES)[slot]
        self._memslot_begin(listing, slot, as_id, pages)
        listing.row("ioctl_end", self._costs.ioctl, code=SET_MEMSLOT, **self._threads.main())

    def _memslot_begin(self, listing: Listing, slot: int, as_id: int, pages: int) -> None:
        gfn = (0, DATA_GFN, DATA_GFN + self._pages + LOW_PAGES)[slot]
        main = self._threads.main()
        listing.row("ioctl", self._costs.ioctl / 8, code=SET_MEMSLOT, value=_ARGUMENT, **main)
        listing.row(
            "memslot", self._costs.ioctl / 8,
            as_id=as_id, gfn=gfn, addr=_HVA + (gfn << 12), value=pages, slot=slot, **main,
        )  # fmt: skip


def put(root: Dying, refs: int) -> Columns:
    """Return rows by which a reference on each of these roots is dropped; `refs` is the number before that."""
    return rows("root_put", len(root.frame), root=root.frame, role=root.word, table=root.frame, refs=refs)


def _on(columns: Columns, thread: dict[str, Any]) -> Columns:
    for name, value in thread.items():
        columns[name][:] = value
    return columns
