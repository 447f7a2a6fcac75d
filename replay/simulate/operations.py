# SPDX-License-Identifier: Apache-2.0
"""The operations that a replay consists of: what happened to a VM independently of any root policy.

Both implementations of the model (`reference`, `engine`) read this stream and nothing else. It has two columns and one
row per operation: `op` (uint32, packed as below) and `gfn` (int64, a guest frame or the operation's argument). `Op`
says what each operation means; `replay.decode` turns a trace into operations.

    bits  0-3  operation (Op)
    bits  4-6  level of the leaf (TOUCH, FIX, COLLAPSE), address space (ZAP, SPLIT)
    bits  7-9  first, bits 10-12 last entry of the aligned group of 8 that lie in the accessed page's memslot
               (what the shadow MMU may prefetch)
    bit     7  of COLLAPSE: FOR_GOOD
    bit    13  RESETS: the exit of a fault here unloads the roots, as every exit of this VM does
    bits 16-31 vCPU, numbered densely within the VM
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from traces.kernels.roles import Word as Word
from traces.kernels.triggers import Trigger


class Op(IntEnum):
    """The kinds of operation. `v` is the vCPU of bits 16-31, and `gfn` the second column."""

    TOUCH = 0  # v needs a leaf of `level` at `gfn` (aligned to it): a fault unless a leaf covers it
    FIX = 1  # permission fault of v: if a leaf of `level` is there (or a larger one, which is then split), a fix is
    # counted; else an ordinary fault
    ENTER = 2  # v is about to enter the guest: pending requests, then a load if its current slot is empty
    UNLOAD = 3  # v empties all its root slots; `gfn` is the Cause
    ROLE = 4  # v's next load is of the word with index `gfn`
    SWITCH = 5  # v switches to the word with index `gfn` by kvm_mmu_new_pgd, which keeps the previous roots in slots
    INVALIDATE = 6  # kvm_mmu_zap_all_fast: every root of the VM becomes obsolete
    ZAP = 7  # leaves in ranges[gfn] of one address space are removed from every root
    ZAP_ALL = 8  # every root is emptied and stays (exit of the VM's process)
    SPLIT = 9  # huge leaves in ranges[gfn] of one address space become tables (dirty logging begins)
    COLLAPSE = 10  # the table below the entry of `level` at `gfn` is removed, as when dirty logging ends. FOR_GOOD: no
    # huge leaf replaces it at once (NX huge page recovery: a later fault maps it). The vCPU bits are the address space
    END = 11  # the VM is destroyed


class Cause(IntEnum):
    """Why a vCPU's slots were emptied, or why a root was built or freed."""

    FIRST = 0  # a vCPU's first load
    SMI = 1
    RSM = 2
    CR0_WP = 3
    CR0 = 4
    CR4 = 5
    EFER = 6
    SREGS = 7  # KVM_SET_SREGS, KVM_SET_SREGS2 and other ioctls that set vCPU state
    CPUID = 8
    EXIT = 9  # an exit that resets the MMU context, on a kernel or VM where every exit does
    MEMSLOT = 10  # kvm_mmu_zap_all_fast: slot deleted or moved, nx_huge_pages written
    VM_END = 11
    OTHER = 12
    POLICY = 13  # a policy gave up an idle root


CAUSES: Final = {
    Trigger.SMI: Cause.SMI,
    Trigger.RSM: Cause.RSM,
    Trigger.CR0_WP: Cause.CR0_WP,
    Trigger.CR0: Cause.CR0,
    Trigger.CR4: Cause.CR4,
    Trigger.CR4_PGE: Cause.CR4,
    Trigger.CR4_PCIDE: Cause.CR4,
    Trigger.EFER: Cause.EFER,
    Trigger.SREGS: Cause.SREGS,
    Trigger.CPUID: Cause.CPUID,
    Trigger.INVPCID: Cause.OTHER,
    Trigger.EXIT: Cause.EXIT,
    Trigger.OTHER: Cause.OTHER,
    Trigger.CR0_SILENT: Cause.CR0_WP,
    Trigger.CR4_SILENT: Cause.CR4,
    Trigger.CR0_RESET: Cause.CR0,
    Trigger.CR4_RESET: Cause.CR4,
    Trigger.UNSEEN: Cause.OTHER,
}

LEVEL_SHIFT: Final = 4
FIRST_SHIFT: Final = 7
LAST_SHIFT: Final = 10
FOR_GOOD: Final = 1 << 7
RESETS: Final = 1 << 13
VCPU_SHIFT: Final = 16
MAX_VCPUS: Final = 1 << 16
PREFETCH: Final = 8


def pack(op: Op, vcpu: int = 0, level: int = 0, first: int = 0, last: int = 0, resets: bool = False) -> int:
    """Return the first column of an operation."""
    return (
        int(op)
        | level << LEVEL_SHIFT
        | first << FIRST_SHIFT
        | last << LAST_SHIFT
        | (RESETS if resets else 0)
        | vcpu << VCPU_SHIFT
    )


@dataclass
class Block:
    """A part of one VM's operations.

    `time` (ns) and `seq` (trace row) are for reports: the model itself does not read them.
    """

    op: NDArray[np.uint32]
    gfn: NDArray[np.int64]
    time: NDArray[np.int64]
    seq: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.op)


@dataclass
class Ranges:
    """The ranges [start, end) of gfns that ZAP and SPLIT refer to by their index in this list."""

    rows: list[tuple[int, int]] = field(default_factory=list)

    def add(self, start: int, end: int) -> int:
        """Return the index of a range. It is added at the end unless it equals the last one."""
        if not self.rows or self.rows[-1] != (start, end):
            self.rows.append((start, end))
        return len(self.rows) - 1
