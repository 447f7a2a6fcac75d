# SPDX-License-Identifier: Apache-2.0
"""A root's tree of second-level tables as plain objects, used by the reference model and by `validate`.

Levels are KVM's: 1 maps 4 KiB, 2 maps 2 MiB, 3 maps 1 GiB; a root table is of level 4 or 5. An entry of a table holds
another table, a leaf (its SPTE word, never 0), or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

ENTRIES: Final = 512
_BITS: Final = 9


def span(level: int) -> int:
    """Return the number of guest frames that one entry of a table of `level` covers."""
    return 1 << _BITS * (level - 1)


def index(gfn: int, level: int) -> int:
    """Return the index of the entry that covers `gfn` in a table of `level`."""
    return gfn >> _BITS * (level - 1) & ENTRIES - 1


class Table:
    """One page of SPTEs.

    `gfn` is the first guest frame that it covers, and `entries` has the present entries by index.
    """

    __slots__ = ("entries", "frame", "gfn", "level")

    def __init__(self, level: int, gfn: int, frame: int = 0) -> None:
        self.level = level
        self.gfn = gfn & -(span(level) * ENTRIES)
        self.frame = frame
        self.entries: dict[int, Table | int] = {}

    def gfn_of(self, at: int) -> int:
        """Return the first guest frame that entry `at` covers."""
        return self.gfn + at * span(self.level)


def walk(top: Table, gfn: int, goal: int) -> Table:
    """Return the lowest existing table on the way from `top` down to the entry of level `goal` for `gfn`."""
    table = top
    while table.level > goal:
        below = table.entries.get(index(gfn, table.level))
        if not isinstance(below, Table):
            break
        table = below
    return table


def leaf(top: Table, gfn: int) -> tuple[Table, int] | None:
    """Return the table and the index of the leaf, of any level, that covers `gfn`, or None if nothing maps it."""
    table = walk(top, gfn, 1)
    at = index(gfn, table.level)
    return (table, at) if isinstance(table.entries.get(at), int) else None


def count(table: Table) -> tuple[int, int]:
    """Return the numbers of (leaves, tables) below a table, which itself is not counted."""
    leaves = tables = 0
    for entry in table.entries.values():
        if isinstance(entry, Table):
            below = count(entry)
            leaves += below[0]
            tables += below[1] + 1
        else:
            leaves += 1
    return leaves, tables


def tables(table: Table) -> Iterator[Table]:
    """Yield every table below a table, without the table itself."""
    if table.level > 1:
        for entry in table.entries.values():
            if isinstance(entry, Table):
                yield entry
                yield from tables(entry)


def within(table: Table, start: int, end: int) -> Iterator[tuple[Table, int]]:
    """Yield (table, index) of each entry that overlaps [start, end), parents before children, in order of gfn.

    The entry that was yielded last may be removed before the iteration continues; its subtree is then not entered.
    """
    first = max(0, (start - table.gfn) // span(table.level))
    last = min(ENTRIES - 1, (end - 1 - table.gfn) // span(table.level))
    if last - first < len(table.entries):
        present = [at for at in range(first, last + 1) if at in table.entries]
    else:
        present = sorted(at for at in table.entries if first <= at <= last)
    for at in present:
        yield table, at
        below = table.entries.get(at)
        if isinstance(below, Table):
            yield from within(below, start, end)
