# SPDX-License-Identifier: Apache-2.0
"""The state of the reference model: roots, vCPUs with their root slots, counts, and the log of roots' lives.

The engine counts and logs the same, and raises the same `Violation`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from replay.simulate.operations import Cause
from replay.simulate.page_table import Table

CURRENT = 0
SLOTS = 4  # one current root, three previous ones


class Happened(IntEnum):
    """The kinds of event in the root log."""

    CREATED = 0
    FOUND = 1
    FREED = 2
    INVALIDATED = 3
    EMPTIED = 4


@dataclass(eq=False)
class Root:
    """A top-level table: `refs` is the kernel's reference count, `valid` is True until the root is invalidated."""

    id: int
    word: int  # index into the VM's words
    top: Table
    refs: int
    valid: bool = True
    leaves: int = 0
    tables: int = 0
    cause: Cause = Cause.OTHER  # why the root was invalidated, once it was
    remembered: bool = False  # under `assume_refault`: the root was freed, and its tree kept to know what was mapped
    idle_since: int = 0  # when the last reference was dropped, in ns; for policies
    linked: set[Table] = field(default_factory=set)  # every table below `top`: what the kernel counts (tdp_mmu_pages)
    stale: int = 0  # removed leaves that a vCPU's TLB may still hold: a flush is due before mmu_lock is dropped


@dataclass
class Vcpu:
    """A vCPU with its root slots, its role word and its counts.

    `request` says that an invalidation is yet to be served.
    """

    index: int
    slots: list[Root | None] = field(default_factory=lambda: [None] * SLOTS)
    word: int = 0
    cause: Cause = Cause.FIRST  # why it unloaded last
    request: bool = False
    stuck: int = -1  # the operation at which the vCPU can make no more progress; -1: none
    loads: int = 0
    creations: int = 0
    reuses: int = 0
    faults: int = 0
    refaults: int = 0
    hits: int = 0
    fixes: int = 0


@dataclass
class Counters:
    """The counts of a VM that are not kept by vCPU.

    `zapped` counts leaf SPTEs. `tables` and `tables_freed` do not include roots. `flushes` includes the flush of each
    load, but not the flush of the single range that a fault replaces.
    """

    frees: int = 0
    prefetched: int = 0
    tables: int = 0
    tables_freed: int = 0
    zapped: int = 0
    flushes: int = 0


@dataclass(frozen=True)
class Logged:
    """One event in a root's life as the log keeps it; `leaves` and `tables` are those of the root at that moment."""

    at: int  # position of the operation in the stream
    event: Happened
    vcpu: int  # dense number; -1: no vCPU acted
    root: int
    word: int
    cause: Cause
    leaves: int
    tables: int
    roots_alive: int
    tables_alive: int


class Violation(Exception):
    """An invariant is broken, so the trace, the model or a user's own policy is wrong.

    The invariants are about references (docs/kvm-mmu.md, "Invariants"), about tables (each is linked once, and unlinked
    once before its root is freed) and about TLBs (what is removed from a root that a vCPU holds is flushed before
    mmu_lock is dropped). `at` is the operation's position, and `root` the id of the root concerned (None: it concerns
    the VM).
    """

    def __init__(self, what: str, at: int, root: int | None = None) -> None:
        super().__init__(what)
        self.at = at
        self.root = root
