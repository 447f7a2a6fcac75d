# SPDX-License-Identifier: Apache-2.0
"""Pictures of a recording and of its replays: Vega-Lite charts over frames of a few thousand rows at most.

A chart's `width` is "container": the page that embeds it puts a number there. The page also sets the colours of text
and lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import altair as alt
import polars as pl

from analysis import recorded_time
from analysis.marks import above, axis, colour, in_hex, time_axis, tip, unit_of, whole_ticks, zoom
from analysis.picture import Picture
from analysis.queries import drawn, recorded, replayed
from analysis.report import Report
from analysis.report_table import Column
from analysis.result_source import Result
from analysis.sources import Recording
from analysis.units import Unit, share
from traces.durations import duration
from traces.errors import Problem

_POINTS: Final = 4000  # points in one chart, at most
_VCPUS: Final = 8
VMS: Final = 8  # VMs that have pictures, at most
_ROOTS: Final = 600
_PARTS: Final = 16  # parts of the time in the table that stands for a chart as text
_MINUTE: Final = 60 * 10**9
COLOURS: Final = ("#3f7fd4", "#d9772b", "#3f9a6c", "#b5478f", "#8b6fd0", "#9a7b2f")
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


def pictures(report: Report) -> tuple[list[Picture], list[str]]:
    """Return the pictures that can be drawn of a report's sources, and the reasons why others cannot be."""
    drawn_: list[Picture] = list(report.drawn)
    lacking: list[str] = []
    for make in _makers(report):
        try:
            picture = make()
        except Problem as problem:
            if str(problem) not in lacking:
                lacking.append(str(problem))
            continue
        if picture is not None:
            drawn_.append(picture)
    return drawn_, lacking


def _makers(report: Report) -> Iterator[Callable[[], Picture | None]]:
    recording, result = report.recording, report.result
    vms = drawn_vms(report)
    if recording is not None:
        for vm in vms:
            yield partial(timeline, recording, vm)
            yield partial(every_vcpu, recording, vm)
            yield partial(lives, recording, vm)
    if result is not None and result.timed:
        yield from (partial(shares, result, vm) for vm in vms or (None,))
    if result is not None:
        yield lambda: refills(result)
    elif recording is not None:
        yield lambda: fills(recording)
    if recording is not None:
        for vm in vms:
            yield partial(heat, recording, vm)


def drawn_vms(report: Report) -> list[int]:
    """The VMs that pictures are made of: the worst ones, in the order of the report's table of VMs."""
    if report.recording is None:
        return []
    order = next((table.frame["vm"].to_list() for table in report.tables if table.query == "overview"), None)
    if order is None:
        order = [int(vm["id"]) for vm in report.recording.metadata.vms]
    return [vm for vm in order if vm in report.recording.spans][:VMS]


def _states(recording: Recording, vm: int) -> pl.DataFrame:
    return drawn.vcpu_states(recording, vm=vm).collect()


