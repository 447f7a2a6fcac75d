"""The touch path of decoding: which rows say that a vCPU needed a page mapped.

A leaf install is a touch; on shadow-MMU recordings only that of the frame last requested, the others being prefetch
(HIDDEN: whether the guest needed those is not known). A fault on a present leaf is a FIX.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.capabilities import Evidence
from replay.decode.inferred import Installs, Unseen
from replay.decode.inputs import HIDDEN, Out
from replay.decode.lookback import Ints, Last, Rows, word_of
from replay.decode.slots import Slots
from replay.simulate.operations import FIRST_SHIFT, LAST_SHIFT, LEVEL_SHIFT, VCPU_SHIFT, Op
from traces.schema import BY_NAME

_MARK: Final = BY_NAME["mark_mmio_spte"].code
_SET: Final = BY_NAME["kvm_mmu_set_spte"].code
_BITS: Final = 9
_REGION: Final = 1 << _BITS
_LARGE: Final = np.uint64(1 << 7)
_SMM_SHIFT: Final = 24
# Bits that say a leaf was there: SVM's error code (as of #PF); VMX's qualification (readable, writable, executable).
_PRESENT_SVM: Final = np.uint64(1)
_PRESENT_VMX: Final = np.uint64(7 << 3)


class Touches:
    """Of one VM. `groups`: also find out what the shadow MMU may prefetch around each touch."""

    def __init__(self, evidence: Evidence, vcpus: int, slots: Slots, groups: bool) -> None:
        self._evidence = evidence
        self._slots = slots
        self._groups = groups
        self._requested = Last(vcpus, -1)
        self._marked = Last(vcpus, -1)
        self._present = Last(vcpus, 0)
        self._began = Last(vcpus, -1)
        self._bit = _PRESENT_VMX if evidence.intel else _PRESENT_SVM
        self._built, self._built_at = Last(vcpus, -1), Last(vcpus, -1)
        self._unseen = Unseen() if evidence.infers else None
        self.last = Last(vcpus, -1)  # the row number (seq) of each vCPU's last touch
        self.inferred = 0
        self.hidden = 0

    def emit(self, rows: Rows, out: Out, roles: NDArray[np.uint32]) -> tuple[Ints, NDArray[np.int32]]:
        """Put touches and fixes out; returns the rows that were touches, and their vCPUs."""
        at = rows.of_vcpu("kvm_mmu_set_spte", "mark_mmio_spte")
        faults = rows.of_vcpu("kvm_page_fault")
        touched = np.empty(0, np.int64)
        if len(at):
            touched = self._installs(rows, out, at, faults, roles)
        self._keep(rows, faults)
        fixed = self._fast(rows, out)
        if len(fixed):
            touched = np.sort(np.concatenate([touched, fixed]))
        return touched, rows.vcpu[touched]

    def _keep(self, rows: Rows, faults: Ints) -> None:
        if len(faults):
            self._present.keep(rows.vcpu[faults], (rows.code[faults] & self._bit != 0).astype(np.int64))
            self._began.keep(rows.vcpu[faults], rows.seq[faults])
        if self._evidence.shadow:
            requests = rows.of_vcpu("kvm_mmu_spte_requested")
            self._requested.keep(rows.vcpu[requests], rows.gfn[requests])
        if self._unseen is not None:
            built = _tables(rows)
            self._built.keep(rows.vcpu[built], rows.seq[built])
            self._built_at.keep(rows.vcpu[built], rows.gfn[built])

    def _installs(self, rows: Rows, out: Out, at: Ints, faults: Ints, roles: NDArray[np.uint32]) -> Ints:
        level = np.where(rows.kind[at] == _MARK, 1, rows.level[at]).astype(np.int64)
        gfn = rows.gfn[at] & -(1 << _BITS * (level - 1))
        at, level, gfn = self._once(rows, at, level, gfn)
        vcpu = rows.vcpu[at]
        flags = np.zeros(len(at), np.int64)
        if self._evidence.shadow:
            hidden = self._is_hidden(rows, at, vcpu, level, gfn)
            self.hidden += int(hidden.sum())
            flags |= hidden * HIDDEN
        present = self._is_present(rows, faults, at, vcpu)
        space = (word_of(roles, rows.root[at]) >> _SMM_SHIFT != 0).astype(np.int64)
        # MMIO exits whether its SPTE is there or not: then it is emulated.
        exits = present | (rows.kind[at] == _MARK)
        op = (
            np.where(exits, int(Op.FIX), int(Op.TOUCH))
            | level << LEVEL_SHIFT
            | vcpu.astype(np.int64) << VCPU_SHIFT
            | flags
        )
        if self._groups:
            first, last = self._slots.groups(space, gfn, rows.time[at])
            op |= first << FIRST_SHIFT | last << LAST_SHIFT
        if self._unseen is not None:
            began = self._began.before(rows.vcpu[faults], faults, rows.seq[faults], vcpu, at)
            asks = ~present & (flags == 0)
            root, rebuilt = rows.root[at].astype(np.int64), self._is_rebuilt(rows, at, vcpu, gfn, began)
            pages, tables = self._unseen.find(rows, Installs(root, gfn, level, rows.seq[at], began, asks, rebuilt))
            self.inferred += len(pages) + len(tables)
            for gone, mask in ((pages, -1), (tables, -_REGION)):
                size = np.int64(1) << _BITS * (level[gone] - 1) if mask == -1 else _REGION
                start = gfn[gone] & mask
                out.ranges(at[gone], int(Op.ZAP) | space[gone] << LEVEL_SHIFT, start, start + size)
        out.add(at, op, gfn)
        return at

    def _once(self, rows: Rows, at: Ints, level: Ints, gfn: Ints) -> tuple[Ints, Ints, Ints]:
        """Without what is told twice: 5.10's TDP MMU reports one MMIO SPTE by both events."""
        marks = rows.kind[at] == _MARK
        if not marks.any() and not (self._marked.left >= 0).any():
            return at, level, gfn
        vcpu = rows.vcpu[at]
        marked = np.where(marks, gfn, -1)
        again = ~marks & (self._marked.before(vcpu, at, marked, vcpu, at) == gfn)
        self._marked.keep(vcpu, marked)
        return at[~again], level[~again], gfn[~again]

    def _is_hidden(self, rows: Rows, at: Ints, vcpu: NDArray[np.int32], level: Ints, gfn: Ints) -> NDArray[np.bool_]:
        requests = rows.of_vcpu("kvm_mmu_spte_requested")
        asked = self._requested.before(rows.vcpu[requests], requests, rows.gfn[requests], vcpu, at)
        other: NDArray[np.bool_] = (asked & -(1 << _BITS * (level - 1)) != gfn) & (rows.kind[at] == _SET)
        return other

    def _is_rebuilt(self, rows: Rows, at: Ints, vcpu: NDArray[np.int32], gfn: Ints, began: Ints) -> NDArray[np.bool_]:
        """Installs whose fault built the table of level 1 that they are in: the last table that it built."""
        built = _tables(rows)
        when = self._built.before(rows.vcpu[built], built, rows.seq[built], vcpu, at)
        which = self._built_at.before(rows.vcpu[built], built, rows.gfn[built], vcpu, at)
        rebuilt: NDArray[np.bool_] = (when > began) & (which == gfn & -_REGION)
        return rebuilt

    def _is_present(self, rows: Rows, faults: Ints, at: Ints, vcpu: NDArray[np.int32]) -> NDArray[np.bool_]:
        present = rows.code[faults] & self._bit != 0
        if not present.any() and not self._present.left.any():
            return np.zeros(len(at), np.bool_)
        before: NDArray[np.bool_] = (
            self._present.before(rows.vcpu[faults], faults, present.astype(np.int64), vcpu, at) != 0
        )
        return before

    def _fast(self, rows: Rows, out: Out) -> Ints:
        """Faults mended without mmu_lock."""
        at = rows.of_vcpu("fast_page_fault")
        fixed: NDArray[np.bool_] = rows.ret[at] == self._evidence.kernel.fixed
        at = at[fixed]
        if len(at):
            level = np.where((rows.old[at] | rows.new[at]) & _LARGE != 0, 2, 1)
            gfn = (rows.addr[at] >> np.uint64(12)).astype(np.int64) & -(1 << _BITS * (level - 1))
            vcpu = rows.vcpu[at].astype(np.int64)
            own = gfn & 7
            op = int(Op.FIX) | level << LEVEL_SHIFT | vcpu << VCPU_SHIFT | own << FIRST_SHIFT | own << LAST_SHIFT
            out.add(at, op, gfn)
        return at


def _tables(rows: Rows) -> Ints:
    """Rows that say that a vCPU's fault built a table."""
    at = rows.of_vcpu("kvm_mmu_get_page")
    built: NDArray[np.bool_] = (rows.flags[at] & 1 != 0) & (rows.root[at] == 0)
    return at[built]
