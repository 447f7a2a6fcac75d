"""Queries that pictures are drawn from: time, pages and counts in so many parts that a picture has room for."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import polars as pl

from analysis.queries.recorded import lives
from analysis.queries.registry import query
from analysis.queries.replayed import progress
from analysis.recorded_time import PARTS, during
from analysis.sources import Recording, Result
from replay.decode.vcpu_states import VcpuState
from replay.timing.stalls import Rule
from traces.errors import Problem

ROWS: Final = 100  # of the pages
# A prefetch is part of its fault here.
DOINGS: Final = {f"{state.name.lower()}_ns": state for state in VcpuState if state != VcpuState.PREFETCH}

HANGS: Final = {
    "vm": pl.Int32, "vcpu": pl.Int16,
    **dict.fromkeys(("time", "length_ns", "guest_ns", "switch_low_ns", "switch_ns"), pl.Int64),
}  # fmt: skip


@query(Recording, needs=("kvm_entry", "kvm_exit"))
def doings(recording: Recording) -> pl.LazyFrame:
    """What each vCPU did in each of 400 parts of its VM's time: ns in the guest, on faults, loads, unloads, zaps, SMM.

    `guest_ns` has the switch to the guest and back in it. Parts in which a vCPU did nothing that was recorded are not
    there. The recording is read for this when the query is made.
    """
    frames = []
    for one in recording.times:
        found = one.parts.copy()
        found[:, :, VcpuState.FAULT] += found[:, :, VcpuState.PREFETCH]
        found[:, :, VcpuState.PREFETCH] = 0
        vcpu, part = np.nonzero(found.sum(2))
        times = {name: found[vcpu, part, state] for name, state in DOINGS.items()}
        ids = np.array(one.ids, np.int16)
        frames.append(
            pl.DataFrame({
                "vm": np.full(len(vcpu), one.vm, np.int32), "vcpu": ids[vcpu] if len(ids) else np.empty(0, np.int16),
                "time": one.first + part * one.width, "length_ns": np.full(len(vcpu), one.width), **times,
            })
        )  # fmt: skip
    schema = {"vm": pl.Int32, "vcpu": pl.Int16, "time": pl.Int64, "length_ns": pl.Int64}
    return pl.concat([pl.DataFrame(schema=schema | dict.fromkeys(DOINGS, pl.Int64)), *frames]).lazy()


@query(Recording, needs=("kvm_entry", "kvm_exit"))
def soft_hangs(recording: Recording) -> pl.LazyFrame:
    """Soft-hangs as recorded, by the usual rule: under 10 % of 100 ms or more in the guest, the longest first.

    `guest_ns` is without the switch to the guest and back, `switch_ns` each, as a replay measures it; where the
    recording does not show it bare, that is the most that it can be, and `switch_low_ns` the least. A Problem where no
    replay can. The recording is read for this when the query is made.
    """
    found: list[dict[str, Any]] = []
    for vm in recording.times:
        if not vm.ids:
            continue
        if vm.switch is None:
            why = vm.unknown.removeprefix(f"{recording.path}: ")
            raise Problem(f"{recording.path}: query soft_hangs: VM {vm.vm}: {why}")
        found += [
            {
                "vm": vm.vm,
                "vcpu": number,
                "time": one.begin,
                "length_ns": one.ns,
                "guest_ns": one.guest,
                "switch_low_ns": vm.switch.least,
                "switch_ns": vm.switch.ns,
            }
            for number, hangs in vm.stalls(Rule()).items()
            for one in hangs
        ]
    order = ["length_ns", "vm", "vcpu", "time"]
    return pl.LazyFrame(found, schema=HANGS).sort(order, descending=[True, False, False, False])


@query(Recording, needs=("kvm_mmu_set_spte",))
def heat(recording: Recording, parts: int = PARTS // 4, rows: int = ROWS // 2) -> pl.LazyFrame:
    """Where in guest memory leaves were installed, and when: 100 parts of the time, up to 50 ranges of gfns.

    Ranges are of one size and aligned to it; those in which nothing was ever mapped are not there.
    """
    frames = []
    for vm, (first, last) in during(recording.trace).items():
        width = (last - first) // parts + 1
        mapped = recording.scan().filter(pl.col("kind") == "kvm_mmu_set_spte", pl.col("vm") == vm)
        gfns = mapped.select(pl.col("gfn").unique()).collect(engine="streaming")["gfn"].drop_nulls()
        shift = 0
        while (gfns // (1 << shift)).n_unique() > rows:
            shift += 1
        frames.append(
            mapped.group_by(
                pl.col("vm"),
                time=first + (pl.col("time") - first) // width * width,
                gfn=pl.col("gfn") // (1 << shift) * (1 << shift),
            )
            .agg(installs=pl.len().cast(pl.Int64))
            .with_columns(length_ns=pl.lit(width, pl.Int64), pages=pl.lit(1 << shift, pl.Int64))
            .select("vm", "time", "length_ns", "gfn", "pages", "installs")
        )
    schema = {"vm": pl.Int32, **dict.fromkeys(("time", "length_ns", "gfn", "pages", "installs"), pl.Int64)}
    return pl.concat([pl.LazyFrame(schema=schema), *frames]).sort("vm", "time", "gfn")


@query(Result)
def shares(result: Result, parts: int = PARTS) -> pl.LazyFrame:
    """The share of time in the guest under each policy, in 400 parts of a VM's longest virtual time."""
    rows = progress(result).drop_nulls(("clock", "guest_ns")).filter(pl.col("clock") >= 0).collect(engine="streaming")
    frames = []
    longest = dict(rows.group_by("vm").agg(pl.col("clock").max()).iter_rows())
    for key, of in rows.group_by("policy", "recorded", "bound", "vm", maintain_order=True):
        width = longest[key[3]] // parts + 1
        edges = np.arange(parts + 1) * width
        guest, passed = np.zeros(parts), np.zeros(parts)
        for _, vcpu in of.group_by("vcpu", maintain_order=True):
            one = vcpu.sort("clock")
            clock = one["clock"].to_numpy()
            guest += np.diff(np.interp(edges, clock, one["guest_ns"].to_numpy()))
            passed += np.diff(np.minimum(edges, clock[-1]))
        at = np.flatnonzero(passed > 0)
        frames.append(
            pl.DataFrame(dict(zip(("policy", "recorded", "bound", "vm"), key, strict=True))).join(
                pl.DataFrame({"clock": edges[at], "length_ns": np.minimum(width, passed[at].astype(np.int64)),
                              "guest_share": np.clip(guest[at] / passed[at], 0, 1)}),
                how="cross",
            )
        )  # fmt: skip
    schema = {
        "policy": pl.String, "recorded": pl.Boolean, "bound": pl.String, "vm": pl.Int32, "clock": pl.Int64,
        "length_ns": pl.Int64, "guest_share": pl.Float64,
    }  # fmt: skip
    return pl.concat([pl.DataFrame(schema=schema), *(frame.cast(schema) for frame in frames)]).lazy()  # type: ignore[arg-type]


