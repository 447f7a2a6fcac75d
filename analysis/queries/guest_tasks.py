# SPDX-License-Identifier: Apache-2.0
"""Which task of a guest paid for its faults: a recording of the host combined with one made inside the guest."""

from __future__ import annotations

from typing import Final

import polars as pl

from analysis.queries.registry import query
from analysis.reading.sources import Recording
from traces.errors import Problem

_KINDS: Final = ("kvm_entry", "kvm_exit", "kvm_page_fault", "kvm_mmu_get_page")
_NO_CPU: Final = "not known"


@query(Recording, needs=("kvm_entry", "kvm_exit", "kvm_page_fault"))
def guest_tasks(recording: Recording) -> pl.LazyFrame:
    """Guest tasks by the time that their faults took: what ran on the vCPU when it left the guest with a fault.

    `roots` are those built anew in these exits; `fault_ns` is from exit to entry. Memory grows with the VM's exits.
    """
    guest = recording.guest
    if guest is None:
        raise Problem("query guest_tasks: no recording of the guest is given: --guest FILE")
    kind = pl.col("kind").cast(pl.String)
    rows = (
        recording.scan()
        .filter((pl.col("vm") == guest.vm) & pl.col("vcpu").is_not_null() & kind.is_in(_KINDS))
        .select("seq", "time", pl.col("vcpu").cast(pl.Int64), kind.alias("kind"), "root", "flags")
        .collect()
        .sort("vcpu", "seq")
    )
    began = (pl.col("kind") == "kvm_exit").cum_sum().over("vcpu").alias("exit")
    exits = (
        rows.with_columns(began)
        .filter(pl.col("exit") > 0)
        .group_by("vcpu", "exit")
        .agg(
            pl.col("time").first(),
            entered=pl.col("time").filter(pl.col("kind") == "kvm_entry").first(),
            faults=(pl.col("kind") == "kvm_page_fault").sum(),
            roots=((pl.col("kind") == "kvm_mmu_get_page") & (pl.col("root") > 0) & (pl.col("flags") & 1 == 1)).sum(),
        )
        .filter((pl.col("faults") > 0) | (pl.col("roots") > 0))
        .sort("time")
    )
    ran = guest.tasks.ran.rename({"cpu": "vcpu"}).sort("time")
    return (
        exits.join_asof(ran, on="time", by="vcpu", strategy="backward", check_sortedness=False)
        .with_columns(pl.lit(guest.vm, pl.Int32).alias("vm"), pl.col("task").fill_null(_NO_CPU))
        .group_by("vm", "task", "pid")
        .agg(
            pl.col("faults", "roots").sum().cast(pl.Int64),
            fault_ns=(pl.col("entered") - pl.col("time")).sum(),
            vcpus=pl.col("vcpu").n_unique().cast(pl.Int64),
            first_time=pl.col("time").min(),
            last_time=pl.col("time").max(),
        )
        .sort(["fault_ns", "faults", "task", "pid"], descending=[True, True, False, False])
        .with_columns((pl.col("faults") / pl.col("faults").sum()).alias("share"))
        .lazy()
    )
