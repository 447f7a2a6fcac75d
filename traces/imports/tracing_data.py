# SPDX-License-Identifier: Apache-2.0
"""What trace.dat and perf.data both carry of the traced kernel: the formats of its events, and names of tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from traces.errors import Problem
from traces.imports.source_bytes import Damaged, SourceCursor

MAGIC: Final = b"\x17\x08Dtracing"
_MOST: Final = 1 << 16  # events of one system, systems

Formats = list[tuple[str, str]]


def check_machine(endian: int, long_size: int) -> None:
    """Raise a Problem for a machine of another kind than x86-64."""
    if endian or long_size != 8:
        raise Problem("it is of a machine that is no x86-64")


def from_perf(data: bytes) -> Formats:
    """The formats in perf's block, which begins as a trace.dat does."""
    cursor = SourceCursor(data, "the formats of its events")
    if cursor.take(len(MAGIC)) != MAGIC:
        raise Damaged("the formats of its events do not begin as such")
    cursor.string()  # the version
    check_machine(*cursor.take(2))
    cursor.take(4)
    return read_formats(cursor)


def read_formats(cursor: SourceCursor) -> Formats:
    """Headers of pages, ftrace's own events, then every system's: (system, text of the format)."""
    for name in ("header_page", "header_event"):
        if cursor.string() != name:
            raise Damaged(f"{name} is not where it should be")
        cursor.take(cursor.numbers("Q")[0])
    read_ftrace(cursor)
    return read_systems(cursor)


def read_ftrace(cursor: SourceCursor) -> None:
    """ftrace's own events: functions and the like, none of KVM."""
    for _ in range(_few(cursor.numbers("I")[0])):
        cursor.take(cursor.numbers("Q")[0])


def read_systems(cursor: SourceCursor) -> Formats:
    """Systems with their events' formats."""
    formats: Formats = []
    for _ in range(_few(cursor.numbers("I")[0])):
        system = cursor.string()
        for _ in range(_few(cursor.numbers("I")[0])):
            formats.append((system, cursor.take(cursor.numbers("Q")[0]).decode(errors="replace")))
    return formats


def skip_symbols(take: Callable[[str], int], skip: Callable[[int], object]) -> None:
    """Addresses of functions and of texts: each with its size before it."""
    for _ in range(2):
        skip(take("I"))


def read_comms(text: bytes) -> dict[int, bytes]:
    """Names of tasks: `123 name`, a line each."""
    comms = {}
    for line in text.split(b"\n"):
        tid, blank, name = line.partition(b" ")
        if blank and tid.isdigit() and len(tid) < 10:
            comms[int(tid)] = name[:64]
    return comms


def _few(count: int) -> int:
    if count > _MOST:
        raise Damaged(f"{count:,} events, or systems of them, are more than there can be")
    return count
