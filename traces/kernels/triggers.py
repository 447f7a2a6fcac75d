# SPDX-License-Identifier: Apache-2.0
"""Triggers: what makes a vCPU give up its roots, as a recording shows it and before a kernel version decides.

Which triggers unload roots is a property of the kernel (`Kernel.unloads`), and so is which of them change the role
word.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Trigger(IntEnum):
    """Why roots may be unloaded. The last five are not determined by recordings: see `OPEN`."""

    SMI = 0
    RSM = 1
    CR0_WP = 2  # CR0.WP alone
    CR0 = 3  # CR0.PG
    CR4 = 4  # a role bit: PSE, PAE, LA57, SMEP, SMAP, PKE
    CR4_PGE = 5
    CR4_PCIDE = 6  # 1 to 0
    EFER = 7
    SREGS = 8
    CPUID = 9
    INVPCID = 10  # of all contexts
    EXIT = 11  # a reset between exit and entry that nothing recorded explains
    OTHER = 12
    CR0_SILENT = 13  # CR0 was written, its value not recorded, and nothing was reset: CR0.WP, or nothing
    CR4_SILENT = 14  # the same for CR4: PGE or PCIDE, or nothing
    CR0_RESET = 15  # CR0 was written, its value not recorded, and it was reset where WP alone does: WP, or PG
    CR4_RESET = 16  # the same for CR4: PGE, or a role bit
    UNSEEN = 17  # where resets are not recorded: userspace had the vCPU, or a register was written: a reset, or nothing


# A trigger that a recording leaves undetermined -> what it is if least is unloaded (None: nothing), and if most is.
OPEN: Final[dict[Trigger, tuple[Trigger | None, Trigger]]] = {
    Trigger.CR0_SILENT: (None, Trigger.CR0_WP),
    Trigger.CR4_SILENT: (None, Trigger.CR4_PGE),
    Trigger.CR0_RESET: (Trigger.CR0_WP, Trigger.CR0),
    Trigger.CR4_RESET: (Trigger.CR4_PGE, Trigger.CR4),
    Trigger.UNSEEN: (None, Trigger.OTHER),
}
# Every kernel unloads for these.
ALWAYS: Final = frozenset({
    Trigger.SMI,
    Trigger.RSM,
    Trigger.CR0,
    Trigger.CR4,
    Trigger.EFER,
    Trigger.SREGS,
    Trigger.CPUID,
    Trigger.EXIT,
    Trigger.OTHER,
})  # fmt: skip

# Bits of the control registers.
CR0_WP: Final = 1 << 16
CR0_PG: Final = 1 << 31
CR4_PGE: Final = 1 << 7
CR4_PCIDE: Final = 1 << 17
CR4_ROLE: Final = 1 << 4 | 1 << 5 | 1 << 12 | 1 << 20 | 1 << 21 | 1 << 22  # PSE PAE LA57 SMEP SMAP PKE
EFER_MSR: Final = 0xC0000080
EFER_NX: Final = 1 << 11
EFER_ROLE: Final = 1 << 8 | 1 << 11  # LME NX

# ioctls, type and number.
SET_SREGS: Final = (0xAE84, 0xAECD)
SET_CPUID2: Final = 0xAE90
