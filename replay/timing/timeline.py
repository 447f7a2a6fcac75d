"""Where a vCPU's time went, as recorded: in the guest, or in what part of handling an exit.

The time between two rows of a vCPU's thread is put down to what the later row says was being done, or, where that says
nothing (an exit's reason, the entry itself), to what the earlier one began. Every ns between the first root a vCPU
loads (or its first entry) and its last row is put down exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.lookback import Ints, Rows
from traces.schema import BY_NAME


class Doing(IntEnum):
    """What a vCPU's thread spends its time on."""

    GUEST = 0  # kvm_entry to kvm_exit: the guest runs, and the switch there and back
    FAULT = 1  # a fault in the second-level (or shadow) tables
    LOAD = 2  # a root is found or built
    UNLOAD = 3  # root slots are emptied
    ZAP = 4  # a root's last put zaps it inline
    SMM = 5  # an SMI or RSM is emulated
    USER = 6  # userspace has the vCPU
    OTHER = 7  # any other exit
    PREFETCH = 8  # the shadow MMU fills one entry more than it was asked for


_NEUTRAL: Final = 255
_OF_KIND: Final = {
    Doing.FAULT: (
        "kvm_page_fault", "kvm_mmu_spte_requested", "kvm_mmu_get_page", "kvm_tdp_mmu_spte_changed",
        "kvm_mmu_set_spte", "fast_page_fault", "mark_mmio_spte", "handle_mmio_page_fault", "check_mmio_spte",
        "kvm_mmu_sync_page", "kvm_mmu_unsync_page",
    ),
    Doing.LOAD: ("root_get", "mmu_load", "new_pgd"),
    Doing.UNLOAD: (
        "mmu_unload", "mmu_free_roots", "mmu_free_obsolete_roots", "root_put", "zap_root_begin",
        "kvm_mmu_prepare_zap_page",
    ),
    Doing.ZAP: ("zap_root_end",),
    Doing.SMM: ("kvm_smm_transition",),
    Doing.USER: ("kvm_userspace_exit", "ioctl", "ioctl_end"),
    Doing.OTHER: ("kvm_exit",),
}  # fmt: skip
_ENTRY: Final = BY_NAME["kvm_entry"].code
_EXIT: Final = BY_NAME["kvm_exit"].code
_INTERRUPTS: Final = (0x60, 1)  # SVM_EXIT_INTR, EXIT_REASON_EXTERNAL_INTERRUPT
_FAULT: Final = BY_NAME["kvm_page_fault"].code
_USER_EXIT: Final = BY_NAME["kvm_userspace_exit"].code
_GET_PAGE: Final = BY_NAME["kvm_mmu_get_page"].code
_SET: Final = BY_NAME["kvm_mmu_set_spte"].code
_TABLE_FREE: Final = BY_NAME["table_free"].code  # an RCU callback that interrupts whatever runs


def _classes() -> NDArray[np.uint8]:
    classes = np.full(256, _NEUTRAL, np.uint8)
    for doing, names in _OF_KIND.items():
        for name in names:
            classes[BY_NAME[name].code] = doing
    return classes


_CLASS: Final = _classes()


@dataclass(frozen=True)
class Spans:
    """Stretches of vCPUs' time in one batch, by vCPU and in order: each ends at `time` with row `seq`, `ns` long."""

    vcpu: NDArray[np.int32]
    seq: Ints
    time: Ints
    ns: Ints
    doing: NDArray[np.uint8]
    kind: NDArray[np.uint8]
    before: NDArray[np.uint8]  # kind of the row that it begins with
    root: Ints
    still: NDArray[np.bool_]  # in the guest, which came back at the RIP it had gone in with
    bare: NDArray[np.bool_]  # of these, those in which no instruction can have ended: the switch, and nothing else
    interrupt: NDArray[np.bool_]  # ends with an exit for a host interrupt


