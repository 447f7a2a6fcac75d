# SPDX-License-Identifier: Apache-2.0
"""Hosts out of line: those whose rate of faults is far from that of hosts with the same kernel and vendor.

Rates are faults per vCPU hour, compared by their logarithms because they differ by factors. A host is out of line if
its distance from the median is more than `DISTANCE` standard deviations, estimated as 1.4826 times the MAD (the median
distance from the median). Only groups of at least `LEAST` hosts are examined. The deviation is taken as at least 1 %,
for groups of which more than half have the same rate.
"""

from __future__ import annotations

from typing import Final

import polars as pl

LEAST: Final = 8  # hosts of one kernel and vendor
DISTANCE: Final = 5.0
RULE: Final = (
    f"hosts whose faults a vCPU hour are more than {DISTANCE:g} times 1.4826 MAD off the median of the same kernel and "
    f"vendor ({LEAST} hosts and more), in logarithms"
)
_MAD: Final = 1.4826  # standard deviation of a normal distribution, in MADs
_SPREAD: Final = 0.01


def outliers(hosts: pl.DataFrame) -> pl.DataFrame:
    """Return the hosts out of line, the furthest first, with `rate`, `median`, `times` and `distance`.

    `times` is the rate divided by the median. `hosts` are sums of rows as recorded, by host, kernel and vendor.
    """
    group = ("kernel", "vendor")
    rates = hosts.filter(pl.col("vcpu_ms") > 0).with_columns(rate=rate("faults_low"))
    logs = rates.with_columns(log=(pl.col("rate") + 1).log()).with_columns(
        middle=pl.col("log").median().over(group), of=pl.len().over(group)
    )
    away = logs.with_columns(away=(pl.col("log") - pl.col("middle")).abs())
    found = away.with_columns(spread=(_MAD * pl.col("away").median().over(group)).clip(lower_bound=_SPREAD))
    found = found.with_columns(distance=pl.col("away") / pl.col("spread"), median=pl.col("middle").exp() - 1)
    chosen = found.filter(pl.col("of") >= LEAST, pl.col("distance") > DISTANCE)
    return (
        chosen.with_columns(times=(pl.col("rate") + 1) / (pl.col("median") + 1))
        .sort("distance", "host", descending=[True, False])
        .select("host", *group, "vms", "rate", "median", "times", "distance")
    )


def rate(name: str) -> pl.Expr:
    """Return an expression for the column `name` as a rate per vCPU hour."""
    return pl.col(name) * 3_600_000 / pl.col("vcpu_ms")
