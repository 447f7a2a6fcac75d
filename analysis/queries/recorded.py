# SPDX-License-Identifier: Apache-2.0
"""Queries over the rows of a recording: counts over its rows, and what follows from them.

The rows are read when a query is made, unless the recording has answered the same question before. Memory grows with
the number of groups, not with rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import polars as pl

from analysis.grouped import KEY, OTHER, KindsBy, UnservedPages, UsedRoots, Windowed
from analysis.queries.registry import query
from analysis.rip_runs import RipQuestion, by_vm
from analysis.rows import KIND, Question, Tally
from analysis.sources import Recording
from analysis.unseen import lost_windows
from replay.timing.diagnosis import READ_ONLY, Diagnosis, diagnosed, diagnoses
from replay.timing.stuck_rip import CERTAIN
from traces import kernels
from traces.errors import Problem
from traces.kernels.kernel import Kernel
from traces.kernels.vendors import SVM

WINDOW_NS: Final = 100_000_000
REGION_PAGES: Final = 512  # 2 MiB
_SLOT: Final = {"vm": pl.Int32, "slot": pl.Int32, "gfn": pl.Int64, "pages": pl.Int64}
_COUNTED: Final = {
    "exits": "kvm_exit", "faults": "kvm_page_fault", "fixes": "kvm_page_fault", "smis": "kvm_smm_transition",
    "loads": "mmu_load",
}  # fmt: skip


def _is(*kinds: str) -> pl.Expr:
    return pl.any_horizontal(pl.col("kind") == kind for kind in kinds)  # by code: a cast to text takes twice as long


def fixed_of(recording: Recording) -> pl.Expr:
    """Return an expression for the column `fixes`; null under the shadow MMU, which does not show them."""
    return (pl.lit(None, pl.Int64) if recording.metadata.policy == "shadow" else pl.col("fixes")).alias("fixes")


def in_windows(recording: Recording, window_ns: int = WINDOW_NS) -> Windowed:
    """Return the question that counts rows in windows of each vCPU's time."""
    kernel = _kernel(recording)
    fault = (SVM if kernel is None else kernel.vendor).fault
    known = recording.metadata.policy != "shadow"  # under the shadow MMU the code may be about the guest's tables
    return Windowed(
        f"windows of {window_ns} ns", recording.span[0], window_ns, fault.present if known else 0, fault.reserved
    )


@query(Recording, needs=("kvm_entry", "kvm_exit"), asks=lambda recording: [in_windows(recording)])
def windows(recording: Recording, window_ns: int = WINDOW_NS) -> pl.LazyFrame:
    """Each vCPU's time in windows of 100 ms, the most faults first: guest time, exits, faults, SMIs, loads of a root.

    `fixes` are the faults on a leaf that was present and lacked only a permission; they are among `faults`. Windows
    without a row of the vCPU are missing. `guest_ns` is the time from entries to exits, the switch included; null where
    these do not alternate or were lost. A count is null if its kind was not watched, or if it is 0 and events of its
    kind were lost in the window. `time` is the window's begin in boot ns; `since_ns` is counted from the recording's
    first row.
    """
    first, last = recording.span
    begin = first + pl.col("window") * window_ns
    length = pl.min_horizontal(pl.lit(window_ns, pl.Int64), last - begin + 1)
    # Guest time is the sum of exits' times less that of entries; who is in the guest last stays to the window's end.
    stays = pl.col("entered") > pl.col("left").fill_null(-1)
    guest = pl.col("crossed") + pl.when(stays).then(pl.col("length_ns")).otherwise(0)
    alternate = (pl.col("entries") - pl.col("exits")).abs() <= 1
    (counted,) = recording.ask(in_windows(recording, window_ns))
    return (
        counted.lazy()
        .with_columns(fixed_of(recording))
        .with_columns(
            _nulled(
                recording, faults="kvm_page_fault", fixes="kvm_page_fault", smis="kvm_smm_transition", loads="mmu_load"
            )
        )
        .with_columns(
            pl.when((pl.col(name) > 0) | ~_lost(recording, window_ns, kind)).then(name)
            for name, kind in _COUNTED.items()
        )
        .with_columns(pl.when(~_lost(recording, window_ns, "kvm_entry", "kvm_exit")).then("crossed"))
        .with_columns(time=begin, since_ns=begin - first, length_ns=length)
        .with_columns(guest_ns=pl.when(alternate & guest.is_between(0, pl.col("length_ns"))).then(guest))
        .with_columns(guest_share=pl.col("guest_ns") / pl.col("length_ns"))
        .select(
            "vm", "vcpu", "time", "since_ns", "length_ns", "guest_ns", "guest_share", "exits", "faults", "fixes",
            "smis", "loads",
        )
        .sort("faults", "guest_share", "time", "vm", "vcpu", descending=[True, *[False] * 4], nulls_last=True)
    )  # fmt: skip


def _lost(recording: Recording, window_ns: int, *kinds: str) -> pl.Expr:
    """Return an expression for whether events of these kinds were lost in a window."""
    return pl.any_horizontal(
        pl.col("window").is_in(lost_windows(recording, kind, window_ns).tolist()) for kind in kinds
    )


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


