# SPDX-License-Identifier: Apache-2.0
"""Sums of judgements: for each group of rows and each policy, counts and intervals that can be added up again.

All values are sums or maxima of integers, so that neither the order of rows nor that of files changes them. Rows whose
interval has no upper end are counted (`*_open`); `ended` makes the upper end of their sum null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import polars as pl

SECOND: Final = 10**9
# Lengths, in ns, at which the distribution of each VM's longest soft-hang is counted.
STEPS_NS: Final = tuple(
    step * 10**7 for step in (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 6_000, 10_000, 30_000)
)
_INTERVALS: Final = {
    "stalls": ("stalls_low", "stalls_high"),
    "stalled_ns": ("stalled_low_ns", "stalled_high_ns"),
    "faults": ("faults_low", "faults_high"),
    "refaults": ("refaults_low", "refaults_high"),
    "saved_ns": ("saved_low_ns", "saved_high_ns"),
    "spared": ("spared_low", "spared_high"),
}
_MAXIMA: Final = ("longest_low_ns", "longest_high_ns")
_MERGED: Final = 500_000  # rows that wait to be merged


def _ends(name: str) -> tuple[str, str]:
    stem, unit = (name[:-3], "_ns") if name.endswith("_ns") else (name, "")
    return f"{stem}_low{unit}", f"{stem}_high{unit}"


def _aggregates() -> list[pl.Expr]:
    low, high = pl.col("saved_low_ns"), pl.col("saved_high_ns")
    stalls_high = pl.col("stalls_high")
    timed = pl.col("stalls_low").is_not_null()
    found = [
        pl.len().alias("vms").cast(pl.Int64),
        pl.col("vcpus").cast(pl.Int64).sum(),
        (pl.col("duration_ns") // 10**6).sum().alias("vm_ms"),
        (pl.col("duration_ns") // 10**6 * pl.col("vcpus")).sum().alias("vcpu_ms"),
        _count(timed).alias("timed"),
        _count(pl.col("stalls_low") > 0).alias("hung_low"),
        _count((stalls_high > 0) | (timed & stalls_high.is_null())).alias("hung_high"),
        _count(~pl.col("paired")).alias("unpaired"),
        # What another policy changes: null, and so not counted, in rows of the recorded policy.
        _count(low > 0).alias("gain"),
        _count(high < 0).alias("lose"),
        _count((low == 0) & (high == 0)).alias("same"),
        _count(timed & ~pl.col("own")).alias("others"),
        pl.col("longest_stall_low_ns").max().alias("longest_low_ns"),
        pl.col("longest_stall_high_ns").max().alias("longest_high_ns"),
        _count(timed & pl.col("longest_stall_high_ns").is_null()).alias("longest_open"),
    ]
    for name, (least, most) in _INTERVALS.items():
        known = pl.col(least).is_not_null()
        to_low, to_high = _ends(name)
        found += [
            pl.col(least).sum().alias(to_low),
            pl.col(most).filter(known).sum().alias(to_high),
            _count(known & pl.col(most).is_null()).alias(f"{name}_open"),
        ]
    longest_low, longest_high = pl.col("longest_stall_low_ns"), pl.col("longest_stall_high_ns")
    for number, step in enumerate(STEPS_NS):
        found += [
            _count(longest_low >= step).alias(f"step_{number}_low"),
            _count((longest_high >= step) | (timed & longest_high.is_null())).alias(f"step_{number}_high"),
        ]
    return found


def _count(condition: pl.Expr) -> pl.Expr:
    return condition.sum().cast(pl.Int64)


_AGGREGATES: Final = _aggregates()
SUMS: Final = tuple(name for name in (each.meta.output_name() for each in _AGGREGATES) if name not in _MAXIMA)


def added(rows: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Return the sums of judged rows of VMs by the columns `keys`; they can be added to other such sums."""
    return rows.group_by(keys).agg(_AGGREGATES)


def _merged(sums: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    if not keys:
        return sums.select(pl.col(SUMS).sum(), pl.col(_MAXIMA).max())
    return sums.group_by(keys).agg(pl.col(SUMS).sum(), pl.col(_MAXIMA).max())


class GroupSums:
    """Sums by some columns, over any number of batches; memory grows with the number of groups."""

    def __init__(self, *keys: str) -> None:
        self.keys = keys
        self._parts: list[pl.DataFrame] = []
        self._waiting = 0

    def add(self, sums: pl.DataFrame) -> None:
        """Add sums that are grouped by at least these columns."""
        part = _merged(sums, self.keys)
        self._parts.append(part)
        self._waiting += len(part)
        if self._waiting > _MERGED:
            self._parts = [_merged(pl.concat(self._parts), self.keys)]
            self._waiting = 0

    def frame(self) -> pl.DataFrame:
        """Return one row for each group, in order of its columns, which are texts; intervals are not yet `ended`."""
        if not self._parts:
            numbers = dict.fromkeys((*SUMS, *_MAXIMA), pl.Int64)
            keys = {key: pl.Boolean if key == "own" else pl.String for key in self.keys}
            return pl.DataFrame(schema={**keys, **numbers})
        frame = _merged(pl.concat(self._parts), self.keys)
        texts = [name for name in self.keys if frame.schema[name] in (pl.Categorical, pl.Date)]
        return frame.with_columns(pl.col(texts).cast(pl.String)).sort(self.keys, nulls_last=True)


def folded(frame: pl.DataFrame, *keys: str) -> pl.DataFrame:
    """Return sums by fewer columns, in their order; without any, one row, of zeros if there was none."""
    found = _merged(frame, keys)
    return found.sort(keys, nulls_last=True) if keys else found


def ended(frame: pl.DataFrame) -> pl.DataFrame:
    """Set upper ends to null where a row had none, and add `undecided`: the VMs that may gain or lose."""
    open_ends = {name: _ends(name)[1] for name in _INTERVALS}
    return frame.with_columns(
        *(pl.when(pl.col(f"{name}_open") == 0).then(pl.col(high)).alias(high) for name, high in open_ends.items()),
        pl.when(pl.col("longest_open") == 0).then(pl.col("longest_high_ns")).alias("longest_high_ns"),
        undecided=pl.col("others") - pl.col("gain") - pl.col("lose") - pl.col("same"),
    )
