# SPDX-License-Identifier: Apache-2.0
"""All that a report on a fleet is made of, in one pass over the rows of its results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import polars as pl
import pyarrow as pa

from analysis.fleet.judged import AGREES, judged
from analysis.fleet.sums import GroupSums, added, ended, folded

TOP: Final = 20  # VMs and hosts that gain most, for each policy
_VERDICT: Final = ("own_policy", "policy", "own")
_OF_VM: Final = ("host", "kernel", "trace", "vm", "vm_name", "recorded_policy", "policy")
_GAIN: Final = ("saved_low_ns", "saved_high_ns", "spared_low", "spared_high")
_MERGED: Final = 1 << 20  # traces that wait to be merged


@dataclass(frozen=True)
class FleetOutcome:
    """Sums by group, recorded policy's agreement, policy, and whether it is the recorded one; see `sums`.

    `gainers`: for each policy the VMs whose replay agrees and that save most. `failures`: failed tasks by reason, with
    the first of the traces. `recordings`, `lossy`, `lost`: how many recordings there are, how many of them lost events,
    and how many events.
    """

    by: tuple[str, ...]
    groups: pl.DataFrame
    hosts: pl.DataFrame
    days: pl.DataFrame
    gainers: pl.DataFrame
    failures: pl.DataFrame
    recordings: int
    lossy: int
    lost: int

    @property
    def failed(self) -> int:
        """Tasks that failed."""
        return int(self.failures["tasks"].sum())

    @property
    def policies(self) -> list[str]:
        """The policies that are not the recorded one of some VM."""
        return sorted(self.groups.filter(~pl.col("own"))["policy"].unique())

    def recorded(self, *keys: str, frame: pl.DataFrame | None = None) -> pl.DataFrame:
        """All VMs as recorded, by these columns of `groups` or of another frame of sums."""
        rows = (self.groups if frame is None else frame).filter("own")
        return ended(folded(rows, *keys))

    def under(
        self, policy: str, *keys: str, frame: pl.DataFrame | None = None, agreement: str = AGREES
    ) -> pl.DataFrame:
        """The VMs of this agreement under a policy, by these columns."""
        rows = (self.groups if frame is None else frame).filter(policy=policy, own_policy=agreement)
        return ended(folded(rows, *keys))


class Summing:
    """Adds judged rows up, batch by batch."""

    def __init__(self, by: Sequence[str]) -> None:
        self._by = tuple(by)
        self._groups = GroupSums(*dict.fromkeys([*by, *_VERDICT]))
        self._hosts, self._days = GroupSums("host", "kernel", "vendor", *_VERDICT), GroupSums("day", *_VERDICT)
        self._cells = tuple(dict.fromkeys([*by, "host", "kernel", "vendor", "day", *_VERDICT]))
        self._gainers, self._failures, self._traces = _Gainers(), _Failures(), _Losses()

    def add(self, rows: pl.DataFrame) -> None:
        """Rows of `judged`."""
        self._failures.add(rows.filter(pl.col("row") == "failed"))
        vms = rows.filter(pl.col("row") == "vm")
        self._traces.add(rows)
        self._gainers.add(vms)
        sums = added(vms, self._cells)
        for each in (self._groups, self._hosts, self._days):
            each.add(sums)

    def outcome(self) -> FleetOutcome:
        """Their sums."""
        lost = self._traces.frame()["lost"]
        return FleetOutcome(
            self._by, self._groups.frame(), self._hosts.frame(), self._days.frame(), self._gainers.frame(),
            self._failures.frame(), len(lost), int((lost > 0).sum()), int(lost.sum()),
        )  # fmt: skip


def outcome(batches: Iterator[pa.RecordBatch], by: Sequence[str], where: str) -> FleetOutcome:
    """Add up all rows, which are read once. Raises a Problem that names `where` for rows that no replay makes."""
    summing = Summing(by)
    for rows in judged(batches, where):
        summing.add(rows)
    return summing.outcome()


class _Gainers:
    """For each policy the VMs that save most for certain; of equal ones those that come first by name."""

    def __init__(self) -> None:
        self._best = pl.DataFrame(
            schema={**dict.fromkeys(_OF_VM, pl.String), "vm": pl.Int64, **dict.fromkeys(_GAIN, pl.Int64)}
        )

    def add(self, vms: pl.DataFrame) -> None:
        found = vms.filter((pl.col("own_policy") == AGREES) & (pl.col("saved_low_ns") > 0))
        # No sort of all of them: those that are not among the first of this batch cannot be among the first of all.
        least = (
            found.select(
                pl.col("saved_low_ns")
                >= pl.col("saved_low_ns").top_k(TOP).min().over("policy", mapping_strategy="group_to_rows")
            ).to_series()
            if len(found) > TOP
            else None
        )
        found = (found if least is None else found.filter(least)).select(*_OF_VM, *_GAIN)
        texts = [name for name in _OF_VM if name != "vm"]
        together = pl.concat([self._best, found.with_columns(pl.col(texts).cast(pl.String))])
        order = together.sort(
            "policy", "saved_low_ns", "saved_high_ns", "host", "trace", "vm",
            descending=[False, True, True, False, False, False], nulls_last=True,
        )  # fmt: skip
        self._best = order.group_by("policy", maintain_order=True).head(TOP).select(self._best.columns)

    def frame(self) -> pl.DataFrame:
        return self._best


class _Failures:
    def __init__(self) -> None:
        self._sums = pl.DataFrame(schema={"reason": pl.String, "tasks": pl.Int64, "trace": pl.String})

    def add(self, failed: pl.DataFrame) -> None:
        if failed.is_empty():
            return
        found = failed.with_columns(pl.col("reason").fill_null(""), pl.col("trace").cast(pl.String))
        counted = found.group_by("reason").agg(pl.len().cast(pl.Int64).alias("tasks"), pl.col("trace").min())
        together = pl.concat([self._sums, counted])
        self._sums = together.group_by("reason").agg(pl.col("tasks").sum(), pl.col("trace").min())

    def frame(self) -> pl.DataFrame:
        return self._sums.sort("tasks", "reason", descending=[True, False])


class _Losses:
    """Events lost by each trace: known by a hash of its name, for there may be millions."""

    def __init__(self) -> None:
        self._parts: list[pl.DataFrame] = []
        self._waiting = 0

    def add(self, rows: pl.DataFrame) -> None:
        named = pl.struct(pl.col("trace").cast(pl.String), pl.col("etag").cast(pl.String))
        found = rows.group_by("trace", "etag").agg(pl.col("lost").max()).select(named.hash().alias("trace"), "lost")
        self._parts.append(found)
        self._waiting += len(found)
        if self._waiting > _MERGED:
            self._parts = [self._merged()]
            self._waiting = 0

    def _merged(self) -> pl.DataFrame:
        together = (
            pl.concat(self._parts) if self._parts else pl.DataFrame(schema={"trace": pl.UInt64, "lost": pl.Int64})
        )
        return together.group_by("trace").agg(pl.col("lost").max())

    def frame(self) -> pl.DataFrame:
        return self._merged().with_columns(pl.col("lost").fill_null(0))
