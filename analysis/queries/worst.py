# SPDX-License-Identifier: Apache-2.0
"""The order of vCPUs, and so of VMs, from the worst on: one order for headline, tables and pictures.

First come those that were stuck in the recording, then those that stood still longest, then those that lost the most
time to faults and roots.
"""

from __future__ import annotations

from collections.abc import Collection

import polars as pl

from analysis.queries import replayed
from analysis.reading.result_source import Result


def subject_of(result: Result) -> str:
    """Return the policy that a report is about: the recorded one, else the first with times, else the first."""
    recorded = [policy.name for policy in result.policies if policy.recorded]
    timed = [policy.name for policy in result.policies if result.timed and not policy.own]
    return next(iter([*recorded, *timed, *(policy.name for policy in result.policies)]), "")


def stuck_of(result: Result) -> frozenset[tuple[int, int]]:
    """Return (VM, vCPU) of the vCPUs that kept running without progress in the recording."""
    return frozenset((vm.vm, each.vcpu) for vm in result.vms for each in vm.stuck if not each.ended)


def ranked(rows: pl.DataFrame, stuck: Collection[tuple[int, int]]) -> pl.DataFrame:
    """Return rows of the query `vcpus`, the worst vCPU first; those without times last."""
    held = pl.Series([(row[0], row[1]) in stuck for row in rows.select("vm", "vcpu").iter_rows()], dtype=pl.Boolean)
    cost = pl.when(pl.col("wall_ns") > 0).then(pl.sum_horizontal(replayed.REFILL))
    return (
        rows.with_columns(held.alias("held"), cost.alias("cost"))
        .sort(
            "held", "longest_stall_ns", "cost", "faults", "vm", "vcpu",
            descending=[True, True, True, True, False, False], nulls_last=True,
        )
        .drop("held", "cost")
    )  # fmt: skip
