# SPDX-License-Identifier: Apache-2.0
"""Operations with the time that each took: the input of virtual time.

A timed block is a `Block` with further columns, one value per operation:

    queue  the queue that the operation is in: vCPU v's own program (v), what the wall clock does to vCPU v (vcpus + v)
           or to the VM (2 * vcpus). Operations of one queue stay in order; queues move relative to each other.
    lead   ns from the end of the queue's previous operation to the exit of this one; no policy changes it
    guest  the part of `lead` in which the guest ran, including the switch to it and back
    idle   the part of `lead` in which the guest had halted
    cost   ns that this operation took as recorded
    was    the recorded outcome: of a TOUCH 1 + tables built (0: it was no fault); of an ENTER 1 if it found a root and
           2 if it created one; of an UNLOAD 1 if it unloaded anything
    wall   in a wall-clock queue, when the operation is due (ns since the VM's first entry). MORE continues the action
           that is under way (the inside of an SMI) and LAST ends it. In a program it is always MORE

An action of a vCPU's wall-clock queue has at least two operations; in the VM's queue each operation stands alone.

`until` makes the result independent of the size of blocks: no wall-clock operation of a later block is due before it
(MORE is due with the action that it continues), so that programs may run up to there. Without wall-clock queues it is
NEVER.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.simulate.operations import VCPU_SHIFT, Block, Op

Ints = NDArray[np.int64]
FOUND = 1
CREATED = 2
MORE = -1
LAST = -2
NEVER = 1 << 62


@dataclass
class Timed:
    """A part of one VM's timed operations."""

    block: Block
    queue: NDArray[np.int32]
    lead: Ints
    guest: Ints
    idle: Ints
    cost: Ints
    was: NDArray[np.uint8]
    wall: Ints
    until: int = NEVER

    def __len__(self) -> int:
        return len(self.block)


# The names of its columns besides those of the block.
TIMED_COLUMNS: Final = tuple(each.name for each in fields(Timed) if each.name not in ("block", "until"))


def tail(lead: Ints, guest: Ints, idle: Ints) -> Timed:
    """Return the time of each vCPU after its last operation, as one timed operation per vCPU that does nothing."""
    count = len(lead)
    none = np.zeros(count, np.int64)
    op = (int(Op.ROLE) | np.arange(count) << VCPU_SHIFT).astype(np.uint32)
    block = Block(op, none, none, none)
    return Timed(block, np.arange(count, dtype=np.int32), lead, guest, idle, none, none.astype(np.uint8), none + MORE)


def take(timed: Timed, at: Ints) -> Timed:
    """Return the operations at the positions `at`, in that order."""
    block = Block(*(getattr(timed.block, each.name)[at] for each in fields(Block)))
    return replace(timed, block=block, **{name: getattr(timed, name)[at] for name in TIMED_COLUMNS})


def joined(parts: list[Timed]) -> Timed:
    """Return the parts joined into one, after which nothing follows."""
    block = Block(*(np.concatenate([getattr(each.block, field.name) for each in parts]) for field in fields(Block)))
    columns: dict[str, Any] = {name: np.concatenate([getattr(each, name) for each in parts]) for name in TIMED_COLUMNS}
    return Timed(block, **columns)
