# SPDX-License-Identifier: Apache-2.0
"""Inputs: what happened to a VM that no root policy decides, in order; what decoding puts out.

An input has the two columns of an operation (`simulate.operations`), and two marks more:

    op 15 (TRIGGER)  `gfn` is the Trigger, and from bit 8 on the state (`roles`) that it puts the vCPU in, or NO_STATE
    bit 14 (HIDDEN)  an access that the recording kernel may have made of its own accord, by prefetch

A ROLE's `gfn` is a state, too, until a kernel makes a role word of it (`specialize`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from replay.simulate.operations import Ranges

Ints = NDArray[np.int64]
TRIGGER: Final = 15
HIDDEN: Final = 1 << 14
STATE_SHIFT: Final = 8
NO_STATE: Final = 255

# What inputs an exit has, in Exits.has: accesses, hidden ones, entries, changes of role; and HAS_TRIGGER << Trigger.
HAS_TOUCH: Final = 1
HAS_HIDDEN: Final = 2
HAS_ENTER: Final = 4
HAS_ROLE: Final = 8
HAS_TRIGGER: Final = 1 << 8
# Exits.flags: the guest before it did next to nothing; it built a root.
WAS_STILL: Final = 1
BUILT_ROOT: Final = 2


@dataclass
class Exits:
    """Exits of vCPUs, in the order of their first inputs; times are ns.

    `lead` is what no input owns, of this exit and of those before it that have no input: the guest's time (`guest`,
    the switch there and back included), the time that it halted (`idle`), and what no policy changes. `fault`, `load`
    and `unload` are what these took; `tables` were built. `first` is the number of the first of them in the stream.
    """

    lead: Ints
    guest: Ints
    idle: Ints
    fault: Ints
    load: Ints
    unload: Ints
    tables: NDArray[np.uint8]  # 255: that many or more
    has: NDArray[np.uint32]
    flags: NDArray[np.uint8]
    first: int = 0

    def __len__(self) -> int:
        return len(self.lead)


@dataclass
class Inputs:
    """A part of one VM's inputs. `exit` is each one's place in `exits`, -1 for what is no vCPU's or has no time."""

    op: NDArray[np.uint32]
    gfn: Ints
    time: Ints
    seq: Ints
    exit: NDArray[np.int32]
    ranges: Ranges
    exits: Exits

    def __len__(self) -> int:
        return len(self.op)


@dataclass
class Rest:
    """What each vCPU still did after its last exit that has an input: ns, and ns of them in the guest, and halted."""

    lead: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    guest: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    idle: Ints = field(default_factory=lambda: np.zeros(0, np.int64))


EXIT_COLUMNS: Final = tuple(each.name for each in fields(Exits) if each.name != "first")
