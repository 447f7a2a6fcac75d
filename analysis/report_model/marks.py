# SPDX-License-Identifier: Apache-2.0
"""What all charts share: limits, aligned axes, one zoom, colours, units."""

from __future__ import annotations

import warnings
from typing import Any, Final

import altair as alt
import polars as pl

POINTS: Final = 4000  # in one chart, at most
VCPUS: Final = 8  # of one VM, at most
LINES: Final = 600  # roots or soft-hangs in one chart, at most
TEXT_PARTS: Final = 16  # parts of the time in the table that stands for a chart as text
COLOURS: Final = ("#3f7fd4", "#d9772b", "#3f9a6c", "#b5478f", "#8b6fd0", "#9a7b2f")
_AXIS: Final = 50  # px left of every plot, so that plots one above the other are in line


def above(*charts: Any) -> Any:
    """Stack charts one above the other, with one time axis for all."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # it warns that they share their zoom
        return alt.vconcat(*charts, spacing=6).resolve_scale(x="shared", color="shared")


def in_hex(name: str) -> pl.Expr:
    """Return an expression for a column of numbers as hexadecimal text."""
    return pl.col(name).map_elements(lambda value: f"{value:#x}", pl.String)


def unit_of(ns: int) -> tuple[int, str]:
    """Return the unit for an axis that is `ns` long: how many ns it has, and its name."""
    for name, unit in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if ns >= 2 * unit:
            return unit, name
    return 1, "ns"


def time_axis(field: str, title: str | None, end: float) -> Any:
    """Return a linear time axis from 0 to `end`; without a title it has no labels either."""
    below = axis(grid=False, labels=title is not None, ticks=title is not None, minExtent=0, maxExtent=60)
    return alt.X(f"{field}:Q", title=title, scale=alt.Scale(domain=[0, end], nice=False), axis=below)


def tip(field: str, title: str) -> Any:
    """Return a tooltip that shows a number with four digits."""
    return alt.Tooltip(f"{field}:Q", title=title, format=".4~f")


def axis(**options: Any) -> Any:
    """Return an axis that is aligned with those of the other charts."""
    return alt.Axis(**{"minExtent": _AXIS, "maxExtent": _AXIS, "tickCount": 5, **options})


def whole_ticks(values: pl.Series) -> dict[str, Any]:
    """Return axis options that put ticks only at whole numbers."""
    least, most = int(values.min()), int(values.max())  # type: ignore[arg-type]
    return {"values": list(range(least, most + 1))} if most - least < 6 else {"format": "d"}


def colour(field: str, names: list[str], colours: tuple[str, ...]) -> Any:
    """Return a colour encoding that gives each name the colour at its place."""
    scale = alt.Scale(domain=names, range=[colours[i % len(colours)] for i in range(len(names))])
    return alt.Color(f"{field}:N", title=None, scale=scale, legend=alt.Legend(orient="top"))


def zoom(name: str) -> Any:
    """Return a zoom: dragging moves in time, shift with the wheel zooms, because the wheel alone scrolls the page."""
    return alt.selection_interval(name=name, encodings=["x"], bind="scales", zoom="wheel![event.shiftKey]")
