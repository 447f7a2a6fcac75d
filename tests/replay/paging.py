"""What harms a recording of shadow paging, for the tests that each harm is found; and what no harm can show."""

from __future__ import annotations

import random
from dataclasses import replace

from replay.validate.row_tuples import Row
from replay.validate.shadow_driver import Paged, paged_of
from traces import kernels
from traces.kernels.spte import pfn
from traces.reader import Trace

# Columns that a response cannot have otherwise.
TELLING = {
    "kvm_mmu_get_page": ("role", "gfn", "level", "flags", "table", "refs"),
    "kvm_mmu_prepare_zap_page": ("role", "gfn", "level", "flags", "table", "refs"),
    "kvm_mmu_set_spte": ("level", "table", "gfn", "new"),
    "kvm_mmu_zap_all_fast": ("value", "flags"),
    "mmu_load": ("role", "ret"),
    "mmu_free_roots": ("root",),
    "root_put": ("role", "refs", "table"),
}
OTHER_TABLE = 1 << 26  # so that an altered table is none of the VM's
OTHER_FRAME = 1 << 30  # likewise of an SPTE's page frame


def run(trace: Trace, vm: int, rows: list[Row]) -> Paged | None:
    """The model after these rows, None if a response is not as foretold or pages are left."""
    lockstep = paged_of(trace, vm, kernels.recorded(trace.metadata))
    lockstep.run(rows)
    lockstep.finish()
    clean = all(not tally.wrong and not tally.missing for tally in lockstep.tallies.values())
    return lockstep if clean and lockstep.ended and not lockstep.left(False) else None


def shows(trace: Trace, rows: list[Row], at: int, harm: str) -> bool:
    """Whether the recording itself tells that this row was harmed so."""
    row, before = rows[at], rows[at - 1].kind
    asked = before in ("kvm_mmu_spte_requested", "kvm_mmu_get_page")
    used = "KVM_USED_PAGES" not in trace.metadata.raw["layout"]["missing"]
    counted = "mmu_load" in trace.metadata.kinds
    if row.kind == "kvm_mmu_get_page" and harm in ("drop", "double") and not row.flags & 1:
        # That a page is looked up again is the guest's doing; a load's lookups are counted, a fault's go downwards.
        return counted and (harm == "double" or row.level >= 4)
    if row.kind == "kvm_mmu_set_spte" and harm in ("drop", "gfn", "new"):
        # Which neighbours of a leaf the host has at hand, and their page frames, nothing foretells. 5.10 tells the
        # frame of the guest's virtual address. A leaf that was there before may be met again without a row.
        old = trace.metadata.kernel.startswith("5.10")
        asks = next(one for one in reversed(rows[:at]) if one.kind == "kvm_mmu_spte_requested")
        low = (asks.gfn or 0) & ((1 << 9 * (asks.level - 1)) - 1) if old else 0
        known = {pfn(one.new) | low for one in rows[:at] if one.kind == "kvm_mmu_set_spte"}
        if harm == "gfn" and not asked:
            return True  # a neighbour is one of a group of 8, and they come in order
        return asked and (harm == "new" or (harm == "gfn" and not old) or (harm == "drop" and asks.value not in known))
    if row.kind == "mmu_free_roots":
        return row.root != 0
    if row.kind == "kvm_mmu_zap_all_fast":
        # Of no page, it shows only in the next one's generation; 7.3 does not tell it.
        return (harm == "drop" and rows[at + 1].kind == "kvm_mmu_prepare_zap_page") or (used and harm != "drop")
    return True


def harmed(rows: list[Row], at: int, harm: str) -> list[Row]:
    """The rows with one of them dropped, doubled, or altered in a column."""
    row = rows[at]
    if harm in ("drop", "double"):
        return [*rows[:at], *[row] * (2 * (harm == "double")), *rows[at + 1 :]]
    value = getattr(row, harm) or 0
    changed = {"table": value ^ OTHER_TABLE, "new": value ^ OTHER_FRAME, "flags": value ^ 1}.get(harm, value + 1)
    return [*rows[:at], row._replace(**{harm: changed}), *rows[at + 1 :]]


def harms(trace: Trace, rows: list[Row], dice: random.Random) -> tuple[int, str] | None:
    """A row and a harm to it that shows, each kind as likely as the others; None if this throw has none."""
    kind = dice.choice([kind for kind in TELLING if any(row.kind == kind for row in rows)])
    at = dice.choice([at for at, row in enumerate(rows) if row.kind == kind])
    harm = dice.choice(["drop", "double", *TELLING[kind]])
    return (at, harm) if shows(trace, rows, at, harm) else None


def unwatched(trace: Trace, kind: str) -> Trace:
    """The trace, its metadata saying that a kind had no probe."""
    probes = (*trace.metadata.probes, {"kind": kind, "point": "", "how": "none", "why": "CONFIG_KPROBES is off"})
    kinds = {name: rows for name, rows in trace.metadata.kinds.items() if name != kind}
    trace.metadata = replace(trace.metadata, probes=probes, kinds=kinds)
    return trace