def every_vcpu(recording: Recording, vm: int) -> Picture | None:
    """Draw a row for each vCPU, its share of time on faults and roots; None for a VM with up to 8 vCPUs."""
    parts = _states(recording, vm)
    vcpus = parts["vcpu"].n_unique()
    if vcpus <= _VCPUS:
        return None
    begin, end = recording.spans[vm]
    fine = _coarser(parts, begin, -(-recorded_time.PARTS * vcpus // _POINTS))
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
    shown = vcpus.head(_VCPUS).sort().to_list()
    begin, end = recording.spans[vm]
    parts = parts.filter(pl.col("vcpu").is_in(shown))
    fine = _coarser(parts, begin, -(-recorded_time.PARTS * len(_KINDS) * len(shown) // _POINTS))
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
        _coarser(parts, begin, recorded_time.PARTS // _PARTS)
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
    every = -(-len(roots) // _ROOTS)
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
        chart, by_role.head(_PARTS),
        (Column("role", "role", Unit.HEX), Column("roots", "roots"), Column("life_ns", "median life", Unit.NS),
         Column("loads", "loads"), Column("faults", "faults")),
        broad=True, vm=vm,
    )  # fmt: skip


def shares(result: Result, of: int | None) -> Picture | None:
    """Draw the guest share over virtual time, a line for each policy, with soft-hangs below.

    `of` is the VM to draw; None: the one with the lowest mean share. Returns None where there are no times.
    """
    fine = drawn.shares(result, vm=of).collect()
    if fine.is_empty():
        return None
    vm = fine.group_by("vm").agg(pl.col("guest_share").mean()).sort("guest_share", "vm")["vm"][0]
    every = _named(fine.filter(vm=vm))
    names = _runs(result, every)
    fine = _averaged(every, -(-recorded_time.PARTS * len(names) // _POINTS))
    hangs = _named(result_stalls(result).filter(vm=vm))
    end = int((fine["clock"] + fine["length_ns"]).max())  # type: ignore[arg-type]
    unit, name = unit_of(end)
    # The last value of each line holds until the end of its part.
    steps = pl.concat([
        fine.select("run", x=pl.col("clock") / unit, share="guest_share"),
        fine.group_by("run", maintain_order=True).last().select(
            "run", x=(pl.col("clock") + pl.col("length_ns")) / unit, share="guest_share"
        ),
    ]).sort("run", "x")  # fmt: skip
    by_run = colour("run", names, COLOURS)
    moving = zoom("shares")
    lines = (
        alt.Chart(steps)
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=time_axis("x", None if len(hangs) else f"virtual time, {name}", end / unit),
            y=alt.Y("share:Q", title="in guest", scale=alt.Scale(domain=[0, 1]), axis=axis(format="%")),
            color=by_run,
            tooltip=[alt.Tooltip("run:N", title="policy"), tip("x", name),
                     alt.Tooltip("share:Q", title="in guest", format=".1%")],
        )
        .properties(width="container", height=170)
        .add_params(moving)
    )  # fmt: skip
    chart: Any = lines
    if len(hangs):
        worst = hangs.group_by("vcpu").agg(pl.col("wall_ns").sum()).sort("wall_ns", "vcpu", descending=[True, False])
        bars = hangs.filter(pl.col("vcpu").is_in(worst["vcpu"].head(_VCPUS).to_list())).head(_ROOTS).select(
            "run", "vcpu", "cause", x=pl.col("clock") / unit, x2=(pl.col("clock") + pl.col("wall_ns")) / unit,
            what=pl.col("wall_ns").map_elements(duration, pl.String),
        )  # fmt: skip
        hung = (
            alt.Chart(bars)
            .mark_rule(strokeWidth=6)
            .encode(
                x=time_axis("x", f"virtual time, {name}", end / unit), x2="x2:Q",
                y=alt.Y("vcpu:N", title="hung vCPU", axis=axis(grid=False)), yOffset=alt.YOffset("run:N", sort=names),
                color=by_run,
                tooltip=[alt.Tooltip("run:N", title="policy"), alt.Tooltip("what:N", title="soft-hang"),
                         alt.Tooltip("cause:N", title="slots emptied by")],
            )
            .properties(width="container", height=max(40, 16 * bars["vcpu"].n_unique()))
            .add_params(moving)
        )  # fmt: skip
        chart = above(lines, hung)
    told = [f"{len(hangs.filter(run=each)) or 'none'} under {each}" for each in names]
    coarse = _averaged(every, recorded_time.PARTS // _PARTS)
    return Picture(
        "shares", result, f"Share of VM {vm}'s time in the guest, by policy",
        f"Of all its vCPUs, in virtual time; a line ends where the same work is done. Soft-hangs: {', '.join(told)}.",
        chart, coarse.select("run", "clock", "length_ns", "guest_share"),
        (Column("run", "policy", Unit.TEXT), Column("clock", "from", Unit.NS), Column("length_ns", "length", Unit.NS),
         Column("guest_share", "in guest", Unit.SHARE)),
        vm=of,
    )  # fmt: skip


def _averaged(shares_: pl.DataFrame, by: int) -> pl.DataFrame:
    """Merge parts of the query `shares`, `by` consecutive ones into one, by their time-weighted mean."""
    width = pl.col("length_ns").max() * by
    ran = (pl.col("guest_share") * pl.col("length_ns")).sum() / pl.col("length_ns").sum()
    return (
        shares_.with_columns(part=pl.col("clock") // width)
        .group_by("run", "part", maintain_order=True)
        .agg(pl.col("clock").min(), pl.col("length_ns").sum(), guest_share=ran)
    )


def result_stalls(result: Result) -> pl.DataFrame:
    """Return the soft-hangs of a result in order of virtual time."""
    return replayed.stalls(result).drop_nulls(("clock", "wall_ns")).collect(engine="streaming").sort("clock")


def refills(result: Result) -> Picture | None:
    """Draw how many pages roots were refilled with, by policy."""
    rows = _named(drawn.refills(result).collect())
    return _sizes("refills", result, rows, _runs(result, rows), "pages", "Refills by size and policy")


def fills(recording: Recording) -> Picture | None:
    """Draw how many faults roots were refilled with, as recorded."""
    rows = drawn.fills(recording).collect().with_columns(run=pl.lit("as recorded"))
    return _sizes("fills", recording, rows, ["as recorded"], "faults", "Refills by size, as recorded")


def _sizes(
    query: str, source: Recording | Result, rows: pl.DataFrame, names: list[str], what: str, title: str
) -> Picture | None:
    if rows.is_empty():
        return None
    sizes = rows.filter("refill").group_by("run", "pages_from", "pages_to", maintain_order=True).agg(
        pl.col("roots", "pages").sum()
    ).with_columns(size=pl.when(pl.col("pages_from") == pl.col("pages_to")).then(pl.col("pages_from").cast(pl.String))
                   .otherwise(pl.format("{}-{}", "pages_from", "pages_to")))  # fmt: skip
    if sizes.is_empty():
        return None  # nothing was filled again
    order = sizes.sort("pages_from")["size"].unique(maintain_order=True).to_list()
    total = {each: sizes.filter(run=each)["pages"].sum() for each in names}
    count = {each: sizes.filter(run=each)["roots"].sum() for each in names}
    told = "; ".join(
        f"{each} {count[each]:,} refill{'' if count[each] == 1 else 's'}, {total[each]:,} {what}" for each in names
    )
    chart = (
        alt.Chart(sizes.select("run", "size", "roots", "pages"))
        .mark_bar()
        .encode(
            x=alt.X("size:N", title=f"{what} to fill the root", sort=order,
                    axis=axis(labelAngle=0, labelOverlap=True, minExtent=0)),
            xOffset=alt.XOffset("run:N", sort=names),
            y=alt.Y("roots:Q", title="roots", axis=axis(tickMinStep=1)),
            color=colour("run", names, COLOURS),
            tooltip=[alt.Tooltip("run:N", title="policy"), alt.Tooltip("size:N", title=f"{what} each"), "roots:Q",
                     alt.Tooltip("pages:Q", title=f"{what} in all", format=",")],
        )
        .properties(width="container", height=170)
    )  # fmt: skip
    return Picture(
        query, source, title,
        f"Roots by how much they were filled with, but for the first of each role word: what was there before and was "
        f"fetched again. In all: {told}.",
        chart, sizes.select("run", "size", "roots", "pages"),
        (Column("run", "policy", Unit.TEXT), Column("size", f"{what} each", Unit.TEXT), Column("roots", "roots"),
         Column("pages", f"{what} in all")),
    )  # fmt: skip


def heat(recording: Recording, vm: int) -> Picture | None:
    """Draw where in a VM's memory leaves were installed, over time."""
    fine = drawn.heat(recording).filter(pl.col("vm") == vm).collect(engine="streaming")
    if fine.is_empty():
        return None
    begin, end = recording.spans[vm]
    if len(fine) > _POINTS:
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
        chart, table.head(_PARTS),
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


def _named(rows: pl.DataFrame) -> pl.DataFrame:
    """Add the column `run`: the policy, its bound where there are two, and whether it is the recorded policy."""
    bound = pl.when(pl.col("bound") == "exact").then(pl.lit("")).otherwise(pl.format(" ({})", pl.col("bound")))
    own = pl.when("recorded").then(pl.lit(" (recorded)")).otherwise(pl.lit(""))
    return rows.with_columns(run=pl.col("policy") + bound + own)


def _runs(result: Result, rows: pl.DataFrame) -> list[str]:
    """Return the runs (policy and bound) in the result's order, so that each has one colour in all pictures."""
    place = {policy.name: number for number, policy in enumerate(result.policies)}
    order = sorted(
        rows.select("policy", "bound", "run").unique().rows(), key=lambda row: (place[row[0]], row[1] == "high")
    )
    return [run for _, _, run in order]
