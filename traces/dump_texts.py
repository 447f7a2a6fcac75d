# SPDX-License-Identifier: Apache-2.0
"""Why a flight recorder wrote a dump, as text."""

from __future__ import annotations

from typing import Final

from traces.command_line.durations import duration
from traces.metadata import Metadata
from traces.untrusted import count_at, object_at, text_at
from traces.wall_clock import wall_text

_BY_HAND: Final = {"manual": "asked for by hand (`kvmtrace dump`)", "signal": "asked for by the signal SIGUSR2"}


def dump_texts(meta: Metadata) -> list[str]:
    """Return lines on what asked for this dump, and what else a reader must know; none for other recordings."""
    facts = object_at(meta.raw, "flight")
    if not facts:
        return []
    trigger, text = text_at(facts, "trigger"), text_at(facts, "text")
    lines = [_BY_HAND.get(trigger, f"made by the trigger {trigger}")]
    if text and trigger != "signal":
        lines[0] += f": {text}"
    at, ends = count_at(facts, "time"), count_at(facts, "ends")
    if 0 < at <= ends:
        when = wall_text(meta, at)
        lines.append(f"at {when} UTC, {duration(ends - at)} before its end" if when else
                     f"{duration(ends - at)} before its end")  # fmt: skip
    lines += [
        f"{name}: {count_at(refused, 'count'):,} times no dump before this one, for its quota was used up"
        for name, refused in object_at(facts, "refused").items()
        if isinstance(refused, dict)
    ]
    if facts.get("state_settled") is False:
        lines.append(
            "VMs or memory slots came or went while their state was read: its beginning may be in part unknown"
        )
    return lines
