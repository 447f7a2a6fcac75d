# SPDX-License-Identifier: Apache-2.0
"""Queries over the rows of a recording about the guest's memory: which pages were mapped how often, and in which slot.

The rows are read when a query is made, unless the recording has answered the same question before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import polars as pl

from analysis.queries.registry import query
from analysis.reading.grouped import KEY, OTHER, KindsBy, UnservedPages
from analysis.reading.rows import KIND, Question, Tally
from analysis.reading.sources import Recording
from replay.timing.diagnosis import READ_ONLY
from traces import kernels
from traces.errors import Problem

REGION_PAGES: Final = 512  # 2 MiB
_SLOT: Final = {"vm": pl.Int32, "slot": pl.Int32, "gfn": pl.Int64, "pages": pl.Int64}


def _is(*kinds: str) -> pl.Expr:
    return pl.any_horizontal(pl.col("kind") == kind for kind in kinds)  # by code: a cast to text takes twice as long


def installs() -> KindsBy:
    """Return the question that counts installed leaves by page and level."""
    keys = {"gfn": KEY, "level": OTHER.cast(pl.Int8)}
    return KindsBy("installs", ("kvm_mmu_set_spte",), (KIND, "time", "gfn", "level"), keys)


def _of_installs(recording: Recording) -> Iterator[Question]:
    yield installs()
    yield from _of_slots(recording)


@query(Recording, needs=("kvm_mmu_set_spte",), asks=_of_installs)
def gfns(recording: Recording, top: int | None = None) -> pl.LazyFrame:
    """How often each page was mapped, and in which memory slot it is, the most often first; `top` of them.

    `slot` is null for a page in no known slot. `level` is that of the SPTE: 1 for 4 KiB, 2 for 2 MiB.
    """
    found = _installs(recording).sort("installs", "vm", "gfn", "level", descending=[True, False, False, False])
    return _with_slots(found if top is None else found.head(top), recording).sort(
        "installs", "vm", "gfn", "level", descending=[True, False, False, False]
    )


@query(Recording, needs=("kvm_mmu_set_spte",), asks=_of_installs)
def regions(recording: Recording) -> pl.LazyFrame:
    """How often pages were mapped, by region of 2 MiB: pages mapped, installs, installs a page; the hottest first."""
    found = (
        _installs(recording)
        .group_by("vm", (pl.col("gfn") // REGION_PAGES * REGION_PAGES).alias("region"))
        .agg(
            gfn=pl.col("gfn").min(),
            pages=pl.len().cast(pl.Int64),
            installs=pl.col("installs").sum(),
            first_time=pl.col("first_time").min(),
            last_time=pl.col("last_time").max(),
        )
        .with_columns(per_page=pl.col("installs") / pl.col("pages"))
    )
    return (
        _with_slots(found, recording)
        .select("vm", "slot", "region", "pages", "installs", "per_page", "first_time", "last_time")
        .sort("installs", "vm", "region", descending=[True, False, False])
    )


@query(Recording, needs=("kvm_mmu_set_spte",), asks=_of_installs)
def slots(recording: Recording) -> pl.LazyFrame:
    """How often pages were mapped, by memory slot: the pages that it has, those that were mapped, and installs."""
    return (
        _with_slots(_installs(recording), recording)
        .group_by("vm", "slot", "slot_gfn", "slot_pages")
        .agg(mapped=pl.len().cast(pl.Int64), installs=pl.col("installs").sum())
        .select(
            "vm", "slot", pl.col("slot_gfn").alias("gfn"), pl.col("slot_pages").alias("pages"), "mapped", "installs",
            per_page=pl.col("installs") / pl.col("mapped"),
        )
        .sort("installs", "vm", "gfn", descending=[True, False, False])
    )  # fmt: skip


@query(Recording, needs=("kvm_mmu_set_spte", "kvm_mmu_prepare_zap_page"))
def rmaps(recording: Recording) -> pl.LazyFrame:
    """The shadow MMU's reverse maps: the most SPTEs that map a page at one time, the longest chains first.

    A page's reverse map is one word: empty, its only SPTE, or a chain of `descs` pte_list_desc (null where the kernel
    version's capacity of one is not known). SPTEs go with their shadow page. Removals by notifiers or by the guest's
    own writes have no event, and SMM's address space, which has reverse maps of its own, is counted with the other; so
    `sptes` is an upper bound. KVM's statistic max_mmu_rmap_size is one less than the largest, because it is taken
    before the last SPTE is added.
    """
    if recording.metadata.policy != "shadow":
        raise Problem(f"{recording.path}: query rmaps: the TDP MMU has no reverse maps")
    each = kernels.recorded(recording.metadata).pte_list_ext
    table, spte = ["vm", "table"], ["vm", "table", "level", "gfn"]
    gone = recording.scan().filter(_is("kvm_mmu_prepare_zap_page")).select(*table, "seq", end="seq").sort("seq")
    sets = recording.scan().filter(_is("kvm_mmu_set_spte"), pl.col("new") != 0).select(*spte, "seq").sort("seq")
    lives = (
        sets.join_asof(gone, on="seq", by=table, strategy="forward", check_sortedness=False)
        .group_by(*spte, "end")
        .agg(begin=pl.col("seq").min())
    )
    page = ["vm", "level", "gfn"]
    comes = lives.select(*page, at="begin", change=pl.lit(1, pl.Int64))
    goes = lives.filter(pl.col("end").is_not_null()).select(*page, at="end", change=pl.lit(-1, pl.Int64))
    most = (
        pl.concat([comes, goes])
        .with_columns(there=pl.col("change").cum_sum().over(page, order_by=["at", "change"]))
        .group_by(page)
        .agg(sptes=pl.col("there").max())
    )
    chained = (pl.col("sptes") + (each - 1)) // max(each, 1)
    descs = pl.when(pl.col("sptes") > 1).then(chained).otherwise(0) if each else pl.lit(None, pl.Int64)
    return (
        _with_slots(most, recording)
        .select("vm", "slot", "gfn", "level", "sptes", descs=descs.cast(pl.Int64))
        .sort("sptes", "vm", "gfn", "level", descending=[True, False, False, False])
    )


def _of_unserved(recording: Recording) -> Iterator[Question]:
    if recording.metadata.policy != "shadow":
        yield UnservedPages()
        yield from _of_slots(recording)


@query(Recording, needs=("kvm_page_fault", "kvm_mmu_spte_requested"), asks=_of_unserved)
def unserved(recording: Recording) -> pl.LazyFrame:
    """Pages on which a vCPU faulted again and again though nothing was mapped for it: spurious, stale, or emulated.

    `unserved` is faults less those for which a mapping was requested or a permission fixed. `why`: a page in no memory
    slot is emulated MMIO, one of a read-only slot takes no writes. Nested paging only: under the shadow MMU a fault's
    address is the guest's own.
    """
    if recording.metadata.policy == "shadow":
        raise Problem(f"{recording.path}: query unserved: addresses of faults are the guest's own under the shadow MMU")
    (counted,) = recording.ask(UnservedPages())
    found = counted.lazy().with_columns(unserved=pl.col("faults") - pl.col("served"))
    return (
        _with_slots(found, recording)
        .join(_read_only(recording), on=["vm", "slot"], how="left")
        .with_columns(
            why=pl.when(pl.col("slot").is_null())
            .then(pl.lit("in no slot: emulated"))
            .when(pl.col("read_only"))
            .then(pl.lit("writes to a read-only slot"))
            .otherwise(pl.lit(""))
        )
        .select("vm", "vcpu", "gfn", "slot", "faults", "served", "unserved", "why", "first_time", "last_time")
        .sort("unserved", "vm", "vcpu", "gfn", descending=[True, False, False, False])
    )


def _read_only(recording: Recording) -> pl.LazyFrame:
    """Return the read-only slots; writes to them are emulated."""
    found = {
        (int(vm["id"]), slot["slot"], True)
        for vm in recording.metadata.vms
        for slot in vm["slots"]
        if slot.get("flags", 0) & READ_ONLY and max(slot["slot"], vm["id"]) < 1 << 31
    }
    schema = {"vm": pl.Int32, "slot": pl.Int32, "read_only": pl.Boolean}
    return pl.LazyFrame(sorted(found), schema=schema, orient="row")


def _installs(recording: Recording) -> pl.LazyFrame:
    (counted,) = recording.ask(installs())
    return counted.lazy().select(
        "vm", "gfn", "level", installs="rows", first_time="first_time", last_time="last_time"
    )  # fmt: skip


def placed() -> Tally:
    """Return the question for the places that memory slots were given while recording; `value` is their pages."""
    return Tally(
        "slots",
        where=_is("memslot") & pl.col("value").is_between(1, 1 << 52),
        by={name: pl.col(name) for name in ("slot", "gfn", "value")},
    )


def _of_slots(recording: Recording) -> Iterator[Question]:
    if any(vm.get("slots_omitted") for vm in recording.metadata.vms):
        yield placed()


def known_slots(recording: Recording) -> pl.DataFrame:
    """Return every place that a memory slot had, in the snapshot or later: `vm`, `slot`, `gfn`, `pages`, by `gfn`."""
    meta = recording.metadata
    rows = [
        {"vm": int(vm["id"]), **{name: slot[name] for name in ("slot", "gfn", "pages")}}
        for vm in meta.vms
        for slot in vm["slots"]
        if slot["pages"] and max(slot["slot"], vm["id"]) < 1 << 31 and max(slot["gfn"], slot["pages"]) < 1 << 52
    ]
    found = pl.DataFrame(rows, schema=_SLOT)
    later = recording.ask(*_of_slots(recording))
    found = pl.concat(
        [found, *(each.select("vm", "slot", "gfn", pages=pl.col("value").cast(pl.Int64)) for each in later)]
    )
    return found.unique().sort("gfn", "pages", "vm", "slot")


def _with_slots(rows: pl.LazyFrame, recording: Recording) -> pl.LazyFrame:
    """Add to rows with a `gfn` the slot in which it lies: the one that begins last at or before it."""
    places = known_slots(recording).lazy().select(
        "vm", "gfn", "slot", slot_gfn="gfn", slot_pages="pages"
    )  # fmt: skip
    inside = pl.col("gfn") < pl.col("slot_gfn") + pl.col("slot_pages")
    return (
        rows.sort("gfn")
        .join_asof(places, on="gfn", by="vm", strategy="backward", check_sortedness=False)
        .with_columns(pl.when(inside).then(pl.col(name)).alias(name) for name in ("slot", "slot_gfn", "slot_pages"))
    )
