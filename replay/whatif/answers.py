# SPDX-License-Identifier: Apache-2.0
"""A design question as it is asked on the command line, and the form of its answer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

from traces.command_line.durations import duration
from traces.errors import Problem

VCPUS: Final = (1, 2, 4, 8, 16, 32, 64)
VARIANTS: Final = {
    "aging": ("locked", "lockless"),
    "zap_lock": ("read", "write"),
    "apicv": ("memslot", "gfn"),
    "tdp_pages": ("list", "counter"),
}
MOST_PAGES: Final = 1 << 36  # the most pages of one call: 256 TiB
_RATES: Final = {"aging": 100_000.0, "zap_lock": 1_000.0}  # calls a second, unless the trace or the user gives them


@dataclass(frozen=True)
class Asked:
    """One design question (`axis`) with the variants to compare.

    `rate` is the number of calls a second, and None means as recorded; `pages` is the number of pages of a call.
    """

    axis: str
    variants: tuple[str, ...]
    rate: float | None = None
    pages: int | None = None

    @property
    def option(self) -> str:
        """The name of the option on the command line."""
        return f"--{self.axis.replace('_', '-')}"

    @property
    def text(self) -> str:
        """The value of the option as it is written on the command line."""
        rate = "" if self.rate is None else f"@{self.rate:.15g}"
        return f"{','.join(self.variants)}{rate}{'' if self.pages is None else f'x{self.pages}'}"

    @property
    def default_rate(self) -> float:
        """The calls a second that are assumed if neither the trace nor the user gives them."""
        return _RATES[self.axis]


@dataclass
class Answer:
    """The answer to one design question for one VM.

    `rows` are the figures in ns and counts; `table` is the same for people, as (headers, cells).
    """

    axis: str
    own: str  # the variant of the recorded kernel
    rows: list[dict[str, Any]]
    table: tuple[list[str], list[list[str]]]
    notes: list[str] = field(default_factory=list)  # the assumptions, and what the column "arithmetic" means


def parse(axis: str, text: str) -> Asked:
    """Parse an option: `locked`, `locked,lockless`, `lockless@20000x512` (20,000 calls a second of 512 pages each).

    Raises Problem if it is invalid.
    """
    known = VARIANTS[axis]
    rated = axis in _RATES
    match = re.fullmatch(r"([a-z,]+)(?:@(\d+(?:\.\d+)?)(?:x(\d+))?)?", text)
    names = tuple(dict.fromkeys(match[1].split(","))) if match else ()
    bad = match is None or not set(names) <= set(known) or (match[2] is not None and not rated)
    if (
        match is None
        or bad
        or (match[2] and not 0 < float(match[2]) <= 1e9)
        or (match[3] and not 0 < int(match[3]) <= MOST_PAGES)
    ):
        example = f", such as {known[0]}@20000x1 for 20,000 a second of 1 page each" if rated else ""
        raise Problem(f"--{axis.replace('_', '-')} {text}: give {known[0]}, {known[1]} or {','.join(known)}{example}")
    rate = float(match[2]) if match[2] else None
    return Asked(axis, names, rate, int(match[3]) if match[3] else None)


def spread(low: float, middle: float, high: float) -> str:
    """Return a duration as text, followed by its bounds if costs that are uncertain make a difference."""
    if low == middle == high:
        return duration(middle)
    return f"{duration(middle)} ({duration(min(low, middle, high))} .. {duration(max(low, middle, high))})"
