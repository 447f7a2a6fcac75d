"""What a vCPU's exits and ioctls say of its roots, by the vendor's codes: what the decoder asks of each of them."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from traces.kernels.vendors import VENDORS, Vendor

CODES: Final = 1 << 11  # of exits that may mean something; SVM's largest is VMEXIT_NPF and its kin, 0x400 to 0x403


class Left(IntEnum):
    """Why a vCPU last left its guest, or what its thread asked of KVM then."""

    NEVER = 0  # it has not
    OTHER_EXIT = 1
    IO = 2
    CR0_WRITE = 3
    CR4_WRITE = 4
    MSR_WRITE = 5
    RSM = 6
    UNDEFINED = 7  # #UD, or with other exceptions on VMX: an RSM may come by it
    INVPCID = 8
    CR = 9  # one exit for all control registers: `value` says which
    MSR = 10  # one exit for reads and writes: `value` says which
    SET_SREGS = 11
    SET_CPUID = 12
    OTHER_IOCTL = 13


# KVM_EXIT_* of linux/kvm.h that say what userspace will do with the vCPU.
USER_HLT: Final = 5
USER_DEBUG, USER_SHUTDOWN, USER_SYSTEM_EVENT, USER_AP_RESET_HOLD = 4, 8, 24, 32
EINTR, EAGAIN = 4, 11


def idle_exits(vendor: Vendor) -> NDArray[np.uint8]:
    """1 for each exit code below CODES by which a guest halts. HLT's code of either vendor means nothing else."""
    idle = np.zeros(CODES, np.uint8)
    for each in VENDORS:
        idle[list(each.hlt)] = 1
    idle[list(vendor.mwait)] = 1
    return idle


def exit_meanings(vendor: Vendor) -> NDArray[np.uint8]:
    """What each exit code below CODES means; the others are OTHER_EXIT."""
    meanings = np.full(CODES, Left.OTHER_EXIT, np.uint8)
    for meaning, codes in (
        (Left.IO, vendor.io),
        (Left.CR0_WRITE, vendor.cr0_write),
        (Left.CR4_WRITE, vendor.cr4_write),
        (Left.MSR_WRITE, vendor.msr_write),
        (Left.RSM, vendor.rsm),
        (Left.UNDEFINED, vendor.undefined),
        (Left.INVPCID, vendor.invpcid),
        (Left.CR, () if vendor.cr is None else (vendor.cr,)),
        (Left.MSR, () if vendor.msr is None else (vendor.msr,)),
    ):
        meanings[list(codes)] = meaning
    return meanings
