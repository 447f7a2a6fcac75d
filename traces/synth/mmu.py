# SPDX-License-Identifier: Apache-2.0
"""KVM's answer to a guest's steps: which accesses fault, which tables are missing, which roots are made, by the policy.

A root's *life* is counted within a batch of steps: life 0 is the root that was there when the batch began. Only the
async policy ends lives within a batch, and only for a VM of one vCPU: another vCPU's slot would keep the root.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from traces.kernels import at
from traces.kernels.spte import LARGE
from traces.lives import Flags, Ints
from traces.synth.guest import EXIT, SMI, SMRAM_GFN, TOUCH, WP, Steps
from traces.synth.parameters import Parameters

LEVEL: Final = 4
_KERNEL: Final = at("6.1")
_LAYOUT, _SPTE = _KERNEL.layout, _KERNEL.spte
ROLE: Final = LEVEL | _LAYOUT.constant | _LAYOUT.nx | _LAYOUT.wp
SMM_ROLE: Final = ROLE | _LAYOUT.smm
INVALID: Final = _LAYOUT.invalid
ALL_ROOTS: Final = 0xFFFFFFFFFFFFFFFF

# SPTEs under NPT: present, writable, user, accessed; a leaf is dirty, too.
_LINK: Final = _SPTE.present | 0x27
_LEAF: Final = _SPTE.present | _SPTE.host_writable[0] | _SPTE.mmu_writable[0] | 0x67
_SPREAD: Final = 0x9E3779B97F4A7C15


def link(frame: Ints) -> Ints:
    """Return the SPTE that points to the table in this frame."""
    return (frame << 12) | _LINK


class Frames:
    """Page frames for tables, handed out in a ring so long that a frame is free again before its next turn."""

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count, self._used = first, count, 0

    def at(self, offset: Ints) -> Ints:
        """Return the frames of the next allocations, by their number from now on."""
        return self._first + (self._used + offset) % self._count

    def used(self, count: int) -> None:
        self._used += count


@dataclass
class Tables:
    """Child tables of roots, each with the `job` (a number for its root), its level, first gfn and frame."""

    job: Ints
    level: Ints
    gfn: Ints
    frame: Ints


@dataclass
class Leaves:
    """Leaf SPTEs of roots: `job` as in Tables, level, first gfn, SPTE."""

    job: Ints
    level: Ints
    gfn: Ints
    spte: Ints


class HostPages:
    """Where the host keeps a guest's pages: 2 MiB regions in a row, 4 KiB pages shuffled within theirs."""

    def __init__(self, first: int, huge: Flags) -> None:
        self.huge = huge
        self._first = first

    def pfn(self, gfn: Ints) -> Ints:
        region = gfn >> 9
        mask = ((region.astype(np.uint64) * np.uint64(_SPREAD)) >> np.uint64(55)).astype(np.int64)
        return self._first + (gfn ^ np.where(self.huge[region], 0, mask))

    def leaf_gfn(self, gfn: Ints) -> Ints:
        """Return the first gfn under the leaf that maps `gfn`."""
        return np.where(self.huge[gfn >> 9], gfn >> 9 << 9, gfn)

    def leaf(self, gfn: Ints) -> Ints:
        """Return the leaf SPTE for `gfn`."""
        huge = self.huge[gfn >> 9]
        return (self.pfn(np.where(huge, gfn >> 9 << 9, gfn)) << 12) | _LEAF | np.where(huge, LARGE, 0)


