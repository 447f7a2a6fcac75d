"""Stimuli: operations, and triggers that a kernel version turns into operations. What decoding puts out, in order.

A stimulus has the two columns of an operation (`ops`), and two marks more:

    op 15 (TRIGGER)  `gfn` is the Trigger, and from bit 8 on the state (`roles`) that it puts the vCPU in, or NO_STATE
    bit 14 (HIDDEN)  a touch that the recording kernel may have made of its own accord, by prefetch

A ROLE's `gfn` is a state, too, until a kernel makes a word of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.lookback import Ints, Rows
from replay.simulate.operations import Ranges

TRIGGER: Final = 15
HIDDEN: Final = 1 << 14
STATE_SHIFT: Final = 8
NO_STATE: Final = 255


@dataclass
class Stimuli:
    """A stretch of one VM's stimuli. `ranges` are those of this stretch alone."""

    op: NDArray[np.uint32]
    gfn: Ints
    time: Ints
    seq: Ints
    ranges: Ranges
    plain: bool  # nothing but touches, fixes and entries, none hidden: the same operations for every kernel

    def __len__(self) -> int:
        return len(self.op)


class Out:
    """Collects a batch's stimuli by row, and gives them in the order of rows; of one row, in the order put in."""

    def __init__(self) -> None:
        self._at: list[Ints] = []
        self._op: list[Ints] = []
        self._gfn: list[Ints] = []
        self._rows: list[tuple[int, int]] = []
        self.plain = True

    def add(self, at: Ints, op: Ints | int, gfn: Ints | int) -> None:
        """Stimuli at these rows."""
        if len(at):
            self._at.append(at)
            self._op.append(np.broadcast_to(np.asarray(op, np.int64), at.shape))
            self._gfn.append(np.broadcast_to(np.asarray(gfn, np.int64), at.shape))

    def ranges(self, at: Ints, op: Ints | int, start: Ints, end: Ints) -> None:
        """Operations on [start, end), at these rows."""
        if len(at):
            index = len(self._rows) + np.arange(len(at))
            self._rows += zip(start.tolist(), end.tolist(), strict=True)
            self.add(at, op, index)

    def build(self, rows: Rows) -> Stimuli:
        """All of it, in order."""
        if not self._at:
            none = np.empty(0, np.int64)
            return Stimuli(none.astype(np.uint32), none, none, none, Ranges(self._rows), True)
        at, op, gfn = self._at[0], self._op[0], self._gfn[0]
        if len(self._at) > 1:
            at, op, gfn = (np.concatenate(parts) for parts in (self._at, self._op, self._gfn))
            order = np.argsort(at, kind="stable")
            at, op, gfn = at[order], op[order], gfn[order]
        return Stimuli(
            op.astype(np.uint32), np.ascontiguousarray(gfn), rows.time[at], rows.seq[at], Ranges(self._rows), self.plain
        )
