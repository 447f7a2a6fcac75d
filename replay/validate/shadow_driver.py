# SPDX-License-Identifier: Apache-2.0
"""The conformance check of shadow paging: compare a recording with the model of its shadow pages, thread by thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from replay.simulate.model_state import CURRENT
from replay.validate.expect import Activity
from replay.validate.row_tuples import RowTuple
from replay.validate.steps.shadow_model import Pages
from replay.validate.steps.shadow_state import PAE, Leaf, ShadowPage
from replay.validate.threads import Thread, VmCheck
from traces.kernels import Kernel
from traces.kernels.vendors import OFF, VENDORS
from traces.metadata import Metadata
from traces.reader import Trace
from traces.untrusted import object_at

_SET_NR_MMU_PAGES: Final = 0xAE44
# Kinds of row that show a vCPU still running: zaps after the last of them are those of the VM's end.
_RUNNING: Final = (
    "kvm_mmu_get_page", "kvm_mmu_zap_all_fast", "kvm_page_fault", "kvm_entry", "kvm_exit", "kvm_userspace_exit",
    "kvm_mmu_pagetable_walk", "kvm_emulate_insn", "mmu_load", "new_pgd",
)  # fmt: skip
# Kinds of row that the host may cause in the middle of whatever the thread does.
_ASIDE: Final = ("kvm_unmap_hva_range", "kvm_set_spte_hva", "kvm_age_hva", "kvm_test_age_hva")
_NEXT_EVENT: Final = ("kvm_page_fault", "kvm_entry", "kvm_exit", "kvm_userspace_exit", "mmu_free_roots", "mmu_load")
COMPARED: Final = (
    "kvm_mmu_get_page",
    "kvm_mmu_prepare_zap_page",
    "kvm_mmu_sync_page",
    "kvm_mmu_unsync_page",
    "kvm_mmu_set_spte",
    "mmu_load",
    "mmu_free_roots",
    "root_put",
)
_NONE: Final = -1  # stands for the vCPU of a thread that has none yet, or is just creating it
# Without rows of these kinds it is not known who holds a root.
_COUNTING: Final = ("mmu_load", "mmu_free_roots", "root_put", "new_pgd")


def is_paged(meta: Metadata) -> bool:
    """Return whether roots follow the guest's page tables: nested paging is off, or the host has none."""
    modules = meta.raw.get("modules")
    if meta.policy != "shadow" or not isinstance(modules, dict):
        return False
    loaded = [vendor for vendor in VENDORS if isinstance(modules.get(vendor.module), dict)]
    off = any(modules[vendor.module].get(vendor.paging) in OFF for vendor in loaded)
    return off or (not loaded and "kvm" in modules)


def pages_of(meta: Metadata, kernel: Kernel, vm: int) -> Pages:
    """Return the model of a VM without any page yet, on the recorded kernel."""
    layout = kernel.layout
    own = ("level", "has_4_byte_gpte", "gpte_is_8_bytes", "quadrant", "direct", "access", "passthrough")
    vcpus = {int(vcpu["id"]) for found in meta.vms if found["id"] == vm for vcpu in found.get("vcpus", ())}
    return Pages(
        vcpus=max(len(vcpus), 1),
        invalid_bit=layout.invalid,
        direct_bit=layout.mask("direct"),
        guest_bits=~sum(layout.mask(name) for name in own) & 0xFFFF_FFFF,
        counted=not _unseen(meta) & set(_COUNTING),
        old=kernel.old_shadow_mmu,
    )


def paged_of(trace: Trace, vm: int, kernel: Kernel) -> Paged:
    """Return the check of a VM of a recording, to be run through the VM's rows."""
    meta = trace.metadata
    return Paged(
        pages_of(meta, kernel, vm),
        last_run(trace, vm),
        shows_use=_shows_use(meta),
        shows_end="vm_destroy" not in _unseen(meta),
    )


def blind(meta: Metadata) -> list[str]:
    """Return the kinds of event that are not recorded and so not compared, and the counts that are not compared."""
    kinds = sorted(_unseen(meta) & {*COMPARED, *_COUNTING, "vm_destroy"})
    if not _shows_use(meta) and "kvm_mmu_zap_all_fast" in meta.kinds:
        kinds.append("pages in use at kvm_mmu_zap_all_fast")
    return kinds


