# SPDX-License-Identifier: Apache-2.0
"""Charts of one VM as it was recorded: what its vCPUs did, how long its roots lived, where leaves were installed."""

from __future__ import annotations

from typing import Any, Final

import altair as alt
import polars as pl

from analysis.queries import drawn, recorded
from analysis.reading import recorded_time
from analysis.reading.sources import Recording
from analysis.report_model.marks import (
    COLOURS,
    LINES,
    POINTS,
    TEXT_PARTS,
    VCPUS,
    above,
    axis,
    colour,
    in_hex,
    time_axis,
    tip,
    unit_of,
    whole_ticks,
    zoom,
)
from analysis.report_model.picture import Picture
from analysis.report_model.report_table import Column
from analysis.report_model.units import Unit, share
from traces.command_line.durations import duration
from traces.errors import Problem

_KINDS: Final = {
    "guest": ("guest_ns",),
    "faults": ("fault_ns",),
    "roots": ("load_ns", "unload_ns", "zap_ns"),
    "other": ("smm_ns", "user_ns", "other_ns"),
    "idle": ("idle_ns",),
    "not its own": ("steal_ns", "paused_ns"),
}
_OF_KIND: Final = ("#3f9a6c", "#d9772b", "#b5478f", "#8b93a1", "#a9cdbb", "#d3cfae")
_STALL: Final = "#d33a3a"


def _states(recording: Recording, vm: int) -> pl.DataFrame:
    return drawn.vcpu_states(recording, vm=vm).collect()


