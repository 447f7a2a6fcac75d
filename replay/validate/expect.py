# SPDX-License-Identifier: Apache-2.0
"""What the model expects a thread to show next, and whether a recorded row fits that."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

from replay.validate.row_tuples import RowTuple
from traces.kernels import Kernel
from traces.kernels.spte import pfn


@dataclass(frozen=True)
class Spte:
    """An SPTE as the model knows it, with a predicate that compares it with a recorded word."""

    what: str
    fits: Callable[[int], bool]

    def __repr__(self) -> str:
        return self.what


def word(what: str, wanted: int | None) -> Spte:
    """Return an SPTE that is exactly `wanted`: a word of the kernel's own, for an absent or a frozen entry."""
    return Spte(what, lambda got: got == wanted)


def to_table(frame: int, kernel: Kernel) -> Spte:
    """Return an SPTE that points to the table in page frame `frame`."""
    return Spte(f"table {frame:#x}", lambda got: kernel.spte.is_present(got) and pfn(got) == frame)


def to_page(frame: int, kernel: Kernel) -> Spte:
    """Return an SPTE that is a leaf and maps page frame `frame`."""
    return Spte(f"leaf of page {frame:#x}", lambda got: kernel.spte.is_present(got) and pfn(got) == frame)


def leaf(spte: int, kernel: Kernel) -> Spte:
    """Return an SPTE equal to `spte` except for the accessed and dirty bits, which the processor sets by itself."""
    own = kernel.vendor.accessed | kernel.vendor.dirty
    return Spte(f"leaf {spte:#x}", lambda got: (spte ^ got) & ~own == 0)


def any_mmio(kernel: Kernel) -> Spte:
    """Return an SPTE that is an MMIO SPTE: not present and not empty."""
    return Spte("MMIO", lambda got: got != 0 and not kernel.spte.is_present(got))


@dataclass(frozen=True)
class Expect:
    """The expected next row of a thread: its kind, and by column the value or Spte that it must have.

    If `optional`, the row may be missing and the activity continues. If `may_stop`, the activity may end before the
    row.
    """

    kind: str
    want: dict[str, Any] = field(default_factory=dict)
    optional: bool = False
    may_stop: bool = False
    agrees: Callable[[RowTuple], bool] | None = None  # a further condition on the row as a whole

    def misfit(self, row: RowTuple) -> str:
        """Return why a row is not the expected one; empty if it is."""
        if row.kind != self.kind:
            return f"{self.kind} expected, {row.kind} recorded"
        for column, wanted in self.want.items():
            got = getattr(row, column)
            if column == "root" and got == 0:
                continue  # the recorder did not know the root
            if not (wanted.fits(got) if isinstance(wanted, Spte) else wanted == got):
                return f"{column} {_text(wanted, column)} expected, {_text(got, column)} recorded"
        return "" if self.agrees is None or self.agrees(row) else "columns that contradict each other recorded"

    def __str__(self) -> str:
        return " ".join([self.kind, *(f"{column}={_text(w, column)}" for column, w in self.want.items())])


# An activity of one thread, as a generator: it yields the row that it expects, is sent the row that fitted, changes the
# model, and yields None to wait for the thread's next row, so that it then sees what other threads changed meanwhile.
Activity = Generator[Expect | None, RowTuple | None, None]
# An activity that returns whether it did anything.
Attempt = Generator[Expect | None, RowTuple | None, bool]


def perhaps(activity: Activity) -> Attempt:
    """Run an activity if the thread's next row is the first that it expects, else skip it.

    Return which of the two happened.
    """
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
