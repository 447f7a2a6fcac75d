# SPDX-License-Identifier: Apache-2.0
"""Everything that a report on a fleet shows, found in one pass over the rows of its results."""

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
    """Sums of a fleet's results by group, agreement with the rows, policy, and whether it is the recorded one.

    The columns are those of `analysis.fleet.sums`. `gainers`: for each policy, the VMs that save most of those whose
    replay agrees with their rows. `failures`: failed tasks by reason, each with the first of its traces by name.
    `recordings`, `lossy` and `lost` are the numbers of recordings, of those that lost events, and of the events lost.
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
        """The number of tasks that failed."""
        return int(self.failures["tasks"].sum())

    @property
    def policies(self) -> list[str]:
        """The policies, sorted, that are not the recorded one for at least one VM."""
        return sorted(self.groups.filter(~pl.col("own"))["policy"].unique())

    def recorded(self, *keys: str, frame: pl.DataFrame | None = None) -> pl.DataFrame:
        """Return sums of all VMs under their recorded policy, by columns of `groups` or of another such frame."""
        rows = (self.groups if frame is None else frame).filter("own")
        return ended(folded(rows, *keys))

    def under(
        self, policy: str, *keys: str, frame: pl.DataFrame | None = None, agreement: str = AGREES
    ) -> pl.DataFrame:
        """Return sums of the VMs of this agreement under a policy, by the columns `keys`."""
        rows = (self.groups if frame is None else frame).filter(policy=policy, own_policy=agreement)
        return ended(folded(rows, *keys))


class Summing:
    """Sums of judged rows, added up batch by batch."""

    def __init__(self, by: Sequence[str]) -> None:
        self._by = tuple(by)
        self._groups = GroupSums(*dict.fromkeys([*by, *_VERDICT]))
        self._hosts, self._days = GroupSums("host", "kernel", "vendor", *_VERDICT), GroupSums("day", *_VERDICT)
        self._cells = tuple(dict.fromkeys([*by, "host", "kernel", "vendor", "day", *_VERDICT]))
        self._gainers, self._failures, self._traces = _Gainers(), _Failures(), _Losses()

    def add(self, rows: pl.DataFrame) -> None:
        """Add a batch of rows from `judged`."""
        self._failures.add(rows.filter(pl.col("row") == "failed"))
        vms = rows.filter(pl.col("row") == "vm")
        self._traces.add(rows)
        self._gainers.add(vms)
        sums = added(vms, self._cells)
        for each in (self._groups, self._hosts, self._days):
            each.add(sums)

    def outcome(self) -> FleetOutcome:
        """Return the sums of all rows so far."""
        lost = self._traces.frame()["lost"]
        return FleetOutcome(
            self._by, self._groups.frame(), self._hosts.frame(), self._days.frame(), self._gainers.frame(),
            self._failures.frame(), len(lost), int((lost > 0).sum()), int(lost.sum()),
        )  # fmt: skip


def outcome(batches: Iterator[pa.RecordBatch], by: Sequence[str], where: str) -> FleetOutcome:
    """Add up all rows in one pass. Raises a Problem that names `where` for rows that no replay makes."""
    summing = Summing(by)
    for rows in judged(batches, where):
        summing.add(rows)
    return summing.outcome()


class _Gainers:
    """For each policy, the VMs that certainly save most; of equal ones the first by host, recording and id."""

    def __init__(self) -> None:
        self._best = pl.DataFrame(
            schema={**dict.fromkeys(_OF_VM, pl.String), "vm": pl.Int64, **dict.fromkeys(_GAIN, pl.Int64)}
        )

    def add(self, vms: pl.DataFrame) -> None:
        found = vms.filter((pl.col("own_policy") == AGREES) & (pl.col("saved_low_ns") > 0))
        # Avoids sorting all rows: what is not among the first of its batch cannot be among the first of all.
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
    """Events lost in each recording, which a hash of its name stands for, because there may be millions."""

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
