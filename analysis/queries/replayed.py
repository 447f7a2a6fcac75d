# SPDX-License-Identifier: Apache-2.0
"""Queries over the rows of a replay's result.

Where a trace does not determine a value, the result has two rows for a policy, one for each bound; queries have
`NAME_low` and `NAME_high` for them. Where everything is determined both are the same; where there is no upper end,
`NAME_high` is null.
"""

from __future__ import annotations

from typing import Final

import polars as pl

from analysis.queries.registry import query
from analysis.reading.result_source import Result
from replay.result import OF_VCPU, OF_VM, SPENT
from replay.timing.soft_hangs import OF_ROOTS

PAGE: Final = 4096
# Counts that are summed over VMs, and those of which the greatest is taken.
_SUMMED: Final = (*OF_VCPU, *OF_VM)
_PEAKS: Final = ("roots_peak", "tables_peak", "memory_bytes")
_TIMES: Final = ("stalls", "stalled_ns", "longest_stall_ns", "wall_ns", *SPENT)
REFILL: Final = tuple(SPENT[each] for each in OF_ROOTS)  # times that depend on the root policy


def _ends(rows: pl.LazyFrame, keys: list[str], names: list[str]) -> pl.LazyFrame:
    """Fold the rows of all bounds into one, each value the interval over the bounds."""
    low = [pl.col(name).min().alias(f"{name}_low") for name in names]
    return rows.group_by(keys).agg(*low, *(pl.col(name).max().alias(f"{name}_high") for name in names))


def _unbounded(result: Result, rows: pl.LazyFrame) -> pl.LazyFrame:
    """Set upper ends to null for policies that have none."""
    open_ = pl.col("policy").is_in([policy.name for policy in result.policies if policy.at_least])
    return rows.with_columns(pl.when(~open_).then(pl.col("^.*_high$")).name.keep())


def _of(result: Result, row: str) -> pl.LazyFrame:
    """Return rows of one type, with the policy's place in the metadata and whether it is the recorded policy."""
    known = pl.LazyFrame(
        [(policy.name, number, policy.recorded) for number, policy in enumerate(result.policies)],
        schema={"policy": pl.String, "policy_number": pl.Int64, "recorded": pl.Boolean},
        orient="row",
    )
    # Results before format 1.3 count idle time, steal time and pauses as other time.
    added = [
        pl.when(pl.col("guest_ns").is_not_null()).then(pl.col(name).fill_null(0)).alias(name) for name in SPENT[7:]
    ]
    return result.scan().filter(pl.col("row") == row).with_columns(added).join(known, on="policy")


def _sorted(rows: pl.LazyFrame, *names: str) -> pl.LazyFrame:
    return rows.sort("policy_number", *names).drop("policy_number")


def _share(part: pl.Expr, whole: pl.Expr) -> pl.Expr:
    """Return an expression for part / whole; null where the whole is 0."""
    return pl.when(whole > 0).then(part / whole)


