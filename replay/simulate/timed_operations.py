# SPDX-License-Identifier: Apache-2.0
"""Operations with the time they took: what virtual time reads.

A timed block is a `Block` with six more columns, one value an operation:

    queue  whose turn it is: vCPU v's own program (v), what the wall clock does to vCPU v (vcpus + v), or to the VM
           (2 * vcpus). Operations of one queue stay in order; queues move against each other.
    lead   ns from the end of the queue's previous operation to the exit of this one; no policy changes it
    guest  how much of `lead` the guest ran, the switch to it and back included
    idle   how much of `lead` the guest had halted
    cost   ns that this operation took as recorded
    was    its outcome as recorded: of a TOUCH 1 + tables built (0: it was no fault), of an ENTER 1 found,
           2 created, of an UNLOAD 1 if it was one

In a wall-clock queue `wall` is when it is due (ns since the VM's first entry); MORE continues what is under way
there (an SMI's inside), LAST ends it. In a program `wall` is MORE. What is due takes at least two operations, but of
those that are due to the VM each stands alone.

`until` makes the result independent of the size of blocks: what the wall clock does in later blocks is due then at the
earliest (MORE is due with what it continues), so that programs may run up to there. With no wall-clock queues it is
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


_COLUMNS: Final = tuple(each.name for each in fields(Timed) if each.name not in ("block", "until"))


def tail(lead: Ints, guest: Ints, idle: Ints) -> Timed:
    """What each vCPU still did behind its last operation, as an operation that does nothing."""
    count = len(lead)
    none = np.zeros(count, np.int64)
    op = (int(Op.ROLE) | np.arange(count) << VCPU_SHIFT).astype(np.uint32)
    block = Block(op, none, none, none)
    return Timed(block, np.arange(count, dtype=np.int32), lead, guest, idle, none, none.astype(np.uint8), none + MORE)


def take(timed: Timed, at: Ints) -> Timed:
    """Some operations, in the order of `at`."""
    block = Block(*(getattr(timed.block, each.name)[at] for each in fields(Block)))
    return replace(timed, block=block, **{name: getattr(timed, name)[at] for name in _COLUMNS})


def joined(parts: list[Timed]) -> Timed:
    """Parts joined into one, after which nothing follows."""
    block = Block(*(np.concatenate([getattr(each.block, field.name) for each in parts]) for field in fields(Block)))
    columns: dict[str, Any] = {name: np.concatenate([getattr(each, name) for each in parts]) for name in _COLUMNS}
    return Timed(block, **columns)
