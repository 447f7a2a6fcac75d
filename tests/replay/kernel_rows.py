# SPDX-License-Identifier: Apache-2.0
"""Rows of one VM as a kernel shows them, written by hand: what the lab's guests do too seldom to be recorded."""

from __future__ import annotations

from typing import Any

from replay.validate.compare import machine_of
from replay.validate.row_tuples import RowTuple
from replay.validate.tdp_driver import ConformanceCheck
from traces import kernels

ROLE, NESTED_ROLE = 0x3784, 0x23784
SHADOW_ROLE = 0x23704  # of the tables of L1 for a nested guest: not direct
VMM = 1  # the thread that has the VM's descriptor; vCPU n runs in thread VCPU + n
VCPU = 10
HVA = 0x7F0000000000
SET_MEMORY, ENABLE_CAP, GET_LOG, CLEAR_LOG = 0x4020AE46, 0x4068AEA3, 0x4010AE42, 0xC018AEC0
NO_SLOT = 1 << 63
LEAF = 0xE67  # present, writable for the guest, host and MMU, accessed and dirty (6.1 with NPT)
HUGE = 0xEE7
TABLE = 0x827
ABSENT = {"6.1.100": 0, "6.12.50": 1 << 63, "7.3.4": 1 << 63}
MMIO = 0x8000000000477