@query(Result)
def refills(result: Result) -> pl.LazyFrame:
    """How many pages each root was filled with, in powers of two; `refill`: a root of its role word was there before.

    Pages are the most leaves that any event in the root's life saw; 4 KiB, 2 MiB and 1 GiB each count as one.
    """
    keys = ["policy", "recorded", "bound", "vm"]
    counted = (
        result.scan()
        .filter(pl.col("row") == "root", pl.col("leaves") >= 0)
        .group_by("policy", "bound", "vm", "root")
        .agg(pl.col("role").first(), pages=pl.col("leaves").max())
        .join(_policies(result), on="policy")
    )
    return _by_size(counted, keys)


@query(Recording, needs=("kvm_page_fault",))
def fills(recording: Recording) -> pl.LazyFrame:
    """How many faults each root took, in powers of two; `refill`: a root of its role word was there before."""
    return _by_size(lives(recording).rename({"faults": "pages"}), ["vm"])


def _policies(result: Result) -> pl.LazyFrame:
    rows = [(policy.name, policy.recorded) for policy in result.policies]
    return pl.LazyFrame(rows, schema={"policy": pl.String, "recorded": pl.Boolean}, orient="row")


def _by_size(rows: pl.LazyFrame, keys: list[str]) -> pl.LazyFrame:
    """Roots by `pages` of [1, 1], [2, 3], [4, 7], and so on; 0 by itself."""
    least = pl.when(pl.col("pages") > 0).then(2 ** pl.col("pages").log(2).floor()).otherwise(0).cast(pl.Int64)
    again = pl.col("root") > pl.col("root").min().over(*keys, "role")
    return (
        rows.with_columns(pages_from=least, refill=again)
        .group_by(*keys, "refill", "pages_from")
        .agg(roots=pl.len().cast(pl.Int64), pages=pl.col("pages").sum())
        .with_columns(pages_to=pl.max_horizontal(2 * pl.col("pages_from") - 1, 0))
        .sort(*keys, "refill", "pages_from")
        .select(*keys, "refill", "pages_from", "pages_to", "roots", "pages")
    )
