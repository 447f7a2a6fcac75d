# SPDX-License-Identifier: Apache-2.0
"""What charts have in common: axes in line with each other, one zoom, colours, units."""

from __future__ import annotations

import warnings
from typing import Any, Final

import altair as alt
import polars as pl

_AXIS: Final = 50  # px left of every plot, so that plots one above the other are in line


def above(*charts: Any) -> Any:
    """One above the other, with one time for all."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that they share their zoom
        return alt.vconcat(*charts, spacing=6).resolve_scale(x="shared", color="shared")


def in_hex(name: str) -> pl.Expr:
    """A number as hexadecimal text."""
    return pl.col(name).map_elements(lambda value: f"{value:#x}", pl.String)


def unit_of(ns: int) -> tuple[int, str]:
    """ns of the unit for an axis of this length, and its name."""
    for name, unit in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if ns >= 2 * unit:
            return unit, name
    return 1, "ns"


def time_axis(field: str, title: str | None, end: float) -> Any:
    """A linear time from 0 to `end`; without a title also without labels."""
    below = axis(grid=False, labels=title is not None, ticks=title is not None, minExtent=0, maxExtent=60)
    return alt.X(f"{field}:Q", title=title, scale=alt.Scale(domain=[0, end], nice=False), axis=below)


def tip(field: str, title: str) -> Any:
    """A tooltip's number, four figures."""
    return alt.Tooltip(f"{field}:Q", title=title, format=".4~f")


def axis(**options: Any) -> Any:
    """An axis in line with those of the other charts."""
    return alt.Axis(**{"minExtent": _AXIS, "maxExtent": _AXIS, "tickCount": 5, **options})


def whole_ticks(values: pl.Series) -> dict[str, Any]:
    """Axis options that let no tick stand between two whole numbers."""
    least, most = int(values.min()), int(values.max())  # type: ignore[arg-type]
    return {"values": list(range(least, most + 1))} if most - least < 6 else {"format": "d"}


def colour(field: str, names: list[str], colours: tuple[str, ...]) -> Any:
    """Names in colours of the same order."""
    scale = alt.Scale(domain=names, range=[colours[i % len(colours)] for i in range(len(names))])
    return alt.Color(f"{field}:N", title=None, scale=scale, legend=alt.Legend(orient="top"))


def zoom(name: str) -> Any:
    """Drag to move in time; shift and the wheel to zoom, for the wheel alone scrolls the page."""
    return alt.selection_interval(name=name, encodings=["x"], bind="scales", zoom="wheel![event.shiftKey]")
