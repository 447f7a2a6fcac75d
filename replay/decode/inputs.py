# SPDX-License-Identifier: Apache-2.0
"""Inputs: what happened to a VM independently of any root policy, in order. They are the result of decoding.

An input has the two columns of an operation (`simulate.operations`), and two additional encodings:

    op 15 (TRIGGER)  `gfn` is the Trigger, and from bit 8 on the state (`roles`) that it puts the vCPU in, or NO_STATE
    bit 14 (HIDDEN)  an access that may have been no access of the guest, but a prefetch by the recorded kernel

The `gfn` of a ROLE is a state, too, until `specialize` turns it into a role word of a certain kernel.
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

# Bits of Exits.has, which inputs an exit has: accesses, hidden accesses, entries, changes of role. The bit of a trigger
# is HAS_TRIGGER << Trigger.
HAS_TOUCH: Final = 1
HAS_HIDDEN: Final = 2
HAS_ENTER: Final = 4
HAS_ROLE: Final = 8
HAS_TRIGGER: Final = 1 << 8
# Bits of Exits.flags: the guest did next to nothing before the exit; a root was built in the exit.
WAS_STILL: Final = 1
BUILT_ROOT: Final = 2


@dataclass
class Exits:
    """Exits of vCPUs, in the order of their first inputs; times are in ns.

    `lead` is the time, of this exit and of those before it without inputs, that belongs to no input: the guest's time
    (`guest`, including the switch to it and back), the time for which the guest halted (`idle`), and exit handling that
    no policy changes. `fault`, `load` and `unload` are the times of these, and `tables` is how many tables were built.
    `first` is the number of the first of these exits in the stream.
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
    """A part of one VM's inputs. `exit` is each input's position in `exits`, or -1 if it has no vCPU or no time."""

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
    """The time of each vCPU after its last exit with an input, in ns: in all, in the guest, and halted."""

    lead: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    guest: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    idle: Ints = field(default_factory=lambda: np.zeros(0, np.int64))


EXIT_COLUMNS: Final = tuple(each.name for each in fields(Exits) if each.name != "first")
