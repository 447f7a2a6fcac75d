# SPDX-License-Identifier: Apache-2.0
"""Queries with one row for each VM, the worst first: over a result, or a recording with its replay's result."""

from __future__ import annotations

from typing import Final

import polars as pl

from analysis.queries import replayed
from analysis.queries.recorded import WINDOW_NS, fixed_of, in_windows
from analysis.queries.registry import query
from analysis.queries.worst import ranked, stuck_of, subject_of
from analysis.reading.grouped import UsedRoots
from analysis.reading.result_source import Result
from analysis.reading.sources import Recording
from traces.vm_names import VmNames

_FACTS: Final = {
    "vm": pl.Int64, "process": pl.String, "vcpus": pl.Int64, "time": pl.Int64, "length_ns": pl.Int64,
}  # fmt: skip
_OF_RESULT: Final = ("refill_share", "stalls", "longest_stall_ns", "roots_created", "refaults")


@query(Result)
def ranking(result: Result) -> pl.LazyFrame:
    """Each VM under the recorded policy, the worst first: share lost to faults and roots, soft-hangs, roots, re-faults.

    `refill_share` and `longest_stall_ns` are those of the VM's worst vCPU; counts are sums over its vCPUs. Without a
    recorded policy, the first one with times is taken.
    """
    rows = replayed.vcpus(result).filter(pl.col("policy") == subject_of(result)).collect(engine="streaming")
    order = ranked(rows, stuck_of(result))["vm"].unique(maintain_order=True).to_list()
    worst = ranked(rows, stuck_of(result)).group_by("vm", "bound", maintain_order=True).agg(
        pl.col("refill_share").first(), pl.col("longest_stall_ns").max(),
        *(pl.col(name).sum() for name in ("roots_created", "faults", "refaults", "fixes")),
        stalls=pl.when(pl.col("stalls").count() > 0).then(pl.col("stalls").sum()),
    )  # fmt: skip
    names = [*_OF_RESULT, "faults", "fixes"]
    ends = worst.group_by("vm").agg(
        *(pl.col(name).min().alias(f"{name}_low") for name in names),
        *(pl.col(name).max().alias(f"{name}_high") for name in names),
    )
    held = {vm for vm, _ in stuck_of(result)}
    place = pl.col("vm").replace_strict({vm: at for at, vm in enumerate(order)}, return_dtype=pl.Int64)
    return (
        ends.lazy()
        .sort(place)
        .select(
            pl.col("vm").cast(pl.Int64),
            *(pl.col(f"{name}_{end}") for name in names for end in ("low", "high")),
            stuck=pl.col("vm").is_in(list(held)),
        )
    )


@query(Recording, asks=lambda recording: [in_windows(recording), UsedRoots()])
def overview(recording: Recording, result: Result | None = None) -> pl.LazyFrame:
    """Each VM, the worst first: its process, when it ran, share in the guest, exits, faults, SMIs, roots seen.

    `fixes` are the faults that lacked only a permission. Given the result of the recording's replay, the columns of the
    query `ranking` are added, and VMs are in its order; else they are in order of faults. `guest_share` is of the time
    of all the VM's vCPUs, the switch to the guest included; null where entries and exits do not alternate.
    """
    meta = recording.metadata
    names = VmNames(meta)
    facts = []
    for vm in recording.metadata.vms:
        number = int(vm["id"])
        if recording.window.since is not None and number not in recording.spans:
            continue  # the VM had ended before the window
        began, ended = recording.spans.get(number, (None, None))
        length = None if began is None or ended is None else ended - began
        facts.append((number, names.process(number), len({each["id"] for each in vm["vcpus"]}), began, length))
    frame = pl.LazyFrame(facts, schema=_FACTS, orient="row").join(_of_rows(recording), on="vm", how="left")
    # In a window without an entry a vCPU may have been in its guest all the time.
    silent = "never entered its guest" if recording.window.since is None else ""
    # No row of a watched kind means 0; a kind that was not watched stays null.
    shown = {
        "entries": "kvm_entry", "exits": "kvm_exit", "faults": "kvm_page_fault", "fixes": "kvm_page_fault",
        "smis": "kvm_smm_transition",
    }  # fmt: skip
    frame = frame.with_columns(
        # where rows may be missing, a count of 0 is not certain: it becomes null
        (pl.when(pl.col(name) > 0).then(name) if meta.may_lack(kind) else pl.col(name).fill_null(0))
        if kind in recording.kinds
        else pl.lit(None, pl.Int64).alias(name)
        for name, kind in shown.items()
    ).with_columns(
        pl.col("roots") if recording.hidden else pl.col("roots").fill_null(0),
        note=pl.when(pl.col("entries") == 0).then(pl.lit(silent)).otherwise(pl.lit("")),
    )
    if result is None:
        return frame.sort("faults", "exits", "vm", descending=[True, True, False], nulls_last=True)
    found = ranking(result).with_row_index("place").drop("faults_low", "faults_high", "fixes_low", "fixes_high")
    stuck = pl.when(pl.col("stuck")).then(pl.lit("stuck")).otherwise("note")
    return frame.join(found, on="vm", how="left").sort("place", "vm", nulls_last=True).with_columns(note=stuck).drop(
        "place", "stuck"
    )  # fmt: skip


def _of_rows(recording: Recording) -> pl.LazyFrame:
    """Return what the recording's rows say of each VM, one row for each."""
    counted, roots = recording.ask(in_windows(recording), UsedRoots())
    # Times in the window are counted from its begin.
    crossed = pl.col("crossed") + (pl.col("exits") - pl.col("entries")) * pl.col("window") * WINDOW_NS
    begin, _ = recording.span
    lengths = pl.LazyFrame(
        [(vm, last - begin, last - first) for vm, (first, last) in recording.spans.items()],
        schema={"vm": pl.Int64, "ended": pl.Int64, "span": pl.Int64}, orient="row",
    )  # fmt: skip
    by_vcpu = counted.lazy().with_columns(fixed_of(recording), crossed).group_by("vm", "vcpu").agg(
        pl.col("crossed", "entries", "exits", "faults", "fixes", "smis").sum()
    )  # fmt: skip
    # A vCPU that is in the guest at the end stayed there until the VM's last row.
    stays = pl.when(pl.col("entries") > pl.col("exits")).then("ended").otherwise(0)
    alternate = (pl.col("entries") - pl.col("exits")).abs() <= 1
    by_vm = (
        by_vcpu.with_columns(pl.col("vm").cast(pl.Int64))
        .join(lengths, on="vm")
        .with_columns(guest=pl.when(alternate).then(pl.col("crossed") + stays))
        .group_by("vm", "span")
        .agg(
            pl.col("entries", "exits", "faults", "fixes", "smis").sum(),
            guest=pl.when(pl.col("guest").null_count() == 0).then(pl.col("guest").sum()),
            ran=pl.len(),
        )
    )
    share = pl.col("guest") / (pl.col("ran") * pl.col("span"))
    seen = roots.lazy().group_by(pl.col("vm").cast(pl.Int64)).agg(roots=pl.len().cast(pl.Int64))
    return (
        by_vm.with_columns(guest_share=pl.when(share.is_between(0, 1)).then(share))
        .drop("guest", "ran", "span")
        .join(seen, on="vm", how="full", coalesce=True)
    )