class KernelRows:
    """`rows` grow with each step; `leaves` is what is mapped in root 1, by guest frame."""

    def __init__(self, kernel: str = "6.1.100") -> None:
        self.kernel = kernel
        self.absent = ABSENT[kernel]
        self.rows: list[RowTuple] = []
        self.leaves: dict[int, int] = {}
        self.apart: set[int] = set()  # rows of nested guests' own paging
        self._tables: dict[tuple[int, int, int], int] = {}
        self._frames = 0x9000

    def row(self, kind: str, tid: int = VMM, vcpu: int | None = None, gfn: int | None = None, **cells: Any) -> None:
        seq = len(self.rows)
        blank = dict.fromkeys(RowTuple._fields, 0)
        at = {"seq": seq, "time": 1000 * seq, "vcpu": vcpu, "tid": tid, "kind": kind, "gfn": gfn}
        self.rows.append(RowTuple(**{**blank, **at, **cells}))

    def of(self, vcpu: int, kind: str, gfn: int | None = None, **cells: Any) -> None:
        self.row(kind, VCPU + vcpu, vcpu, gfn, **cells)

    def shadow(self, kind: str, gfn: int | None = None, **cells: Any) -> None:
        """A row of vCPU 0 that is of the shadow of L1's tables."""
        self.apart.add(len(self.rows))
        self.of(0, kind, gfn, **{"role": SHADOW_ROLE, **cells})

    def ioctl(self, code: int, tid: int = VMM) -> None:
        self.row("ioctl", tid, code=code)

    def done(self, code: int, tid: int = VMM, ret: int = 0) -> None:
        self.row("ioctl_end", tid, code=code, ret=ret)

    def memslot(self, gfn: int, pages: int, flags: int = 0, slot: int = 0) -> None:
        """The ioctl begins: `done` ends it."""
        self.ioctl(SET_MEMORY)
        self.row("memslot", gfn=gfn, value=pages, addr=HVA + (gfn << 12), code=flags, slot=slot)

    def slot(self, gfn: int, pages: int, flags: int = 0, slot: int = 0) -> None:
        self.memslot(gfn, pages, flags, slot)
        self.done(SET_MEMORY)

    def load(self, vcpu: int = 0, root: int = 1, role: int = ROLE, refs: int = 2, created: bool = True) -> None:
        frame = 0x8000 + root
        if created:
            self.of(vcpu, "kvm_mmu_get_page", 0, root=root, role=role, level=4, table=frame, flags=1)
        self.of(vcpu, "root_get", root=root, role=role, refs=refs)
        self.of(vcpu, "mmu_load", root=root, role=role)

    def put(self, refs: int, root: int = 1, role: int = ROLE, tid: int = VMM) -> None:
        vcpu = tid - VCPU if tid >= VCPU else None
        self.row("root_put", tid, vcpu, root=root, role=role, refs=refs, table=0x8000 + root)

    def requested(self, vcpu: int, gfn: int, frame: int, level: int = 1, root: int = 1, code: int = 4) -> None:
        self.of(vcpu, "kvm_page_fault", root=root, role=ROLE, addr=gfn << 12, code=code)
        self.of(vcpu, "kvm_mmu_spte_requested", gfn, root=root, level=level, value=frame)

    def table(self, vcpu: int, gfn: int, level: int, role: int = ROLE) -> int:
        """A table is made, not yet linked."""
        self._frames += 1
        span = 512 << 9 * (level - 1)
        self.of(
            vcpu, "kvm_mmu_get_page", gfn & -span, role=role & ~15 | level, level=level, table=self._frames, flags=1
        )
        return self._frames

    def link(self, vcpu: int, gfn: int, level: int, frame: int, root: int = 1, old: int | None = None) -> None:
        """The entry above a table of `level` points to it."""
        self._tables[root, level, gfn >> 9 * level] = frame
        cells = {"root": root, "level": level + 1, "old": self.absent if old is None else old}
        self.of(vcpu, "kvm_tdp_mmu_spte_changed", gfn & -(1 << 9 * level), new=frame << 12 | TABLE, **cells)

    def tables(self, vcpu: int, gfn: int, level: int = 1, root: int = 1, role: int = ROLE) -> None:
        """All tables that are missing down to `level`."""
        for below in range(3, level - 1, -1):
            if (root, below, gfn >> 9 * below) not in self._tables:
                self.link(vcpu, gfn, below, self.table(vcpu, gfn, below, role), root)

    def leaf(self, vcpu: int, gfn: int, frame: int, level: int = 1, root: int = 1) -> None:
        """The leaf is written."""
        word = frame << 12 | (LEAF if level == 1 else HUGE)
        place = {"root": root, "level": level, "gfn": gfn}
        self.of(vcpu, "kvm_tdp_mmu_spte_changed", old=self.absent, new=word, **place)
        self.of(vcpu, "kvm_mmu_set_spte", new=word, table=self._tables[root, level, gfn >> 9 * level], **place)
        if root == 1:
            self.leaves[gfn] = word

    def fault(self, vcpu: int, gfn: int, frame: int, level: int = 1, root: int = 1, role: int = ROLE) -> None:
        self.requested(vcpu, gfn, frame, level, root)
        self.tables(vcpu, gfn, level, root, role)
        self.leaf(vcpu, gfn, frame, level, root)
        self.of(vcpu, "kvm_entry", root=root)

    def protect(self, gfn: int, tid: int = VMM) -> None:
        word = self.leaves[gfn]
        self.leaves[gfn] = word & ~2
        self.row("kvm_tdp_mmu_spte_changed", tid, level=1, gfn=gfn, old=word, new=word & ~2)

    def unmap(self, gfn: int, pages: int, tid: int = VMM) -> None:
        """The notifier's event alone."""
        start = HVA + (gfn << 12)
        self.row("kvm_unmap_hva_range", tid, addr=start, value=start + (pages << 12))

    def unmapped(self, gfn: int, pages: int, refs: int, tid: int = VMM) -> None:
        """A notifier, and what it takes from root 1."""
        self.unmap(gfn, pages, tid)
        for at in sorted(self.leaves):
            if gfn <= at < gfn + pages:
                self.row("kvm_tdp_mmu_spte_changed", tid, level=1, gfn=at, old=self.leaves.pop(at), new=self.absent)
        self.put(refs, tid=tid)

    def check(self, rows: list[RowTuple] | None = None) -> ConformanceCheck:
        """The conformance check after these rows."""
        kernel = kernels.at(self.kernel)
        check = ConformanceCheck(machine_of(kernel, kernel.parameters("preserve")))
        check.run(self.rows if rows is None else rows)
        check.finish()
        return check

    def why(self, rows: list[RowTuple] | None = None) -> str:
        """The first difference from what the model predicts; empty if there is none."""
        check = self.check(rows)
        if check.first is not None:
            return check.first.why
        clean = all(not tally.mismatched and not tally.missing for tally in check.tallies.values())
        return "" if clean else "rows missing at the end"