class Tree:
    """The normal root that is loaded, and what it maps."""

    def __init__(self, regions: int) -> None:
        self.root = 0
        self.mapped = np.zeros(regions << 9, np.bool_)  # by first gfn of a leaf
        self.frames = {
            1: np.zeros(regions, np.int64),
            2: np.zeros((regions >> 9) + 1, np.int64),
            3: np.zeros(1, np.int64),
        }

    def clear(self) -> None:
        self.mapped[:] = False
        for frames in self.frames.values():
            frames[:] = 0

    def tables(self) -> Tables:
        """Return its tables, as those of job 0."""
        parts = [(level, np.flatnonzero(frames)) for level, frames in self.frames.items()]
        level = np.concatenate([np.full(len(at), level) for level, at in parts])
        gfn = np.concatenate([at << (9 * level) for level, at in parts])
        frame = np.concatenate([self.frames[level][at] for level, at in parts])
        return Tables(np.zeros(len(level), np.int64), level, gfn, frame)

    def leaves(self, host: HostPages) -> Leaves:
        gfn = np.flatnonzero(self.mapped)
        return Leaves(np.zeros(len(gfn), np.int64), 1 + host.huge[gfn >> 9].astype(np.int64), gfn, host.leaf(gfn))


@dataclass
class Faults:
    """The accesses that fault: their step, life, gfn; the frame of each level's table, and where that is new."""

    step: Ints
    life: Ints
    gfn: Ints
    huge: Flags
    frames: dict[int, Ints]
    new: dict[int, Flags]


@dataclass
class Resolution:
    """What becomes of a batch of steps; nothing of the MMU has changed before `Mmu.commit`."""

    steps: Steps
    faults: Faults
    life: Ints  # the number of the root's life before each step
    ends: Flags  # steps that end that life and make the next
    roots: Ints  # the root's frame in each life
    smi: Ints  # steps that are SMIs
    smm_cold: Flags  # of each SMI: whether the SMM root is made, so that its page faults
    smm_frames: Ints  # of each SMI: frames of the SMM root and its tables of levels 3, 2 and 1 (huge pages: not 1)
    allocated: int
    smm_allocated: int = field(default=0)