@query(Recording, asks=lambda _: [UsedRoots()])
def lives(recording: Recording) -> pl.LazyFrame:
    """Every root that the recording shows: its role word, from when to when it is seen, loads and faults under it."""
    (counted,) = recording.ask(UsedRoots())
    return (
        counted.lazy()
        .select("vm", "root", "role", "first_time", "last_time", "loads", "faults")
        .with_columns(life_ns=pl.col("last_time") - pl.col("first_time"))
        .sort("vm", "root")
    )


@query(Recording, asks=lambda _: [UsedRoots()])
def roles(recording: Recording) -> pl.LazyFrame:
    """Lifetimes of roots by role word: how many roots, how long they are seen (median and longest), loads, faults."""
    return (
        lives(recording)
        .group_by("vm", "role")
        .agg(
            roots=pl.len().cast(pl.Int64),
            median_life_ns=pl.col("life_ns").median().cast(pl.Int64),
            longest_life_ns=pl.col("life_ns").max(),
            loads=pl.col("loads").sum(),
            faults=pl.col("faults").sum(),
        )
        .sort("roots", "vm", "role", descending=[True, False, False])
    )


def _runs_asked(recording: Recording) -> list[RipQuestion]:
    """Return the question for runs of exits, unless a replay has already found them."""
    return [] if recording.replayed else [RipQuestion(recording.trace, _kernel(recording))]


def _kernel(recording: Recording) -> Kernel | None:
    """Return the description of the recorded kernel; None where it is not known, or has no TDP MMU."""
    try:
        return kernels.recorded(recording.metadata)
    except Problem:
        return None


def stuck_vcpus(recording: Recording, exits: int = CERTAIN) -> list[Diagnosis]:
    """Return why vCPUs made no progress, those that were stuck longest first.

    For a window that begins later than its recording, vCPUs that were stuck before and still are in it are included.
    """
    key = (recording.replayed, exits)
    if key not in recording.diagnosed:
        recording.diagnosed[key] = _diagnosed(recording, exits)
    return recording.diagnosed[key]


def _diagnosed(recording: Recording, exits: int) -> list[Diagnosis]:
    kernel = _kernel(recording)
    vms = {int(vm["id"]): vm for vm in recording.metadata.vms}
    found: list[Diagnosis] = []
    if recording.replayed:
        for time in recording.times:
            if time.rip_runs is not None:
                found += diagnoses(recording.trace, vms[time.vm], kernel, time.rip_runs, time.ids, exits)
    else:
        question = RipQuestion(recording.trace, kernel)
        since = recording.window.since
        whole = recording.whole.ask(question) if since is not None else []
        for answer in (*whole, *recording.ask(question)):
            told = {(each.vm, each.vcpu) for each in found}
            shown = by_vm(answer)
            mine = [
                each
                for number, vm in vms.items()
                for each in diagnosed(recording.trace, vm, kernel, *shown.get(number, ([], [])), exits)
            ]
            found += [each for each in mine if each.until >= (since or each.until) and (each.vm, each.vcpu) not in told]
    return sorted(found, key=lambda each: (each.since - each.until, each.vm, each.vcpu))


@query(Recording, needs=("kvm_exit",), asks=_runs_asked)
def stuck(recording: Recording, exits: int = CERTAIN) -> pl.LazyFrame:
    """vCPUs that made no progress: 200 exits and more at one RIP without progress, or an end in an error, and why."""
    found = [{name: getattr(each, name) for name in _STUCK} for each in stuck_vcpus(recording, exits)]
    return pl.LazyFrame(found, schema=_STUCK)


@query(Recording, needs=("kvm_exit",), asks=_runs_asked)
def stuck_rows(recording: Recording, exits: int = CERTAIN) -> pl.LazyFrame:
    """The rows that show why vCPUs made no progress: of each one round of what it did, and its page's SPTEs."""
    found = [
        {"vm": each.vm, "vcpu": each.vcpu, "row": row} for each in stuck_vcpus(recording, exits) for row in each.rows
    ]
    return pl.LazyFrame(found, schema={"vm": pl.UInt64, "vcpu": pl.Int16, "row": pl.String})


_STUCK: Final[dict[str, Any]] = {
    "vm": pl.UInt64, "vcpu": pl.Int16, "kind": pl.String, "rip": pl.UInt64, "since": pl.Int64, "until": pl.Int64,
    "seq": pl.Int64, "exits": pl.Int64, "why": pl.String,
}  # fmt: skip


@query(Recording)
def kinds(recording: Recording) -> pl.LazyFrame:
    """Events by kind: stored, lost, and whether the kind was watched at all."""
    meta = recording.metadata
    names = sorted({*meta.kinds, *recording.kinds, *(str(probe.get("kind")) for probe in meta.probes)})
    rows = [
        {
            "kind": name,
            "events": meta.kinds.get(name, 0),
            "lost": meta.lost_of(name) if name in meta.loss else 0,
            "watched": name in recording.kinds,
        }
        for name in names
    ]
    schema = {"kind": pl.String, "events": pl.Int64, "lost": pl.Int64, "watched": pl.Boolean}
    return pl.LazyFrame(rows, schema=schema).sort("events", "kind", descending=[True, False])


def _nulled(recording: Recording, **kinds: str) -> list[pl.Expr]:
    """Return expressions that make counts null whose kinds were not watched."""
    return [pl.lit(None, pl.Int64).alias(name) for name, kind in kinds.items() if kind not in recording.kinds]


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
