# SPDX-License-Identifier: Apache-2.0
"""Small pieces of text: names from elsewhere made fit for one line of a terminal, numbers with their nouns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_SHOWN: Final = 3


def printable(text: object) -> str:
    """Return an object's text with `?` for line ends and whatever else could steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def count(number: int, what: str, several: str = "") -> str:
    """A number and its noun: `1 load`, `1,234 loads`; `several`: its plural, where that is not `what` with an s."""
    return f"{number:,} {what if number == 1 else several or what + 's'}"


def events_lost(number: int) -> str:
    """`1 event was lost`, `1,234 events were lost`."""
    return f"{count(number, 'event')} {'was' if number == 1 else 'were'} lost"


def some(lines: Sequence[object]) -> str:
    """Return the first three as text, and how many more there are."""
    more = f", and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return ", ".join(str(line) for line in lines[:_SHOWN]) + more


def vms_text(ids: Sequence[int]) -> str:
    """`VM 5`, or `VMs 1, 2, 3, and 7 more`."""
    return f"VM {ids[0]}" if len(ids) == 1 else f"VMs {some(ids)}"
