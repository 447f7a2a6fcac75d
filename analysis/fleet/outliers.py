# SPDX-License-Identifier: Apache-2.0
"""Hosts out of line: their faults a vCPU hour against those of hosts with the same kernel and vendor.

The rule is that of median and MAD (the median distance from the median), on logarithms, for rates differ by factors: a
host is out of line whose distance is more than `DISTANCE` times what the MAD says of a normal distribution. It is asked
only of groups of `LEAST` hosts and more. Where more than half of a group are the same, a spread of 1 % is taken.
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
_MAD: Final = 1.4826  # of a normal distribution's standard deviation
_SPREAD: Final = 0.01


def outliers(hosts: pl.DataFrame) -> pl.DataFrame:
    """The hosts out of line, the furthest first: `rate`, `median`, `times` (of the median) and `distance`.

    `hosts`: sums of rows as recorded by host, kernel and vendor.
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
    """This many a vCPU hour."""
    return pl.col(name) * 3_600_000 / pl.col("vcpu_ms")
