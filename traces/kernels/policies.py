# SPDX-License-Identifier: Apache-2.0
"""Root policies: what happens to a root that no vCPU uses, and the parameters by which a simulator replays one.

A policy is what is chosen: `mmu`, `own_reference`, `teardown`. The other parameters are habits that a kernel version
has, whatever its policy; `Kernel.parameters` puts both together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal


@dataclass(frozen=True)
class PolicyParameters:
    """One root policy on one kernel. The defaults are those of 6.9 and later."""

    name: str
    mmu: Literal["tdp", "shadow"] = "tdp"
    # True: the VM itself holds one reference on each valid root, so that only invalidation ends it (edbdb43fc96b, 6.4).
    own_reference: bool = True
    # Who zaps a root that dies: its last putter with mmu_lock held, a worker, or the task that invalidated it.
    teardown: Literal["inline", "worker", "invalidator"] = "invalidator"
    # kvm_mmu_zap_all_fast marks roots invalid, or empties them and leaves them valid (5.10).
    zap_all_fast: Literal["invalidate", "empty"] = "invalidate"
    # What a vCPU gives up after it: slots with invalid roots (5.18, KVM_REQ_MMU_FREE_OBSOLETE_ROOTS), or all of them.
    request: Literal["obsolete", "reload"] = "obsolete"
    # A removed table is flushed from remote TLBs one by one (to 5.17).
    flush_per_table: bool = False
    # A range zap removes tables that lie entirely in the range, not leaves only (to 5.17).
    zap_tables: bool = False
    # A small fault below a huge leaf splits it in place (6.3), or zaps it.
    split_in_place: bool = True
    # When dirty logging ends, a huge leaf takes the place of a table (6.13: 13e2e4f62a4b), or nothing does.
    recovers: bool = False
    # Entries of an aligned group that a fault fills when host memory is there; 1: just its own. Shadow MMU only.
    prefetch: int = 1
    # Loads and unloads take mmu_lock for read (6.9), or for write. Only virtual time depends on it.
    loads_share: bool = True
    # Faults take mmu_lock for read (TDP from 5.12 on: a2855afc7ee8), or one at a time (5.10's spinlock, shadow MMU).
    # Only virtual time depends on it.
    faults_share: bool = True
    # An assumption, not a policy: the guest accesses again at once all that the recorded kernel still had mapped.
    assume_refault: bool = False


PRESERVE: Final = PolicyParameters("preserve")
PRESERVE_WORKER: Final = PolicyParameters("preserve-worker", teardown="worker", loads_share=False)
ASYNC: Final = PolicyParameters(
    "async", own_reference=False, teardown="worker", split_in_place=False, loads_share=False
)
SYNC_RW: Final = PolicyParameters(
    "sync",
    own_reference=False,
    teardown="inline",
    request="reload",
    flush_per_table=True,
    zap_tables=True,
    split_in_place=False,
    loads_share=False,
)
"""`sync` as 5.12 to 5.17 have it."""
SYNC: Final = replace(SYNC_RW, zap_all_fast="empty", faults_share=False)
"""`sync` as 5.10 has it."""
SHADOW: Final = PolicyParameters(
    "shadow", mmu="shadow", split_in_place=False, prefetch=8, loads_share=False, faults_share=False
)

POLICIES: Final = {policy.name: policy for policy in (SYNC, ASYNC, PRESERVE_WORKER, PRESERVE, SHADOW)}
"""Every policy that a kernel had, by its name, with the habits of the first kernel that had it."""

MEANINGS: Final = {
    "sync": "the last put frees the root at once; the vCPU that unloads zaps its tables",
    "async": "the last put marks the root invalid; a worker zaps and frees it later",
    "preserve-worker": "roots stay until a memslot change or the VM's end; a worker zaps them",
    "preserve": "roots stay until a memslot change or the VM's end; the task that did it zaps",
    "shadow": "no TDP MMU: pages stay in a hash, unused roots among them",
}

# Names that traces made before format 1.1 have.
_FORMER: Final = {"preserve-inline": "preserve"}


def current_name(name: str) -> str:
    """Return a recorded policy's name as it is called today."""
    return _FORMER.get(name, name)