def every_vcpu(recording: Recording, vm: int) -> Picture | None:
    """Draw a row for each vCPU, its share of time on faults and roots; None for a VM with up to 8 vCPUs."""
    parts = _states(recording, vm)
    vcpus = parts["vcpu"].n_unique()
    if vcpus <= VCPUS:
        return None
    begin, end = recording.spans[vm]
    fine = _coarser(parts, begin, -(-recorded_time.PARTS * vcpus // POINTS))
    unit, name = unit_of(end - begin)
    lost = pl.sum_horizontal("fault_ns", *_KINDS["roots"])
    cells = fine.select(
        "vcpu", x=(pl.col("time") - begin) / unit, x2=(pl.col("time") - begin + pl.col("length_ns")) / unit,
        lost=lost / pl.col("length_ns"),
    )  # fmt: skip
    chart = (
        alt.Chart(cells)
        .mark_rect()
        .encode(
            x=time_axis("x", name, (end - begin) / unit), x2="x2:Q",
            y=alt.Y("vcpu:O", title="vCPU", axis=axis(labelOverlap=True)),
            color=alt.Color("lost:Q", title="on faults and roots", scale=alt.Scale(domainMin=0),
                            legend=alt.Legend(orient="top", gradientLength=140, format="%")),
            tooltip=[alt.Tooltip("vcpu:O", title="vCPU"), tip("x", name), alt.Tooltip("lost:Q", format=".1%")],
        )
        .properties(width="container", height=min(400, 8 * vcpus))
        .add_params(zoom("every_vcpu"))
    )  # fmt: skip
    whole = parts.group_by("vcpu").agg(lost.sum().alias("lost"), pl.col("guest_ns").sum()).sort(
        "lost", "vcpu", descending=[True, False]
    )  # fmt: skip
    return Picture(
        "vcpu_states", recording, f"All {vcpus} vCPUs of VM {vm}",
        "A row is a vCPU; the darker, the more of that time went to faults and roots.",
        chart, whole.select("vcpu", "lost", "guest_ns"),
        (Column("vcpu", "vCPU", Unit.ID), Column("lost", "on faults and roots", Unit.NS),
         Column("guest_ns", "guest", Unit.NS)),
        broad=True, vm=vm,
    )  # fmt: skip


def timeline(recording: Recording, vm: int) -> Picture | None:
    """Draw what each vCPU of a VM did over time, with its soft-hangs above; None where nothing is known of that."""
    parts = _states(recording, vm)
    if parts.is_empty():
        return None
    lost = pl.sum_horizontal("fault_ns", *_KINDS["roots"])
    vcpus = parts.group_by("vcpu").agg(lost.sum().alias("lost")).sort("lost", "vcpu", descending=[True, False])["vcpu"]
    shown = vcpus.head(VCPUS).sort().to_list()
    begin, end = recording.spans[vm]
    parts = parts.filter(pl.col("vcpu").is_in(shown))
    fine = _coarser(parts, begin, -(-recorded_time.PARTS * len(_KINDS) * len(shown) // POINTS))
    try:
        hangs, unknown = drawn.soft_hangs(recording).filter(pl.col("vm") == vm).collect(), ""
    except Problem as problem:
        hangs = pl.DataFrame(schema=drawn.HANGS)
        unknown = f" Soft-hangs are not known: {problem}."
    unit, name = unit_of(end - begin)
    moving = zoom("timeline")
    rows = []
    for number, vcpu in enumerate(shown):
        stacked = _stacked(fine.filter(vcpu=vcpu), begin, unit)
        mine = _timed(hangs.filter(vcpu=vcpu), begin, unit)
        last = number == len(shown) - 1
        row = alt.layer(
            _bands(stacked, last, name, (end - begin) / unit, f"vCPU {vcpu}"),
            alt.Chart(mine)
            .mark_rule(strokeWidth=5, color=_STALL)
            .encode(
                x="x:Q", x2="x2:Q", y=alt.datum(1.09),
                tooltip=[alt.Tooltip("what:N", title="soft-hang"), tip("x", f"from, {name}")],
            ),
        ).properties(width="container", height=max(46, 130 // len(shown)))  # fmt: skip
        rows.append(row.add_params(moving))
    chart = above(*rows)
    omitted = f" {len(vcpus) - len(shown)} more vCPUs lost less time." if len(vcpus) > len(shown) else ""
    counted = [f"{len(hangs.filter(vcpu=vcpu))} of vCPU {vcpu}" for vcpu in shown if len(hangs.filter(vcpu=vcpu))]
    told = f" Red bars: soft-hangs as recorded, {', '.join(counted)}" if counted else " No soft-hang as recorded"
    open_ = (hangs["switch_low_ns"] < hangs["switch_ns"]).any()
    told += ", with the switch to the guest taken at the most that it can be." if open_ else "."
    unplaced = next((time.unplaced for time in recording.times if time.vm == vm), 0)
    if unplaced:
        told += (
            f" Other tasks took {duration(unplaced)} of the one CPU, and no row says when: that is in the strips, "
            "while a replay's times and soft-hangs are without it."
        )
    table = (
        _coarser(parts, begin, recorded_time.PARTS // TEXT_PARTS)
        .with_columns(
            **{kind: pl.sum_horizontal(names) for kind, names in _KINDS.items()}, begin=pl.col("time") - begin
        )
        .select("vcpu", "begin", *_KINDS)
    )
    return Picture(
        "vcpu_states", recording, f"What vCPUs of VM {vm} did, as recorded",
        "Each strip is a vCPU; its height is all of its time: in the guest (the switch there and back included), on "
        "faults, on roots (loads, unloads, inline zaps), on all else; idle (after HLT), and not its own (its thread "
        f"had no CPU, or userspace held it back).{'' if unknown else told}{unknown}{omitted}",
        chart, table.sort("vcpu", "begin"),
        (Column("vcpu", "vCPU", Unit.ID), Column("begin", "from", Unit.NS),
         *(Column(kind, kind, Unit.NS) for kind in _KINDS)),
        broad=True, vm=vm,
    )  # fmt: skip


def _coarser(parts: pl.DataFrame, begin: int, by: int) -> pl.DataFrame:
    """Merge parts of the query `vcpu_states`, `by` consecutive ones into one."""
    width = pl.col("length_ns") * by
    return (
        parts.with_columns(time=begin + (pl.col("time") - begin) // width * width, length_ns=width)
        .group_by("vcpu", "time", "length_ns")
        .agg(pl.col(list(drawn.STATES)).sum())
        .sort("vcpu", "time")
    )


def lives(recording: Recording, vm: int) -> Picture | None:
    """Draw every root of a VM as a line from its first to its last row; None where no root was recorded."""
    roots = recorded.lives(recording).filter(pl.col("vm") == vm).collect(engine="streaming")
    if roots.is_empty():
        return None
    begin, end = recording.spans[vm]
    unit, name = unit_of(end - begin)
    every = -(-len(roots) // LINES)
    fine = roots.sort("first_time", "root").with_row_index("place", 1).gather_every(every).with_columns(
        x=(pl.col("first_time") - begin) / unit, x2=(pl.col("last_time") - begin) / unit,
        mode=pl.when(pl.col("role") >= 1 << 24).then(pl.lit("in SMM")).otherwise(pl.lit("not in SMM")),
        word=pl.format("0x{}", pl.col("role").map_elements(lambda word: f"{word:08x}", pl.String)),
        life=pl.col("life_ns").map_elements(duration, pl.String),
    ).select("place", "root", "word", "mode", "x", "x2", "life", "loads", "faults")  # fmt: skip
    chart = (
        alt.Chart(fine)
        .mark_rule(strokeWidth=max(2.5, min(6.0, 120 / len(fine))), strokeCap="round")
        .encode(
            x=time_axis("x", name, (end - begin) / unit), x2="x2:Q",
            y=alt.Y("place:Q", title="roots, in order", scale=alt.Scale(zero=False, nice=False, padding=6),
                    axis=axis(**whole_ticks(fine["place"]))),
            color=colour("mode", ["not in SMM", "in SMM"], COLOURS),
            tooltip=["root:Q", alt.Tooltip("word:N", title="role"), "life:N", "loads:Q", "faults:Q"],
        )
        .properties(width="container", height=180)
        .add_params(zoom("lives"))
    )  # fmt: skip
    thinned = f" One in {every} is drawn." if every > 1 else ""
    by_role = (
        roots.group_by("role")
        .agg(pl.len().alias("roots"), pl.col("life_ns").median().cast(pl.Int64), pl.col("loads", "faults").sum())
        .sort("roots", "role", descending=[True, False])
    )
    return Picture(
        "lives", recording, f"Lifetimes of the roots of VM {vm}",
        f"Each line is a root, from the first row that names it to the last: {len(roots):,} in all. A staircase is "
        f"roots that are built again and again; a kernel that keeps them has a few long lines.{thinned}",
        chart, by_role.head(TEXT_PARTS),
        (Column("role", "role", Unit.HEX), Column("roots", "roots"), Column("life_ns", "median life", Unit.NS),
         Column("loads", "loads"), Column("faults", "faults")),
        broad=True, vm=vm,
    )  # fmt: skip


def heat(recording: Recording, vm: int) -> Picture | None:
    """Draw where in a VM's memory leaves were installed, over time."""
    fine = drawn.heat(recording).filter(pl.col("vm") == vm).collect(engine="streaming")
    if fine.is_empty():
        return None
    begin, end = recording.spans[vm]
    if len(fine) > POINTS:
        width = 2 * pl.col("length_ns")
        two = fine.with_columns(time=begin + (pl.col("time") - begin) // width * width, length_ns=width)
        fine = two.group_by("time", "length_ns", "gfn", "pages").agg(pl.col("installs").sum()).sort("time", "gfn")
    unit, name = unit_of(end - begin)
    pages = int(fine["pages"][0])
    cells = fine.with_columns(
        x=(pl.col("time") - begin) / unit, x2=(pl.col("time") - begin + pl.col("length_ns")) / unit,
        page=in_hex("gfn"),
    ).sort("gfn").select("x", "x2", "page", "installs")  # fmt: skip
    order = cells["page"].unique(maintain_order=True).to_list()
    chart = (
        alt.Chart(cells)
        .mark_rect()
        .encode(
            x=time_axis("x", name, (end - begin) / unit), x2="x2:Q",
            y=alt.Y("page:N", title="gfn from", sort=order, axis=axis(labelOverlap=True)),
            color=alt.Color("installs:Q", title="leaf installs", legend=alt.Legend(orient="top", gradientLength=140)),
            tooltip=[alt.Tooltip("page:N", title="gfn from"), tip("x", name), "installs:Q"],
        )
        .properties(width="container", height=min(240, max(80, 6 * len(order))))
        .add_params(zoom("heat"))
    )  # fmt: skip
    table = (
        fine.group_by("gfn", "pages")
        .agg(pl.col("installs").sum(), parts=pl.len(), most=pl.col("installs").max())
        .sort("installs", "gfn", descending=[True, False])
    )
    return Picture(
        "heat", recording, f"Where leaves were installed in VM {vm}'s memory",
        f"A row is {pages} page{'' if pages == 1 else 's'} from its gfn on; ranges in which nothing was mapped are not "
        "there. Columns that repeat are refills of the same pages.",
        chart, table.head(TEXT_PARTS),
        (Column("gfn", "gfn from", Unit.HEX), Column("pages", "pages"), Column("installs", "installs"),
         Column("most", "most in one cell")),
        broad=True, vm=vm,
    )  # fmt: skip


def _stacked(parts: pl.DataFrame, begin: int, unit: int) -> pl.DataFrame:
    """Stack the kinds of time of each part, as shares of its length, one above the other."""
    sums = {kind: pl.sum_horizontal(names) for kind, names in _KINDS.items()}
    wide = parts.with_columns(**sums).select("time", "length_ns", *_KINDS)
    long = wide.unpivot(list(_KINDS), index=["time", "length_ns"], variable_name="kind", value_name="ns")
    order = pl.col("kind").replace_strict({kind: i for i, kind in enumerate(_KINDS)}, return_dtype=pl.Int8)
    return (
        long.sort("time", order)
        .with_columns(part=pl.col("ns") / pl.col("length_ns"))
        .with_columns(top=pl.col("part").cum_sum().over("time"))
        .filter(pl.col("ns") > 0)
        .select(
            "kind", "part",
            x=(pl.col("time") - begin) / unit, x2=(pl.col("time") - begin + pl.col("length_ns")) / unit,
            y=pl.col("top") - pl.col("part"), y2=pl.col("top"),
        )
    )  # fmt: skip


def _bands(stacked: pl.DataFrame, last: bool, name: str, end: float, title: str) -> Any:
    scale = alt.Scale(domain=[0, 1.18], nice=False)
    return (
        alt.Chart(stacked)
        .mark_rect(strokeWidth=0)
        .encode(
            x=time_axis("x", name if last else None, end), x2="x2:Q",
            y=alt.Y("y:Q", title=title, scale=scale, axis=axis(values=[0, 0.5, 1], format="%")), y2="y2:Q",
            color=colour("kind", list(_KINDS), _OF_KIND),
            tooltip=[alt.Tooltip("kind:N", title="on"), alt.Tooltip("part:Q", title="share", format=".1%"),
                     tip("x", f"from, {name}")],
        )
    )  # fmt: skip


def _timed(hangs: pl.DataFrame, begin: int, unit: int) -> pl.DataFrame:
    return hangs.select(
        x=(pl.col("time") - begin) / unit,
        x2=(pl.col("time") - begin + pl.col("length_ns")) / unit,
        what=pl.struct("length_ns", "guest_ns").map_elements(
            lambda row: f"{duration(row['length_ns'])}, {share(row['guest_ns'] / row['length_ns'])} in the guest",
            pl.String,
        ),
    )