class Timeline:
    """Splits batch after batch of one VM. `totals` is ns by vCPU and Doing."""

    def __init__(self, vcpus: int, prefetches: bool = False, intel: bool = False) -> None:
        """`prefetches`: the recorded MMU does, as the shadow MMU. `intel`: faults have EPT's codes."""
        self._prefetches = prefetches
        self._intel = intel
        self._fetched = np.zeros(vcpus, np.bool_)
        self.totals = np.zeros((vcpus, len(Doing)), np.int64)
        self.backwards = 0  # rows whose clock was behind their thread's last one
        self._time = np.full(vcpus, -1, np.int64)
        self._kind = np.full(vcpus, _NEUTRAL, np.uint8)
        self._rip = np.zeros(vcpus, np.uint64)
        self._about = np.full(vcpus, Doing.OTHER, np.uint8)
        self._threads: set[int] = set()

    def feed(self, rows: Rows) -> Spans:
        """The spans that end in a batch."""
        kept = np.flatnonzero((rows.vcpu >= 0) & (rows.kind != _TABLE_FREE))
        kept = kept[self._running(rows.tid[kept], self._classes(rows, kept), rows.kind[kept])]
        kept = kept[np.argsort(rows.vcpu[kept].astype(np.uint16), kind="stable")]
        vcpu, kind, time = rows.vcpu[kept], rows.kind[kept], rows.time[kept]
        first = np.ones(len(kept), np.bool_)
        first[1:] = vcpu[1:] != vcpu[:-1]
        before, past = np.empty_like(kind), np.empty_like(time)
        before[1:], past[1:] = kind[:-1], time[:-1]
        before[first], past[first] = self._kind[vcpu[first]], self._time[vcpu[first]]

        own = self._classes(rows, kept)
        about = self._carried(own, vcpu, first)
        doing = np.where(before == _USER_EXIT, np.uint8(Doing.USER), about)
        doing = np.where((before == _ENTRY) & (kind == _EXIT), np.uint8(Doing.GUEST), doing)
        if self._prefetches:
            doing = np.where((before == _SET) & (kind == _SET), np.uint8(Doing.PREFETCH), doing)

        rip = rows.rip[kept]
        entered = np.empty_like(rip)
        entered[1:] = rip[:-1]
        entered[first] = self._rip[vcpu[first]]
        still = (doing == Doing.GUEST) & (rip == entered)

        bare = still & (kind == _EXIT) & self._fetching(kind, rows.code[kept], vcpu, first)

        interrupt = (kind == _EXIT) & np.isin(rows.code[kept], _INTERRUPTS)

        started = past >= 0
        ns = np.where(started, time - past, 0)
        self.backwards += int((ns < 0).sum())
        ns = np.maximum(ns, 0)
        np.add.at(self.totals, (vcpu, doing), ns)
        last = np.flatnonzero(np.append(first[1:], True)) if len(kept) else kept
        self._time[vcpu[last]], self._kind[vcpu[last]], self._rip[vcpu[last]] = time[last], kind[last], rip[last]
        self._about[vcpu[last]] = about[last]
        root = rows.root[kept].astype(np.int64)
        return Spans(vcpu, rows.seq[kept], time, ns, doing, kind, before, root, still, bare, interrupt)

    @staticmethod
    def _classes(rows: Rows, at: Ints) -> NDArray[np.uint8]:
        own = _CLASS[rows.kind[at]]
        own[(rows.kind[at] == _GET_PAGE) & (rows.root[at] != 0)] = Doing.LOAD
        return own

    def _fetching(
        self, kind: NDArray[np.uint8], code: NDArray[np.uint64], vcpu: NDArray[np.int32], first: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Whether the last exit before each row was a fault on an instruction or on the guest's own page tables.

        Then the guest has yet to end the instruction that it goes in with, and a fault at it again is of its data.
        """
        # EPT, bit 2: fetch; 7 and 8: a linear address, of which the access itself (1) or the walk (0).
        # Nested paging of AMD, bit 4: fetch; 33: the walk.
        bits = (code & 4 != 0) | (code & 0x180 == 0x80) if self._intel else code & (1 << 4 | 1 << 33) != 0
        of_fault = bits & (kind == _FAULT)
        sets = np.where((kind == _FAULT) | (kind == _EXIT), np.arange(len(kind)), -1)
        begins = np.maximum.accumulate(np.where(first, np.arange(len(kind)), 0))
        last = np.append(-1, np.maximum.accumulate(sets)[:-1])[: len(kind)]  # before each row
        here = last >= begins
        found = np.where(here, of_fault[last], self._fetched[vcpu])
        ends = np.flatnonzero(np.append(first[1:], True)) if len(kind) else begins
        self._fetched[vcpu[ends]] = np.where(sets[ends] >= 0, of_fault[ends], found[ends])
        return np.asarray(found, np.bool_)

    def _running(self, tid: Ints, own: NDArray[np.uint8], kind: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which rows are of threads that run a vCPU, from the first root they load or guest they enter on.

        Row by row, not by batch: what a thread did before (as userspace sets a vCPU up) must not depend on the cut.
        """
        runs = np.flatnonzero((own == Doing.LOAD) | (kind == _ENTRY))
        threads, firsts = np.unique(tid[runs], return_index=True)
        begun = np.isin(tid, list(self._threads))
        for thread, first in zip(threads.tolist(), runs[firsts].tolist(), strict=True):
            begun[first:] |= tid[first:] == thread
            self._threads.add(thread)
        return begun

    def _carried(self, own: NDArray[np.uint8], vcpu: NDArray[np.int32], first: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """What each row is about: its own class, or that of its thread's last row that had one."""
        if not len(own):
            return own
        about = own.copy()
        head = np.flatnonzero(first & (own == _NEUTRAL))
        about[head] = self._about[vcpu[head]]
        at = np.where(about != _NEUTRAL, np.arange(len(about)), 0)
        return about[np.maximum.accumulate(at)]
