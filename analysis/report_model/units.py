# SPDX-License-Identifier: Apache-2.0
"""How values are shown: the text of every number is made here, so that it is the same in every format."""

from __future__ import annotations

from enum import Enum
from typing import Any, Final

from traces.command_line.durations import duration
from traces.text import printable

NONE: Final = "-"  # not known, or not applicable; never 0
_SPAN: Final = " .. "


class Unit(Enum):
    """The unit of a column's values."""

    TEXT = "text"
    ID = "id"  # a number that names something
    COUNT = "count"
    NS = "ns"
    LONG = "long ns"  # summed over many recordings: in minutes or hours where it is long
    BOOT = "boot ns"  # CLOCK_BOOTTIME, shown in seconds as dmesg and trace_pipe do
    SHARE = "share"  # of 1
    RATIO = "ratio"
    FACTOR = "factor"  # a number that need not be whole
    BYTES = "bytes"
    HEX = "hex"
    FLAG = "flag"


def format_value(value: Any, unit: Unit, *, signed: bool = False) -> str:
    """Return a value as every format shows it; `-` for null. `signed`: with a plus sign if it is positive."""
    if value is None:
        return NONE
    if signed and value > 0:
        return "+" + format_value(value, unit)
    match unit:
        case Unit.COUNT:
            return f"{value:,}"
        case Unit.NS:
            return duration(int(value))
        case Unit.LONG:
            return long_duration(int(value))
        case Unit.BOOT:
            return f"{value / 1e9:.6f}"
        case Unit.SHARE:
            return share(float(value))
        case Unit.RATIO:
            return f"{value:,.2f}x" if value >= 1 or not value else f"{value:.3g}x"
        case Unit.FACTOR:
            return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        case Unit.BYTES:
            return size(int(value))
        case Unit.FLAG:
            return "yes" if value else "no"
        case Unit.HEX:
            return f"{value:#x}"
        case _:
            return printable(value)


def span(low: Any, high: Any, unit: Unit, *, signed: bool = False) -> str:
    """Return an interval as text, or one value if both ends read the same; a null end makes it `or more`, `or less`."""
    if high is None and low is not None:
        return f"{format_value(low, unit, signed=signed)} or more"
    if low is None and high is not None:
        return f"{format_value(high, unit, signed=signed)} or less"
    least, most = format_value(low, unit, signed=signed), format_value(high, unit, signed=signed)
    return least if least == most else least + _SPAN + most


def long_duration(ns: int) -> str:
    """Return a duration of a minute or more in minutes or hours with three digits, others as usual."""
    if ns < 0:
        return f"-{long_duration(-ns)}"
    for unit, one in (("h", 3600 * 10**9), ("min", 60 * 10**9)):
        if ns >= one:
            value = float(f"{ns / one:.3g}")
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return duration(ns)


def size(count: int) -> str:
    """Return a number of bytes in the binary unit that fits."""
    for unit, one in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= one:
            return f"{count / one:,.1f} {unit}" if count % one else f"{count // one:,} {unit}"
    return f"{count} B"


def share(part: float) -> str:
    """Return a share in percent; one that is not exactly 0 or 1 never reads 0 % or 100 %."""
    percent = part * 100
    if 0 < percent < 0.1:
        return "<0.1 %"
    if 99.9 < percent < 100:
        return ">99.9 %"
    return f"{percent:.1f} %" if 0 < percent < 100 else f"{percent:.0f} %"
