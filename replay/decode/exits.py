# SPDX-License-Identifier: Apache-2.0
"""What the vendor's exit codes and KVM's ioctls mean for a vCPU's roots."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from traces.kernels.vendors import VENDORS, Vendor

CODES: Final = 1 << 11  # exit codes from here on have no meaning for roots; SVM's largest are 0x400 (NPF) to 0x403


class Left(IntEnum):
    """Why a vCPU last left its guest, or the ioctl that its thread made after that."""

    NEVER = 0  # the vCPU has not left the guest yet
    OTHER_EXIT = 1
    IO = 2
    CR0_WRITE = 3
    CR4_WRITE = 4
    MSR_WRITE = 5
    RSM = 6
    UNDEFINED = 7  # #UD (on VMX any exception): KVM may emulate an RSM for it
    INVPCID = 8
    CR = 9  # the exit for all control registers; `value` says which register
    MSR = 10  # the exit for both reads and writes; `value` says which
    SET_SREGS = 11
    SET_CPUID = 12
    OTHER_IOCTL = 13


# The names of KVM_EXIT_* in linux/kvm.h by number, without those of other architectures.
_USER_EXITS: Final = {
    0: "UNKNOWN", 1: "EXCEPTION", 2: "IO", 3: "HYPERCALL", 4: "DEBUG", 5: "HLT", 6: "MMIO", 7: "IRQ_WINDOW_OPEN",
    8: "SHUTDOWN", 9: "FAIL_ENTRY", 10: "INTR", 11: "SET_TPR", 12: "TPR_ACCESS", 16: "NMI", 17: "INTERNAL_ERROR",
    21: "WATCHDOG", 24: "SYSTEM_EVENT", 26: "IOAPIC_EOI", 27: "HYPERV", 29: "X86_RDMSR", 30: "X86_WRMSR",
    31: "DIRTY_RING_FULL", 32: "AP_RESET_HOLD", 33: "X86_BUS_LOCK", 34: "XEN", 37: "NOTIFY", 39: "MEMORY_FAULT",
    40: "TDX",
}  # fmt: skip
USER_DEBUG, USER_HLT, USER_MMIO, USER_SHUTDOWN, USER_FAIL_ENTRY = 4, 5, 6, 8, 9
USER_INTERNAL_ERROR, USER_SYSTEM_EVENT, USER_AP_RESET_HOLD, USER_MEMORY_FAULT = 17, 24, 32, 39
EINTR, EAGAIN = 4, 11


def user_exit_name(reason: int) -> str:
    """Return the name KVM_EXIT_* for the reason in a kvm_userspace_exit."""
    return f"KVM_EXIT_{_USER_EXITS.get(reason, reason)}"


def idle_exits(vendor: Vendor) -> NDArray[np.uint8]:
    """Return an array of CODES values: 1 for each exit code by which a guest halts, else 0.

    The HLT codes of both vendors are included, since neither means anything else for the other vendor.
    """
    idle = np.zeros(CODES, np.uint8)
    for each in VENDORS:
        idle[list(each.hlt)] = 1
    idle[list(vendor.mwait)] = 1
    return idle


def exit_meanings(vendor: Vendor) -> NDArray[np.uint8]:
    """Return the meaning (`Left`) of each exit code below CODES; codes without one are OTHER_EXIT."""
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
