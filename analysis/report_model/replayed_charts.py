# SPDX-License-Identifier: Apache-2.0
"""Charts that compare policies: the share of time in the guest, and what roots were refilled with.

Where nothing was replayed, the latter is drawn as recorded.
"""

from __future__ import annotations

from typing import Any

import altair as alt
import polars as pl

from analysis.queries import drawn, replayed
from analysis.reading import recorded_time
from analysis.reading.result_source import Result
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
    time_axis,
    tip,
    unit_of,
    zoom,
)
from analysis.report_model.picture import Picture
from analysis.report_model.report_table import Column
from analysis.report_model.units import Unit
from traces.command_line.durations import duration


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
    fine = _averaged(every, -(-recorded_time.PARTS * len(names) // POINTS))
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
        bars = hangs.filter(pl.col("vcpu").is_in(worst["vcpu"].head(VCPUS).to_list())).head(LINES).select(
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
    coarse = _averaged(every, recorded_time.PARTS // TEXT_PARTS)
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
