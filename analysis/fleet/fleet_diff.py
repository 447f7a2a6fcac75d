# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace fleet diff`: two sets of results, group by group, host by host, and VM by VM where both have the recording.

Groups and hosts are compared by rates, because the two may be of different days. Where a recording is in
both, as after a new version replayed it or with another set of policies, its VMs are matched by their ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import polars as pl
import pyarrow as pa

from analysis.fleet.fleet_tables import ROWS, TITLES
from analysis.fleet.judged import judged
from analysis.fleet.outcome import FleetOutcome, Summing
from analysis.fleet.outliers import rate
from analysis.report_model.report import Report
from analysis.report_model.report_table import Column, ReportTable
from analysis.report_model.units import NONE, Unit, span
from traces.text import count, printable

_TASK: Final = ("trace", "vm")
_OF_TRACE: Final = ("trace", "etag", "host")
_VALUES: Final = (
    "faults_low", "faults_high", "refaults_low", "refaults_high", "stalls_low", "stalls_high", "stalled_low_ns",
    "stalled_high_ns",
)  # fmt: skip
_TEXTS: Final = ("trace", "host", "policy", "own_policy")
_KEPT: Final = (*_TASK, "host", "policy", "own_policy", *_VALUES)


@dataclass(frozen=True)
class FleetSide:
    """One side of a comparison: its sums, and its rows of VMs with the values that are compared."""

    where: str
    found: FleetOutcome
    vms: pl.DataFrame
    recordings: pl.DataFrame  # one row for each recording, with its host


def side(batches: Iterator[pa.RecordBatch], by: Sequence[str], where: str) -> FleetSide:
    """Read a set of results once; memory grows with its VMs. Raises a Problem as `outcome` does."""
    summing, vms, recordings = Summing(by), [], []
    for rows in judged(batches, where):
        summing.add(rows)
        vms.append(rows.filter(pl.col("row") == "vm").select(_KEPT))
        recordings.append(rows.select(_OF_TRACE).unique())
    empty = pl.DataFrame(schema={**dict.fromkeys(_KEPT, pl.Int64), **dict.fromkeys(_TEXTS, pl.Categorical)})
    together, none = pl.concat([empty, *vms]), pl.DataFrame(schema=dict.fromkeys(_OF_TRACE, pl.Categorical))
    return FleetSide(where, summing.outcome(), together, pl.concat([none, *recordings]).unique("trace"))


def compare(old: FleetSide, new: FleetSide) -> Report:
    """Return the report of a comparison of two sets of results."""
    matched = _matched(old, new)
    return Report(
        title=printable(f"{old.where} against {new.where}"),
        verdict=tuple(map(printable, _verdict(old, new, matched))),
        trust=(
            ("rates", "soft-hang time in 1,000 s of vCPU time, as recorded, at the least; faults a vCPU hour"),
            ("matched", "VMs by recording, id and policy"),
            *_replaced(old, new),
        ),
        tables=tuple(_tables(old, new, matched)),
    )


def _replaced(old: FleetSide, new: FleetSide) -> Iterator[tuple[str, str]]:
    both = old.recordings.join(new.recordings, on="trace", suffix="_new").filter(pl.col("etag") != pl.col("etag_new"))
    if len(both):
        yield (
            "replaced",
            f"{count(len(both), 'recording')} of that name in both, not the same object (etag): not the same rows",
        )


def _matched(old: FleetSide, new: FleetSide) -> pl.DataFrame:
    """Return the VMs under policies that both sides have, with the values of both in one row."""
    keys = [*_TASK, "policy"]
    return old.vms.join(new.vms.drop("host"), on=keys, how="inner", suffix="_new")


def _changed(matched: pl.DataFrame) -> pl.DataFrame:
    """Return the matched rows in which a compared value differs, the largest change of soft-hang time first."""
    differs = [pl.col(name).ne_missing(pl.col(f"{name}_new")) for name in ("own_policy", *_VALUES)]
    return (
        matched.filter(pl.any_horizontal(differs))
        .with_columns(
            size=(pl.col("stalled_low_ns_new") - pl.col("stalled_low_ns")).abs().fill_null(0),
            faults=(pl.col("faults_low_new") - pl.col("faults_low")).abs(),
        )
        .with_columns(
            pl.col(name).cast(pl.String) for name in ("trace", "host", "policy", "own_policy", "own_policy_new")
        )
        .sort("size", "faults", "trace", "vm", "policy", descending=[True, True, False, False, False])
    )


def _rates(found: FleetOutcome, *keys: str, frame: pl.DataFrame | None = None) -> pl.DataFrame:
    rows = found.recorded(*keys, frame=frame)
    hung = pl.col("stalled_low_ns") / (pl.col("vcpu_ms") * 1000)
    some = pl.col("vcpu_ms") > 0
    return rows.select(
        *keys, "vms", "hung_low", "hung_high",
        hung_rate=pl.when(some).then(hung), rate=pl.when(some).then(rate("faults_low")),
    )  # fmt: skip


