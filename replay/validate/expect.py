# SPDX-License-Identifier: Apache-2.0
"""What the model expects a thread to show next, and whether what it showed fits."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

from replay.validate.row_tuples import RowTuple
from traces.kernels import Kernel
from traces.kernels.spte import pfn


@dataclass(frozen=True)
class Spte:
    """An SPTE as the model knows it, to compare with a recorded word."""

    what: str
    fits: Callable[[int], bool]

    def __repr__(self) -> str:
        return self.what


def word(what: str, wanted: int | None) -> Spte:
    """One of the kernel's own words: for an entry that maps nothing, or one whose table is being removed."""
    return Spte(what, lambda got: got == wanted)


def to_table(frame: int, kernel: Kernel) -> Spte:
    """A pointer to the table in page frame `frame`."""
    return Spte(f"table {frame:#x}", lambda got: kernel.spte.is_present(got) and pfn(got) == frame)


def to_page(frame: int, kernel: Kernel) -> Spte:
    """A leaf that maps page frame `frame`."""
    return Spte(f"leaf of page {frame:#x}", lambda got: kernel.spte.is_present(got) and pfn(got) == frame)


def leaf(spte: int, kernel: Kernel) -> Spte:
    """The very leaf installed before, but for the accessed and dirty bits, which the processor sets by itself."""
    own = kernel.vendor.accessed | kernel.vendor.dirty
    return Spte(f"leaf {spte:#x}", lambda got: (spte ^ got) & ~own == 0)


def any_mmio(kernel: Kernel) -> Spte:
    """An MMIO SPTE: not present, not empty."""
    return Spte("MMIO", lambda got: got != 0 and not kernel.spte.is_present(got))


@dataclass(frozen=True)
class Expect:
    """The next row of a thread: its kind, and by column what it must hold (a value, or an Spte).

    `optional`: what follows may come without it. `may_stop`: the activity may end before it.
    """

    kind: str
    want: dict[str, Any] = field(default_factory=dict)
    optional: bool = False
    may_stop: bool = False
    agrees: Callable[[RowTuple], bool] | None = None  # what must hold between the row's own columns

    def misfit(self, row: RowTuple) -> str:
        """Why a row is not the expected one; empty if it is."""
        if row.kind != self.kind:
            return f"{self.kind} expected, {row.kind} recorded"
        for column, wanted in self.want.items():
            got = getattr(row, column)
            if column == "root" and got == 0:
                continue  # the recorder could not tell the root
            if not (wanted.fits(got) if isinstance(wanted, Spte) else wanted == got):
                return f"{column} {_text(wanted, column)} expected, {_text(got, column)} recorded"
        return "" if self.agrees is None or self.agrees(row) else "columns that contradict each other recorded"

    def __str__(self) -> str:
        return " ".join([self.kind, *(f"{column}={_text(w, column)}" for column, w in self.want.items())])


# An activity of one thread: it yields what it expects, is sent the row that fitted, changes the model, and yields None
# to wait for the thread's next row, so that other threads' changes in between are seen.
Activity = Generator[Expect | None, RowTuple | None, None]
# One that tells those who go on from it whether it did anything.
Attempt = Generator[Expect | None, RowTuple | None, bool]


def perhaps(activity: Activity) -> Attempt:
    """What an activity does, or nothing at all: its first row decides."""
    first = next(activity, None)
    if first is None:
        return False
    row = yield replace(first, optional=True)
    if row is None:
        activity.close()
        return False
    try:
        wanted = activity.send(row)
        while True:
            row = yield wanted
            wanted = activity.send(row)
    except StopIteration:
        return True


def _text(value: Any, column: str) -> str:
    if isinstance(value, int) and column in ("old", "new", "role", "table", "addr", "code", "value"):
        return f"{value:#x}"
    return repr(value) if isinstance(value, Spte) else str(value)
