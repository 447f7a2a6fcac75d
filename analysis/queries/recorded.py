# SPDX-License-Identifier: Apache-2.0
"""Queries over the rows of a recording about its vCPUs and roots: their time, lifetimes, and what gets no further.

The rows are read when a query is made, unless the recording has answered the same question before. Memory grows with
the number of groups, not with rows.
"""

from __future__ import annotations

from typing import Any, Final

import polars as pl

from analysis.queries.registry import query
from analysis.reading.grouped import UsedRoots, Windowed
from analysis.reading.rip_runs import RipQuestion, by_vm
from analysis.reading.sources import Recording
from analysis.reading.unseen import lost_windows
from replay.timing.diagnosis import Diagnosis, diagnosed, diagnoses
from replay.timing.stuck_rip import CERTAIN
from traces import kernels
from traces.errors import Problem
from traces.kernels.kernel import Kernel
from traces.kernels.vendors import SVM

WINDOW_NS: Final = 100_000_000
_COUNTED: Final = {
    "exits": "kvm_exit", "faults": "kvm_page_fault", "fixes": "kvm_page_fault", "smis": "kvm_smm_transition",
    "loads": "mmu_load",
}  # fmt: skip


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