def _beside(old: pl.DataFrame, new: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Return the rates of both sides with their changes, the largest change of soft-hang time first."""
    both = old.join(new, on=list(keys), how="full", coalesce=True, nulls_equal=True, suffix="_new")
    return both.with_columns(
        change=pl.col("hung_rate_new") - pl.col("hung_rate"), times=pl.col("rate_new") / pl.col("rate")
    ).sort(pl.col("change").abs(), *keys, descending=[True, *[False] * len(keys)], nulls_last=True)


def _verdict(old: FleetSide, new: FleetSide, matched: pl.DataFrame) -> Iterator[str]:
    before, after = (_rates(each.found).to_dicts()[0] for each in (old, new))
    if not before["vms"] or not after["vms"]:
        for each, rates in ((old, before), (new, after)):
            if not rates["vms"]:
                yield f"{each.where}: no VM was replayed, {count(each.found.failed, 'task')} failed"
        return
    yield (
        f"soft-hangs as recorded: {_of(before['hung_rate'])} s of 1,000 s of vCPU time, then "
        f"{_of(after['hung_rate'])} s; "
        f"{span(before['hung_low'], before['hung_high'], Unit.COUNT)} of {count(before['vms'], 'VM')} have some, then "
        f"{span(after['hung_low'], after['hung_high'], Unit.COUNT)} of {count(after['vms'], 'VM')}"
    )
    alone = [len(_only(each, other)) for each, other in ((old, new), (new, old))]
    shared = len(old.recordings) - alone[0]
    yield (
        f"{count(shared, 'recording')} in both, {alone[0]:,} only in the first, {alone[1]:,} only in the second; "
        f"failed tasks {old.found.failed:,}, then {new.found.failed:,}"
    )
    if len(matched):
        lost = matched.filter((pl.col("own_policy") == "agrees") & (pl.col("own_policy_new") != "agrees"))
        tasks = lost.select(_TASK).n_unique() if len(lost) else 0
        less = f"; {count(tasks, 'VM')} whose replay agreed with its rows, and does so no more" if tasks else ""
        yield f"of {count(len(matched), 'replay')} in both {len(_changed(matched)):,} came out otherwise{less}"


def _of(share: float | None) -> str:
    return NONE if share is None else f"{share:.3g}"


def _only(mine: FleetSide, other: FleetSide) -> pl.DataFrame:
    return (
        mine.recordings.join(other.recordings, on="trace", how="anti")
        .with_columns(pl.all().cast(pl.String))
        .sort("trace")
    )


def _tables(old: FleetSide, new: FleetSide, matched: pl.DataFrame) -> Iterator[ReportTable]:
    by = old.found.by
    for keys, frames, name, title in (
        (by, (old.found.groups, new.found.groups), "groups", f"By {' and '.join(TITLES[key] for key in by)}"),
        (("host",), (old.found.hosts, new.found.hosts), "hosts", "Hosts"),
    ):
        rates = [_rates(each.found, *keys, frame=frame) for each, frame in zip((old, new), frames, strict=True)]
        both = _beside(rates[0], rates[1], keys)
        named = [Column(key, TITLES[key], Unit.TEXT) for key in keys]
        yield _table(name, title, (*named, *_BESIDE), both, first=10 if name == "groups" else 6)
    if len(matched):
        moved = matched.filter(pl.col("own_policy") != pl.col("own_policy_new"))
        kinds = (
            moved.unique(_TASK).group_by("own_policy", "own_policy_new").agg(pl.len().alias("vms"))
            .with_columns(pl.col("own_policy", "own_policy_new").cast(pl.String))
            .sort("vms", "own_policy", "own_policy_new", descending=[True, False, False])
        )  # fmt: skip
        yield _table(
            "agreement", "VMs whose own policy's replay and rows compare otherwise", _AGREEMENT, kinds, first=4
        )
        yield _table("vms", "VMs that came out otherwise", _CHANGED, _changed(matched), first=6)
    for name, title, frame in (
        ("only_old", "Recordings only in the first", _only(old, new)),
        ("only_new", "Recordings only in the second", _only(new, old)),
    ):
        if len(frame):
            trace = (Column("trace", "recording", Unit.TEXT), Column("host", "host", Unit.TEXT, wide=1))
            yield _table(name, title, trace, frame, first=2)
    failures = old.found.failures.join(new.found.failures, on="reason", how="full", coalesce=True, suffix="_new")
    if len(failures):
        columns = (Column("tasks", "old"), Column("tasks_new", "new"), Column("reason", "reason", Unit.TEXT))
        counted = failures.with_columns(pl.col("tasks", "tasks_new").fill_null(0))
        yield _table("failures", "Tasks that failed", columns, counted.sort("reason"), first=3)


_BESIDE: Final = (
    Column("vms", "VMs"), Column("vms_new", "then"),
    Column("hung_rate", "hung, s of 1,000", Unit.FACTOR), Column("hung_rate_new", "then", Unit.FACTOR),
    Column("change", "change", Unit.FACTOR, signed=True),
    Column("times", "faults, times", Unit.RATIO, wide=1),
)  # fmt: skip
_AGREEMENT: Final = (
    Column("own_policy", "before", Unit.TEXT), Column("own_policy_new", "then", Unit.TEXT), Column("vms", "VMs"),
)  # fmt: skip
_CHANGED: Final = (
    Column("host", "host", Unit.TEXT), Column("trace", "recording", Unit.TEXT, wide=2), Column("vm", "VM", Unit.ID),
    Column("policy", "policy", Unit.TEXT), Column("own_policy", "agreement", Unit.TEXT, wide=1),
    Column("own_policy_new", "then", Unit.TEXT, wide=1),
    Column("stalled_low_ns", "hung for", Unit.LONG, high="stalled_high_ns"),
    Column("stalled_low_ns_new", "then", Unit.LONG, high="stalled_high_ns_new"),
    Column("faults_low", "faults", high="faults_high", wide=1),
    Column("faults_low_new", "then", high="faults_high_new", wide=1),
)  # fmt: skip


def _table(name: str, title: str, columns: tuple[Column, ...], frame: pl.DataFrame, first: int) -> ReportTable:
    return ReportTable(name, title, columns, frame.head(ROWS), first=first, more=len(frame) > ROWS, exported=False)