class Mmu:
    """One VM's roots under a policy, advanced batch by batch."""

    def __init__(self, parameters: Parameters, host: HostPages, first_frame: int) -> None:
        self.preserve = parameters.policy == "preserve"
        self.vcpus = parameters.vcpus
        self.reset_on = parameters.reset_on
        self.host = host
        self.tree = Tree(len(host.huge))
        self.smm = np.empty(0, np.int64)  # the live SMM root and its tables, from the top; only under preserve
        self.smm_tables = 2 if parameters.page_size == "2m" else 3
        ring = frames_needed(parameters) // 2
        self.frames, self.smm_ring = Frames(first_frame, ring), Frames(first_frame + ring, ring)

    @property
    def refs(self) -> int:
        """References on the normal root while every vCPU has it loaded."""
        return self.vcpus + self.preserve

    def create_root(self) -> int:
        """Make a new normal root, in place of one that is gone, and return its frame."""
        self.tree.clear()
        self.tree.root = int(self.frames.at(np.zeros(1, np.int64))[0])
        self.frames.used(1)
        return self.tree.root

    def resolve(self, steps: Steps) -> Resolution:
        mortal = not self.preserve and self.vcpus == 1
        resets = (steps.op == SMI) | (steps.op == WP) | ((steps.op == EXIT) & (self.reset_on is not None))
        if self.reset_on == "exit":  # then each fault's exit, too, ends a root that nothing but its vCPU holds
            resets |= steps.op == TOUCH
        ends = resets if mortal else np.zeros(len(steps), np.bool_)
        life = np.cumsum(ends) - ends
        faults, tables = self._faults(steps, life)
        taken = np.cumsum(tables + ends) - (tables + ends)
        roots = np.append(self.tree.root, self.frames.at((taken + tables)[ends]))
        for level in (1, 2, 3):
            self._place(faults, level, taken)
        smi = np.flatnonzero(steps.op == SMI)
        cold = np.full(len(smi), not self.preserve)
        if self.preserve and not len(self.smm):
            cold[:1] = True
        size = 1 + self.smm_tables
        first = (np.cumsum(cold) - 1)[:, None] * size + np.arange(size)
        smm_frames = self.smm_ring.at(first)
        if self.preserve and len(self.smm):
            smm_frames = np.tile(self.smm, (len(smi), 1))
        total = int(tables.sum() + ends.sum())
        return Resolution(
            steps, faults, life, ends, roots, smi, cold, smm_frames, total, int(np.count_nonzero(cold)) * size
        )

    def _faults(self, steps: Steps, life: Ints) -> tuple[Faults, Ints]:
        """Return the faults, whose frames are still to be placed, and the number of tables that each step makes."""
        touch = np.flatnonzero(steps.op == TOUCH)
        leaf = self.host.leaf_gfn(steps.gfn[touch])
        unmapped = (life[touch] > 0) | ~self.tree.mapped[leaf]
        touch, leaf = touch[unmapped], leaf[unmapped]
        _, first = np.unique(life[touch] * len(self.tree.mapped) + leaf, return_index=True)
        step = touch[np.sort(first)]
        gfn = steps.gfn[step]
        faults = Faults(step, life[step], gfn, self.host.huge[gfn >> 9], {}, {})
        tables = np.zeros(len(steps), np.int64)
        for level in (1, 2, 3):
            faults.new[level] = self._lacks(faults, level)
            tables[step] += faults.new[level]
        return faults, tables

    def _lacks(self, faults: Faults, level: int) -> Flags:
        """Return which faults are the first of their life under a table of this level that does not exist yet."""
        place = faults.gfn >> (9 * level)
        lacks = np.zeros(len(place), np.bool_)
        lacks[np.unique((faults.life << 40) | place, return_index=True)[1]] = True
        if level == 1:  # a huge leaf needs none; a region's leaves are all huge or none of them is
            lacks &= ~faults.huge
        lacks &= (faults.life > 0) | (self.tree.frames[level][place] == 0)
        return lacks

    def _place(self, faults: Faults, level: int, taken: Ints) -> None:
        """Give each fault the frame of its table of this level: tables are allocated from the top down."""
        above = sum(faults.new[upper].astype(np.int64) for upper in range(level + 1, 4))
        place = faults.gfn >> (9 * level)
        own = self.frames.at(taken[faults.step] + above)
        _, first, group = np.unique((faults.life << 40) | place, return_index=True, return_inverse=True)
        known = self.tree.frames[level][place]
        makes = np.where(faults.new[level], own, np.where(faults.life == 0, known, 0))
        faults.frames[level] = makes[first][group]

    def commit(self, done: Resolution) -> None:
        last = len(done.roots) - 1
        if last:
            self.tree.clear()
            self.tree.root = int(done.roots[-1])
        faults = done.faults
        of_last = faults.life == last
        self.tree.mapped[self.host.leaf_gfn(faults.gfn[of_last])] = True
        for level, frames in self.tree.frames.items():
            new = of_last & faults.new[level]
            frames[faults.gfn[new] >> (9 * level)] = faults.frames[level][new]
        self.frames.used(done.allocated)
        self.smm_ring.used(done.smm_allocated)
        if self.preserve and done.smm_cold.any():
            self.smm = done.smm_frames[0]

    def smm_tree(self, frames: Ints) -> tuple[Tables, Leaves]:
        """Return tables and the leaf of SMM roots, whose frames (root first) are the rows of `frames`."""
        count = len(frames)
        job = np.arange(count)
        levels = np.arange(LEVEL - 1, LEVEL - 1 - self.smm_tables, -1)
        tables = Tables(
            np.repeat(job, len(levels)), np.tile(levels, count), np.zeros(count * len(levels), np.int64),
            frames[:, 1:].ravel(),
        )  # fmt: skip
        gfn = self.host.leaf_gfn(np.full(count, SMRAM_GFN))
        return tables, Leaves(job, np.full(count, LEVEL - self.smm_tables), gfn, self.host.leaf(gfn))


def frames_needed(parameters: Parameters) -> int:
    """Return how many frames a VM's tables take: two rings of four times what a root can use, and some thousand."""
    regions = (parameters.memory >> 21) + 2
    return 2 * (4 * (regions + (regions >> 9) + 8) + 4096)
