# SPDX-License-Identifier: Apache-2.0
"""Pictures of a fleet: how long its VMs hang under each policy, kernels side by side, and its days."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import altair as alt
import polars as pl

from analysis.fleet.fleet_tables import AS_RECORDED, groups, stalls
from analysis.fleet.outcome import FleetOutcome
from analysis.fleet.sums import SECOND, STEPS_NS
from analysis.report_model.marks import COLOURS, axis, colour
from analysis.report_model.picture import Picture
from analysis.report_model.report_table import Column
from analysis.report_model.units import Unit

_BARS: Final = 30  # groups in one picture
_OF_SHARE: Final = (Column("what", "what", Unit.TEXT), Column("share", "s of 1,000", Unit.RATIO))


def pictures(found: FleetOutcome, best: str) -> tuple[Picture, ...]:
    """Return those pictures of a fleet for which there are rows."""
    return tuple(picture for picture in (_distribution(found), _groups(found, best), _days(found, best)) if picture)


def _distribution(found: FleetOutcome) -> Picture | None:
    rows = list(_steps(stalls(found)))
    if not any(row["high"] for row in rows):
        return None
    frame = pl.DataFrame(rows)
    names = frame["policy"].unique(maintain_order=True).to_list()
    scale = alt.Scale(type="log", nice=False, domain=[STEPS_NS[0] / SECOND, STEPS_NS[-1] / SECOND])
    base = alt.Chart(frame.select("policy", "s", "low", "high")).encode(
        x=alt.X("s:Q", title="longest soft-hang of at least, s", scale=scale,
                axis=axis(grid=False, minExtent=0, maxExtent=60)),
        color=colour("policy", names, COLOURS),
        tooltip=[alt.Tooltip("policy:N"), alt.Tooltip("s:Q", title="at least, s"),
                 alt.Tooltip("low:Q", title="VMs", format=","), alt.Tooltip("high:Q", title="at most", format=",")],
    )  # fmt: skip
    y = alt.Y("low:Q", title="VMs", axis=axis(format="~s"))
    chart = alt.layer(
        base.mark_area(opacity=0.25).encode(y=y, y2="high:Q"), base.mark_line(point=True).encode(y=y)
    ).properties(width="container", height=220)
    return Picture(
        "stalls", None, "VMs by their longest soft-hang",
        "Of VMs whose replay agrees with their rows: how many had a soft-hang of at least so long. A line is the "
        "least, the band above it is what the recordings leave undetermined.",
        chart, frame,
        (Column("policy", "policy", Unit.TEXT), Column("ns", "at least", Unit.NS), Column("low", "VMs", high="high")),
    )  # fmt: skip


def _steps(frame: pl.DataFrame) -> Iterator[dict[str, Any]]:
    for row in frame.iter_rows(named=True):
        for number, ns in enumerate(STEPS_NS):
            low, high = row[f"step_{number}_low"], row[f"step_{number}_high"]
            yield {"policy": row["policy"], "ns": ns, "s": ns / SECOND, "low": low, "high": high}


def _change(frame: pl.DataFrame, keys: tuple[str, ...], best: str) -> pl.DataFrame:
    """Return soft-hang time by group, s in 1,000 s of vCPU time: as recorded, and saved under the policy `best`."""
    share = 1 / (pl.col("vcpu_ms") * 1000)  # ns in ms to s in 1,000 s
    name = pl.concat_str([pl.col(key).cast(pl.String).fill_null("-") for key in keys], separator=" ")
    wide = frame.filter(pl.col("vcpu_ms") > 0).select(
        "vcpu_ms",
        group=name,
        recorded=pl.col("stalled_low_ns") * share,
        saved=pl.col("saved_low_ns").fill_null(0) * share,
    )
    kinds = {AS_RECORDED: "recorded"} | ({f"saved under {best}": "saved"} if best else {})
    return (
        pl.concat([wide.select("group", "vcpu_ms", what=pl.lit(kind), share=column) for kind, column in kinds.items()])
        if len(wide)
        else pl.DataFrame()
    )


def _groups(found: FleetOutcome, best: str) -> Picture | None:
    frame = groups(found, found.by, found.groups, best).sort("stalled_low_ns", descending=True, nulls_last=True)
    changed = _change(frame.head(_BARS), found.by, best)
    if not len(changed):
        return None
    names = changed["what"].unique(maintain_order=True).to_list()
    order = changed["group"].unique(maintain_order=True).to_list()
    # A group's name stands above its bars: next to them there would be no room for it.
    y = alt.Y("group:N", axis=None, sort=order)
    rows = alt.YOffset("what:N", scale=alt.Scale(domain=["", *names]))
    bars = alt.Chart(changed.select("group", "what", "share")).mark_bar().encode(
        y=y, yOffset=rows,
        x=alt.X("share:Q", title="of 1,000 s of vCPU time, s", axis=alt.Axis(tickCount=5)),
        color=colour("what", names, COLOURS),
        tooltip=[alt.Tooltip("group:N"), alt.Tooltip("what:N"), alt.Tooltip("share:Q", format=".3~f")],
    )  # fmt: skip
    labels = alt.Chart(pl.DataFrame({"group": order, "what": [""] * len(order)})).mark_text(
        align="left", baseline="middle", dx=3, limit=260
    ).encode(y=y, yOffset=rows, x=alt.value(0), text="group:N")  # fmt: skip
    chart = alt.layer(bars, labels).properties(width="container", height=max(120, 44 * len(order)))
    more = f" The {_BARS} with most of {len(frame)}." if len(frame) > _BARS else ""
    return Picture(
        "groups", None, f"Soft-hangs by {' and '.join(found.by)}",
        f"Soft-hang time in 1,000 s of vCPU time, at the least.{more}",
        chart, changed, (Column("group", "group", Unit.TEXT), *_OF_SHARE),
    )  # fmt: skip


def _days(found: FleetOutcome, best: str) -> Picture | None:
    frame = groups(found, ("day",), found.days.filter(pl.col("day").is_not_null()), best)
    changed = _change(frame, ("day",), best)
    if changed.is_empty() or changed["group"].n_unique() < 2:
        return None
    names = changed["what"].unique(maintain_order=True).to_list()
    chart = (
        alt.Chart(changed)
        .mark_line(point=True)
        .encode(
            x=alt.X("group:T", title=None, axis=axis(grid=False, format="%d %b", minExtent=0, maxExtent=60)),
            y=alt.Y("share:Q", title="of 1,000 s of vCPU time, s", axis=axis()),
            color=colour("what", names, COLOURS),
            tooltip=[alt.Tooltip("group:T", title="day"), alt.Tooltip("what:N"), alt.Tooltip("share:Q", format=".3~f")],
        )
        .properties(width="container", height=220)
    )
    return Picture(
        "days", None, "Soft-hangs by day",
        "Soft-hang time in 1,000 s of vCPU time, at the least, by the day (UTC) of the recording.",
        chart, changed, (Column("group", "day", Unit.TEXT), *_OF_SHARE),
    )  # fmt: skip