def _shows_use(meta: Metadata) -> bool:
    """Return whether kvm_mmu_zap_all_fast shows the pages in use.

    Recordings of 7.3 made until 2026-11-24 have 0 there: the member that the raw probe read is gone.
    """
    if any(probe.get("kind") == "kvm_mmu_zap_all_fast" and probe.get("how") == "tp" for probe in meta.probes):
        return True
    missing = object_at(meta.raw, "layout").get("missing")
    return not (isinstance(missing, list) and "KVM_USED_PAGES" in missing)


def _unseen(meta: Metadata) -> set[str]:
    return {str(probe.get("kind")) for probe in meta.probes if probe.get("how") == "none"} - set(meta.kinds)


def last_run(trace: Trace, vm: int) -> int:
    """Return the last row that shows a vCPU of the VM at work, or -1 if there is none."""
    last = -1
    for batch in trace.batches(("seq", "kind"), vm=vm):
        kinds = batch["kind"].to_pylist()
        for at in range(len(kinds) - 1, -1, -1):
            if kinds[at] in _RUNNING:
                last = batch["seq"][at].as_py()
                break
    return last


@dataclass
class _Work:
    """What a thread is doing: the pages that it has looked up since it last began something, and its fault."""

    looked: list[ShadowPage] = field(default_factory=list)
    fault: bool = False
    level: int = 0  # level of the fault's last lookup
    asked: RowTuple | None = None  # kvm_mmu_spte_requested, until its leaf is installed
    ioctl: int = 0
    leaf: Leaf | None = None  # the requested leaf, once it is installed


