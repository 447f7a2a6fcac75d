# SPDX-License-Identifier: Apache-2.0
"""Mutations of a recording of shadow paging, for the tests that each is found; and which of them nothing shows."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume
from hypothesis import strategies as st

from replay.validate.row_tuples import RowTuple
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


def run(trace: Trace, vm: int, rows: list[RowTuple]) -> Paged | None:
    """The model after these rows, None if a response is not as predicted or pages are left."""
    check = paged_of(trace, vm, kernels.recorded(trace.metadata))
    check.run(rows)
    check.finish()
    clean = all(not tally.mismatched and not tally.missing for tally in check.tallies.values())
    return check if clean and check.ended and not check.left(False) else None


def shows(trace: Trace, rows: list[RowTuple], at: int, mutation: str) -> bool:
    """Whether the recording itself tells that this row was mutated so."""
    row, before = rows[at], rows[at - 1].kind
    asked = before in ("kvm_mmu_spte_requested", "kvm_mmu_get_page")
    used = "KVM_USED_PAGES" not in trace.metadata.raw["layout"]["missing"]
    counted = "mmu_load" in trace.metadata.kinds
    if row.kind == "kvm_mmu_get_page" and mutation in ("drop", "double") and not row.flags & 1:
        # That a page is looked up again is decided by the guest; a load's lookups are counted, a fault's go downwards.
        return counted and (mutation == "double" or row.level >= 4)
    if row.kind == "kvm_mmu_set_spte" and mutation in ("drop", "gfn", "new"):
        # Which neighbours of a leaf the host has at hand, and their page frames, nothing predicts. 5.10 tells the
        # frame of the guest's virtual address. A leaf that was there before may be met again without a row.
        old = trace.metadata.kernel.startswith("5.10")
        asks = next(one for one in reversed(rows[:at]) if one.kind == "kvm_mmu_spte_requested")
        low = (asks.gfn or 0) & ((1 << 9 * (asks.level - 1)) - 1) if old else 0
        known = {pfn(one.new) | low for one in rows[:at] if one.kind == "kvm_mmu_set_spte"}
        if mutation == "gfn" and not asked:
            return True  # a neighbour is one of a group of 8, and they come in order
        if mutation == "drop":
            return asked and asks.value not in known
        return asked and (mutation == "new" or not old)
    if row.kind == "mmu_free_roots":
        return row.root != 0
    if row.kind == "kvm_mmu_zap_all_fast":
        # Of no page, it shows only in the next one's generation; 7.3 does not tell it.
        return (mutation == "drop" and rows[at + 1].kind == "kvm_mmu_prepare_zap_page") or (used and mutation != "drop")
    return True


def mutated(rows: list[RowTuple], at: int, mutation: str) -> list[RowTuple]:
    """The rows with one of them dropped, doubled, or altered in a column."""
    row = rows[at]
    if mutation in ("drop", "double"):
        return [*rows[:at], *[row] * (2 * (mutation == "double")), *rows[at + 1 :]]
    value = getattr(row, mutation) or 0
    changed = {"table": value ^ OTHER_TABLE, "new": value ^ OTHER_FRAME, "flags": value ^ 1}.get(mutation, value + 1)
    return [*rows[:at], row._replace(**{mutation: changed}), *rows[at + 1 :]]


def draw_mutation(data: st.DataObject, trace: Trace, rows: list[RowTuple], but: str = "") -> tuple[int, str]:
    """A row, of any kind but one, and a mutation of it that shows; each kind is as likely as the others."""
    kinds = [kind for kind in TELLING if kind != but and any(row.kind == kind for row in rows)]
    kind = data.draw(st.sampled_from(kinds))
    places = [at for at, row in enumerate(rows) if row.kind == kind]
    at = places[data.draw(st.integers(0, len(places) - 1))]
    mutation = data.draw(st.sampled_from(["drop", "double", *TELLING[kind]]))
    assume(shows(trace, rows, at, mutation))
    return at, mutation


def unwatched(trace: Trace, kind: str) -> Trace:
    """The trace, its metadata saying that a kind had no probe."""
    probes = (*trace.metadata.probes, {"kind": kind, "point": "", "how": "none", "why": "CONFIG_KPROBES is off"})
    kinds = {name: rows for name, rows in trace.metadata.kinds.items() if name != kind}
    trace.metadata = replace(trace.metadata, probes=probes, kinds=kinds)
    return trace
