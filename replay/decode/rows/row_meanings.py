# SPDX-License-Identifier: Apache-2.0
"""What a row of each kind means to the decoder, as a small number."""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from traces.schema import BY_NAME


class Meaning(IntEnum):
    """The meaning of a row. From CHANGED on, rows are about the VM as a whole."""

    NOTHING = 0
    EXIT = 1
    ENTRY = 2
    FAULT = 3
    REQUESTED = 4
    SET = 5
    MARK = 6
    FAST = 7
    GET_PAGE = 8
    ROOT_GET = 9
    MMU_LOAD = 10
    RESET = 11
    UNLOAD = 12
    SMM_MOVE = 13
    CR = 14
    MSR = 15
    IOCTL = 16
    NEW_PGD = 17
    SPLIT_HUGE = 18
    USER_EXIT = 19
    CHANGED = 20
    IOCTL_END = 21
    INVALIDATE = 22
    ZAP_LEAFS = 23
    UNMAP = 24
    ZAP_ALL = 25
    MEMSLOT = 26
    DESTROY = 27
    NESTED = 28
    TABLE_FREE = 29
    ZAP_ROOT = 30
    ZAP_ROOT_END = 31


_OF_KIND: Final = {
    "kvm_exit": Meaning.EXIT,
    "kvm_entry": Meaning.ENTRY,
    "kvm_page_fault": Meaning.FAULT,
    "kvm_mmu_spte_requested": Meaning.REQUESTED,
    "kvm_mmu_set_spte": Meaning.SET,
    "mark_mmio_spte": Meaning.MARK,
    "fast_page_fault": Meaning.FAST,
    "kvm_mmu_get_page": Meaning.GET_PAGE,
    "root_get": Meaning.ROOT_GET,
    "mmu_load": Meaning.MMU_LOAD,
    "mmu_reset": Meaning.RESET,
    "mmu_unload": Meaning.UNLOAD,
    "kvm_smm_transition": Meaning.SMM_MOVE,
    "kvm_cr": Meaning.CR,
    "kvm_msr": Meaning.MSR,
    "ioctl": Meaning.IOCTL,
    "new_pgd": Meaning.NEW_PGD,
    "kvm_mmu_split_huge_page": Meaning.SPLIT_HUGE,
    "kvm_userspace_exit": Meaning.USER_EXIT,
    "kvm_tdp_mmu_spte_changed": Meaning.CHANGED,
    "ioctl_end": Meaning.IOCTL_END,
    "kvm_mmu_zap_all_fast": Meaning.INVALIDATE,
    "zap_leafs": Meaning.ZAP_LEAFS,
    "kvm_unmap_hva_range": Meaning.UNMAP,
    "zap_all": Meaning.ZAP_ALL,
    "memslot": Meaning.MEMSLOT,
    "vm_destroy": Meaning.DESTROY,
    "kvm_nested_vmenter": Meaning.NESTED,
    "table_free": Meaning.TABLE_FREE,
    "zap_root_begin": Meaning.ZAP_ROOT,
    "zap_root_end": Meaning.ZAP_ROOT_END,
}


@cache
def meanings_by_kind() -> NDArray[np.uint8]:
    """Return the meaning by kind code; the array is shared."""
    means = np.zeros(256, np.uint8)
    for kind, meaning in _OF_KIND.items():
        means[BY_NAME[kind].code] = meaning
    means.flags.writeable = False
    return means
