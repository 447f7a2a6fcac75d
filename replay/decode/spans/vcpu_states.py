# SPDX-License-Identifier: Apache-2.0
"""The states in which a vCPU's thread spends its time, and which kinds of row show each state."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from traces.schema import BY_NAME


class VcpuState(IntEnum):
    """The state of a vCPU between two rows of its thread."""

    GUEST = 0  # kvm_entry to kvm_exit: the guest runs, and the switch there and back
    FAULT = 1  # a fault in the second-level (or shadow) tables
    LOAD = 2  # a root is found or built
    UNLOAD = 3  # root slots are emptied
    ZAP = 4  # a root's last put zaps it inline
    SMM = 5  # an SMI or RSM is emulated
    USER = 6  # userspace has the vCPU
    OTHER = 7  # any other exit
    PREFETCH = 8  # the shadow MMU fills one entry in addition to the faulting one
    IDLE = 9  # the guest has halted: the vCPU waits for an interrupt, in the kernel or in userspace
    STEAL = 10  # the thread could run and had no CPU (`sched_in`)
    PAUSED = 11  # userspace does not run the vCPU: the VM is stopped, or has ended


UNTOLD: Final = 255  # a kind of row that does not say what its thread was doing
NO_SPAN: Final = 255  # a row that ends no span of a vCPU's time
# Marks of a span.
STILL: Final = 1  # a span in the guest that ended at the RIP with which it began
BARE: Final = 2  # a STILL span in which no instruction can have completed: it is only the switch
INTERRUPT: Final = 4  # a span that ends with an exit for an interrupt of the host
_OF_KIND: Final = {
    VcpuState.FAULT: (
        "kvm_page_fault", "kvm_mmu_spte_requested", "kvm_mmu_get_page", "kvm_tdp_mmu_spte_changed",
        "kvm_mmu_set_spte", "fast_page_fault", "mark_mmio_spte", "handle_mmio_page_fault", "check_mmio_spte",
        "kvm_mmu_sync_page", "kvm_mmu_unsync_page",
    ),
    VcpuState.LOAD: ("root_get", "mmu_load", "new_pgd"),
    VcpuState.UNLOAD: (
        "mmu_unload", "mmu_free_roots", "mmu_free_obsolete_roots", "root_put", "zap_root_begin",
        "kvm_mmu_prepare_zap_page",
    ),
    VcpuState.ZAP: ("zap_root_end",),
    VcpuState.SMM: ("kvm_smm_transition",),
    VcpuState.USER: ("kvm_userspace_exit", "ioctl", "ioctl_end"),
    VcpuState.OTHER: ("kvm_exit",),
}  # fmt: skip


def states_of_kinds() -> NDArray[np.uint8]:
    """Return the VcpuState that a row of each kind code shows, or UNTOLD.

    A kvm_mmu_get_page of a root shows LOAD instead.
    """
    states = np.full(256, UNTOLD, np.uint8)
    for state, names in _OF_KIND.items():
        states[[BY_NAME[name].code for name in names]] = state
    return states
