# SPDX-License-Identifier: Apache-2.0
"""Wall-clock times of a recording's rows: boot ns to UTC by the recorder's clock samples, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from traces.errors import Problem
from traces.metadata import Metadata
from traces.text import printable
from traces.untrusted import object_at

_LAST: Final = 250_000_000_000 * 10**9  # ns since 1970: datetime ends with the year 9999
_UNITS: Final = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_RELATIVE: Final = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h|)", re.ASCII)
_OF_DAY: Final = re.compile(r"\d\d?:\d\d(:\d\d(\.\d+)?)?", re.ASCII)


def wall_ns(meta: Metadata, boot: int) -> int | None:
    """Return ns since 1970 of a boot time, by the last clock sample before it; None without any sample."""
    samples = _samples(meta)
    if not samples:
        return None
    sample = max((each for each in samples if each["boot"] <= boot), key=lambda each: each["boot"], default=samples[0])
    found: int = sample["real"] - sample["boot"] + boot
    return found if 0 < found < _LAST else None


def wall_text(meta: Metadata, boot: int) -> str:
    """Return a boot time as UTC to the ms, such as `2026-11-26 09:12:25.457`; empty where that is not known."""
    ns = wall_ns(meta, boot)
    if ns is None:
        return ""
    return (datetime.fromtimestamp(ns // 10**9, UTC) + timedelta(milliseconds=ns // 10**6 % 1000)).strftime(
        "%Y-%m-%d %H:%M:%S.%f"
    )[:-3]


def span_ns(text: str) -> int | None:
    """Return the ns of a time such as `30s`, `1.5s`, `200ms`, `2m` or `3` (seconds); None for another text."""
    match = _RELATIVE.fullmatch(text.strip())
    if match is None:
        return None
    whole, _, part = match[1].partition(".")
    unit = _UNITS[match[2]]
    return int(whole) * unit + (int(part) * unit // 10 ** len(part) if part else 0)


def moment(meta: Metadata, text: str, option: str) -> int:
    """Return the boot ns of a text: a time since the first row (`1.5s`, `200ms`, `2m`), or a wall-clock time in UTC.

    A wall-clock time is `2026-11-26T09:12:25.5` or, on the day of the recording's first row, `09:12:25`. Raises
    Problem.
    """
    first, _ = meta.span
    if (relative := span_ns(text)) is not None:
        return first + relative
    began = wall_ns(meta, first)
    asked = text.strip()
    try:
        if _OF_DAY.fullmatch(asked):
            if began is None:
                raise _no_clock(option, text)
            day = datetime.fromtimestamp(began // 10**9, UTC).strftime("%Y-%m-%d")
            asked = f"{day}T{asked.zfill(len(asked) + (asked.index(':') == 1))}"
        when = datetime.fromisoformat(asked)
    except ValueError:
        raise Problem(
            f"{option} {printable(text)}: give a time since the recording's first row, such as 1.5s or 200ms, or a "
            "wall-clock time in UTC, such as 2026-11-26T09:12:25 or 09:12:25.5"
        ) from None
    if began is None:
        raise _no_clock(option, text)
    since = (when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return first + (since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1000 - began


def _no_clock(option: str, text: str) -> Problem:
    return Problem(f"{option} {printable(text)}: the recording has no wall clock: give a time since its first row")


def _samples(meta: Metadata) -> list[Mapping[str, Any]]:
    samples = object_at(meta.raw, "clock").get("samples")
    return [
        each
        for each in (samples if isinstance(samples, list) else ())
        if isinstance(each, dict) and isinstance(each.get("real"), int) and isinstance(each.get("boot"), int)
    ]