def _counts(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Give the counts of `vm` rows the names that reports use, and add `memory_bytes`."""
    return rows.with_columns(memory_bytes=(pl.col("tables_peak") + pl.col("roots_peak")) * PAGE).rename(
        {"creations": "roots_created"}
    )


COUNTS: Final = tuple("roots_created" if name == "creations" else name for name in _SUMMED)


@query(Result)
def policies(result: Result) -> pl.LazyFrame:
    """The result of each policy, over all VMs: counts, memory held, time, soft-hangs.

    Peaks, `memory_bytes` (tables and roots alive, 4 KiB each), and `wall_ns` are those of the VM or vCPU with the most.
    `stall_share` and `refill_share` (faults with their switches, loads, unloads, waits) are shares of the vCPUs' time.
    `error` is half the width of the time's band, relative to the time. Times are null in a result without times.
    """
    keys = ["policy", "policy_number", "recorded"]
    counts = (
        _counts(_of(result, "vm"))
        .group_by(*keys, "bound")
        .agg(*(pl.col(name).sum() for name in COUNTS), *(pl.col(name).max() for name in _PEAKS), vms=pl.len())
    )
    timed = pl.col("wall_ns").count() > 0
    times = (
        _of(result, "vcpu")
        .group_by(*keys, "bound")
        .agg(
            *(pl.when(timed).then(pl.col(name).sum()).alias(name) for name in ("stalls", "stalled_ns", *SPENT)),
            pl.col("wall_ns").max(),
            pl.col("longest_stall_ns").max(),
            band_low_ns=pl.col("wall_low_ns").max(),
            band_high_ns=pl.col("wall_high_ns").max(),
            walls=pl.when(timed).then(pl.col("wall_ns").sum()),
            error=_share(pl.col("wall_high_ns") - pl.col("wall_low_ns"), 2 * pl.col("wall_ns")).max(),
        )
        .with_columns(
            stall_share=_share(pl.col("stalled_ns"), pl.col("walls")),
            refill_share=_share(pl.sum_horizontal(REFILL), pl.col("walls")),
        )
    )
    names = [*COUNTS, *_PEAKS, *_TIMES, "stall_share", "refill_share", "error"]
    both = counts.join(times, on=[*keys, "bound"], how="left")
    band = both.group_by(keys).agg(band_ns_low=pl.col("band_low_ns").min(), band_ns_high=pl.col("band_high_ns").max())
    return _sorted(_unbounded(result, _ends(both, keys, names).join(band, on=keys)))


@query(Result)
def vms(result: Result) -> pl.LazyFrame:
    """Each VM under each policy: the counts of the query `policies`."""
    keys = ["policy", "policy_number", "recorded", "vm"]
    return _sorted(_unbounded(result, _ends(_counts(_of(result, "vm")), keys, [*COUNTS, *_PEAKS])), "vm")


@query(Result)
def vcpus(result: Result) -> pl.LazyFrame:
    """Each vCPU under each policy and bound: counts, where its time goes, its soft-hangs."""
    stopped = pl.col("seq").alias("stopped_at")
    return _sorted(
        _of(result, "vcpu").select(
            "policy", "policy_number", "recorded", "bound", "vm", "vcpu", stopped,
            *(pl.col(name).alias("roots_created" if name == "creations" else name) for name in OF_VCPU),
            "recorded_ns", "wall_ns", "wall_low_ns", "wall_high_ns", *SPENT,
            "stalls", "stalled_ns", "longest_stall_ns",
            refill_share=_share(pl.sum_horizontal(REFILL), pl.col("wall_ns")),
        ),
        "vm", "vcpu", "bound",
    )  # fmt: skip


@query(Result)
def causes(result: Result) -> pl.LazyFrame:
    """Why roots were freed, by policy: how many, and the leaves and tables that went with them; the most first."""
    keys = ["policy", "policy_number", "recorded", "cause"]
    freed = _of(result, "root").filter(pl.col("event") == "freed")
    counts = freed.group_by(*keys, "bound").agg(
        freed=pl.len().cast(pl.Int64), leaves=pl.col("leaves").sum(), tables=pl.col("tables").sum()
    )
    # A cause that is missing in one bound is 0 there.
    bounds = pl.LazyFrame(
        [{"policy": policy.name, "bounds": len(policy.bounds)} for policy in result.policies],
        schema={"policy": pl.String, "bounds": pl.Int64},
    )
    names = ("freed", "leaves", "tables")
    ends = (
        counts.group_by(keys)
        .agg(
            *(pl.col(name).min().alias(f"{name}_low") for name in names),
            *(pl.col(name).max().alias(f"{name}_high") for name in names),
            seen=pl.len(),
        )
        .join(bounds, on="policy")
        .with_columns(
            pl.when(pl.col("seen") < pl.col("bounds")).then(0).otherwise(pl.col(f"{name}_low")).alias(f"{name}_low")
            for name in names
        )
    )
    order = ["policy_number", "freed_high", "freed_low", "cause"]
    return (
        ends.sort(order, descending=[False, True, True, False])
        .select("policy", "recorded", "cause", *(f"{name}_{end}" for name in names for end in ("low", "high")))
    )  # fmt: skip


@query(Result)
def stalls(result: Result) -> pl.LazyFrame:
    """Every soft-hang in virtual time, the longest first: its begin, time breakdown, what emptied the root slots."""
    return (
        _of(result, "stall")
        .select("policy", "recorded", "bound", "vm", "vcpu", "clock", "wall_ns", "cause", *SPENT)
        .sort("wall_ns", "policy", "bound", "vm", "vcpu", "clock", descending=[True, *[False] * 5])
    )


@query(Result)
def progress(result: Result) -> pl.LazyFrame:
    """Each vCPU's progress in virtual time, a ms or more apart: the clock, and the time breakdown until then."""
    return _sorted(
        _of(result, "progress").select(
            "policy", "policy_number", "recorded", "bound", "vm", "vcpu", "clock", "cause", *SPENT
        ),
        "bound", "vm", "vcpu", "clock",
    )  # fmt: skip


@query(Result)
def roots(result: Result) -> pl.LazyFrame:
    """Every root under every policy and bound: its role word, when it was made and freed and why, and what it held."""
    keys = ["policy", "policy_number", "recorded", "bound", "vm", "root"]
    made, freed = pl.col("event") == "created", pl.col("event") == "freed"
    return _sorted(
        _of(result, "root")
        .filter(made | freed)
        .group_by(keys)
        .agg(
            role=pl.col("role").max(),
            created_time=pl.when(made).then(pl.col("time")).min(),
            created_for=pl.when(made).then(pl.col("cause")).max(),
            freed_time=pl.when(freed).then(pl.col("time")).max(),
            freed_for=pl.when(freed).then(pl.col("cause")).max(),
            leaves=pl.when(freed).then(pl.col("leaves")).max(),
            tables=pl.when(freed).then(pl.col("tables")).max(),
        )
        .with_columns(life_ns=pl.col("freed_time") - pl.col("created_time")),
        "bound", "vm", "root",
    )  # fmt: skip


@query(Result)
def costs(result: Result) -> pl.LazyFrame:
    """What operations cost in each VM's recording, in ns, measured there or taken from a dated table."""
    rows = [
        (vm.vm, cost.name, cost.ns, cost.measured, cost.source, cost.error) for vm in result.vms for cost in vm.costs
    ]
    schema = {
        "vm": pl.Int64, "cost": pl.String, "ns": pl.UInt64, "measured": pl.Boolean, "source": pl.String,
        "error": pl.Float64,
    }  # fmt: skip
    return pl.LazyFrame(rows, schema=schema, orient="row")
