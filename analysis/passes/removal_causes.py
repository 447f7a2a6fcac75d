# SPDX-License-Identifier: Apache-2.0
"""The causes by which a VM's pages are removed or protected, and which of them an exit can be."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from replay.decode.exits import Left, exit_meanings
from traces.kernels import triggers


class Why(IntEnum):
    """The cause by which a page was removed or protected; the first three occur for faults only."""

    FIRST = 0  # the page had not been mapped under this role word
    UNSEEN = 1  # no row shows that it was removed
    UNWRITABLE = 2  # its leaf had never had the permission
    SMI = 3
    RSM = 4
    CR0 = 5
    CR4 = 6
    EFER = 7
    SREGS = 8
    CPUID = 9
    EXIT = 10
    MEMSLOT = 11
    INVALIDATION = 12
    NOTIFIER = 13
    NOTIFIER_CHANGE = 14
    AGING = 15
    GET_DIRTY_LOG = 16
    CLEAR_DIRTY_LOG = 17
    DIRTY_RING = 18
    DIRTY_LOG_BEGINS = 19
    DIRTY_LOG_ENDS = 20
    NX_RECOVERY = 21
    SPLIT = 22
    APICV = 23
    RANGE = 24
    IOCTL = 25
    VM_END = 26
    OTHER = 27


# What a thread does in an ioctl, by the number bits of its command; variants of an ioctl differ in the other bits.
# Those for memslots (MEMSLOT) begin nothing: each memslot that changes has a row of its own.
IOCTLS = np.full(256, Why.IOCTL, np.uint8)
IOCTLS[0x42] = Why.GET_DIRTY_LOG
IOCTLS[0xC0] = Why.CLEAR_DIRTY_LOG
IOCTLS[0xC7] = Why.DIRTY_RING
IOCTLS[[0x46, 0x49]] = Why.MEMSLOT
IOCTLS[[ioctl & 0xFF for ioctl in triggers.SET_SREGS]] = Why.SREGS
IOCTLS[triggers.SET_CPUID2 & 0xFF] = Why.CPUID


def causes_of(kernel: Any) -> Any:
    """Return by exit code, for all VMs of a trace, the cause if a vCPU loses a root after such an exit."""
    whys = {Left.CR0_WRITE: Why.CR0, Left.CR4_WRITE: Why.CR4, Left.RSM: Why.RSM}
    return np.array([whys.get(Left(each), Why.EXIT) for each in exit_meanings(kernel.vendor)], np.uint8)