class Paged(VmCheck):
    """The check of one VM whose roots follow the guest's page tables.

    After the row `last` only the VM's end follows.
    """

    responses = COMPARED

    def __init__(self, pages: Pages, last: int, *, shows_use: bool = True, shows_end: bool = True) -> None:
        super().__init__()
        self.pages = pages
        self._last = last
        self._shows_use = shows_use  # whether kvm_mmu_zap_all_fast shows the pages in use and the generation
        self._shows_end = shows_end  # whether vm_destroy is recorded
        self._work: dict[int, _Work] = {}

    @property
    def ended(self) -> bool:
        """Whether the VM was destroyed or, if that is not recorded, all its pages were zapped.

        On Intel the last of them are zapped with KVM's own memslots, before kvm_mmu_zap_all.
        """
        return self.pages.destroyed or (not self._shows_end and (self.pages.emptied or not self.left(False)))

    def left(self, shows_frees: bool) -> int:
        """Return the number of pages that were not zapped plus the number of roots that were not put."""
        slots = [slot for slots in self.pages.slots.values() for slot in slots if slot is not None]
        return self.pages.used + len(slots)

    @property
    def taken(self) -> dict[str, int]:
        """How many facts of each sort were taken from the recording and not predicted."""
        counts = {
            "lookups (gfn, role word and level: the guest's page tables decide them)": self.pages.lookups,
            "zaps that the guest's writes to its page tables brought about": self.pages.zaps,
            "moments when a page went out of sync or back: the guest writes and flushes": self.pages.turns,
            "moments of an invalid root's last put (its one zap is predicted; puts are not recorded)": self.pages.puts,
            "counts of references of pages that may be a root (loads and puts are not recorded)": self.pages.counts,
            "other leaves than the one asked for: page frames, and in indirect pages which": self.pages.neighbours,
        }
        return {what: count for what, count in counts.items() if count}

    def _respond(self, thread: Thread, row: RowTuple, stopped: str = "") -> None:
        while (expected := self._expected(thread)) is not None and expected.optional and expected.misfit(row):
            self._send(thread, None)
        super()._respond(thread, row, stopped)
        work = self._of(row)
        if row.kind == "kvm_mmu_get_page" and (page := self.pages.active.get(row.table)) is not None:
            work.looked.append(page)
            work.level = row.level
        elif row.kind == "kvm_mmu_set_spte" and row.gfn is not None:
            if work.asked is not None:
                work.asked, work.leaf = None, Leaf(row.table, row.gfn)
            elif work.leaf is not None:
                work.leaf.last = row.gfn
        elif row.kind in _NEXT_EVENT:
            work.looked.clear()

    def _begun_by(self, thread: Thread, row: RowTuple) -> Activity | None:
        pages = self.pages
        work = self._of(row)
        if row.kind in ("kvm_mmu_get_page", "kvm_mmu_set_spte") and row.gfn is None:
            return None
        if row.kind == "kvm_mmu_get_page":
            return self._lookup(thread, row, work) if row.role & 15 else None
        if row.kind == "mmu_load":
            return self._load(thread, work)
        if row.kind == "mmu_free_roots":
            return pages.free(_NONE if thread.vcpu is None else thread.vcpu)
        if row.kind == "kvm_mmu_prepare_zap_page":
            return self._zap(row, work)
        page = pages.active.get(row.table)
        if row.kind == "kvm_mmu_set_spte":
            page = page or pages.invalid_roots.get(row.table)
            return None if page is None else pages.install(page, work.asked, work.leaf)
        if page is None or page.level != 1 or page.role & pages.direct_bit:
            return None
        if row.kind == "kvm_mmu_unsync_page":
            return pages.out_of_sync(page)
        if row.kind == "kvm_mmu_sync_page" and page.unsync:
            return pages.in_sync(page)
        return None

    def _lookup(self, thread: Thread, row: RowTuple, work: _Work) -> Activity:
        pages = self.pages
        slot = pages.slots_of(thread.vcpu)[CURRENT] if pages.counted and thread.vcpu is not None else None
        # A fault's lookups are below its root; a load may follow without an entry into the guest.
        inside = work.fault and (slot is not None or not pages.counted)
        beside = slot.role if inside and slot is not None else 0
        first = not work.looked
        below = (work.level or (slot.role & 15 if slot is not None else 0)) if inside and not first else 0
        return pages.lookup(row, not inside, below if inside else int(not first) * 16, beside)

    def _load(self, thread: Thread, work: _Work) -> Activity | None:
        if thread.vcpu is None or not work.looked or self.pages.slots_of(thread.vcpu)[CURRENT] is not None:
            return None
        level = work.looked[-1].level
        count = next((i for i, page in enumerate(reversed(work.looked)) if page.level != level), len(work.looked))
        if level in (1, PAE):
            return None
        return self.pages.load(thread.vcpu, work.looked[-count:])

    def _zap(self, row: RowTuple, work: _Work) -> Activity | None:
        pages = self.pages
        if (invalid_root := pages.invalid_roots.get(row.table)) is not None:
            return None if pages.counted else pages.last_put(invalid_root)
        if row.seq > self._last and not work.fault:
            return pages.zap_all()
        if pages.short:
            return pages.recycle()
        page = pages.active.get(row.table)
        # Zaps of the host's ioctls are predicted, except those of a new page limit (KVM_SET_NR_MMU_PAGES).
        return None if page is None or work.ioctl not in (0, _SET_NR_MMU_PAGES) else pages.given_up(page)

    def _happen(self, thread: Thread, row: RowTuple) -> None:
        if row.kind in _ASIDE:
            return
        self._settle(thread, row)
        pages, work = self.pages, self._of(row)
        if row.kind in _NEXT_EVENT:
            self._unasked(row, work)
            work.looked.clear()
            work.leaf = None
            work.fault, work.level = row.kind == "kvm_page_fault", 0
        elif row.kind == "kvm_mmu_spte_requested":
            work.asked = row if row.level > 0 and row.gfn is not None else None
        elif row.kind == "mark_mmio_spte":
            work.asked = None
        elif row.kind == "new_pgd" and row.vcpu is not None and pages.counted:
            self._begin(thread, pages.switch(row.vcpu, row.value, row.role))
        elif row.kind == "mmu_free_obsolete_roots" and row.vcpu is not None:
            self._begin(thread, pages.free_obsolete(row.vcpu))
        elif row.kind == "kvm_mmu_zap_all_fast":
            if self._shows_use:
                used = row.value == pages.used and row.flags == pages.generation
                self._check(row, used, f"{pages.used} pages of generation {pages.generation} are in use in the model")
            self._begin(thread, pages.invalidate())
        elif row.kind == "zap_all":
            self._begin(thread, pages.zap_all())
        elif row.kind == "memslot":
            pages.memslots[row.as_id, row.slot] = row.value
        elif row.kind in ("ioctl", "ioctl_end"):
            work.ioctl = row.code if row.kind == "ioctl" else 0
            if work.ioctl == _SET_NR_MMU_PAGES:
                pages.limit = row.value
        elif row.kind == "vm_destroy":
            pages.destroyed = True

    def _unasked(self, row: RowTuple, work: _Work) -> None:
        """Count a requested leaf as missing, unless it was there before."""
        asked, work.asked = work.asked, None
        if asked is not None and not self.pages.has_leaf(asked):
            self._tally("kvm_mmu_set_spte").missing += 1
            self._remember(row, f"a leaf of {asked.gfn:#x} expected, {row.kind} recorded")

    def _of(self, row: RowTuple) -> _Work:
        return self._work.setdefault(row.tid, _Work())
