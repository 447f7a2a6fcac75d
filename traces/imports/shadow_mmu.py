# SPDX-License-Identifier: Apache-2.0
"""Whether the rows of an import are the shadow MMU's: kvm.tdp_mmu may be off, and was by default before 5.14."""

from __future__ import annotations

from traces.imports.row_spool import RowSpool
from traces.kernels import Kernel
from traces.schema import BY_NAME

_SET, _CHANGED, _GET_PAGE = (
    BY_NAME[name].code for name in ("kvm_mmu_set_spte", "kvm_tdp_mmu_spte_changed", "kvm_mmu_get_page")
)


def shows_shadow_mmu(kernel: Kernel, spool: RowSpool) -> bool:
    """By the events of both MMUs, of which one system has all: kvmmmu.

    The TDP MMU shows every SPTE that it changes (from 5.12 on); before that, tables with the level of the table above,
    so that none is of level 1.
    """
    if not spool.kinds[_SET] or not spool.kinds[_GET_PAGE]:
        return False
    return not spool.kinds[_CHANGED] if kernel.spte_changed else bool(spool.lowest_tables)
