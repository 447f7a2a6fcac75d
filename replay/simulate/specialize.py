"""Stimuli to operations: what a kernel version makes of each trigger, and of each state a role word.

Touches go through as they are; what is rewritten are the few other rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from replay import roles
from replay.causes import CAUSES, OPEN, Trigger
from replay.decode.inputs import HIDDEN, NO_STATE, STATE_SHIFT, TRIGGER, Stimuli
from replay.kernels import Kernel
from replay.simulate.operations import LAST_SHIFT, Block, Op, Word

_LAST: int = 7 << LAST_SHIFT


@dataclass(frozen=True)
class Case:
    """One end of what a trace leaves open."""

    most: bool = False  # writes of CR0 and CR4 of unknown value unload
    hidden: bool = False  # prefetched pages were needed
    # CR0.WP and EFER.NX make no roots of their own: of a kernel whose words have neither, all that it had mapped in the
    # one root is what a root built anew is given (`axes.revive`).
    merged: bool = False


class Lowering:
    """For one kernel and one case. `words` are all that its roots can have; Word index 0 is that of the usual state."""

    def __init__(self, kernel: Kernel, case: Case, ad_disabled: bool) -> None:
        self._case = case
        self._splits = kernel.eager_split
        self._tail = kernel.prefetches_tail
        self.words: list[Word]
        self.words, index = roles.words(kernel.layout, ad_disabled)
        states = np.arange(2 * roles.STATES)
        if case.merged:
            states |= roles.USUAL
        elif case.most:
            states ^= (states & roles.MAYBE_WP != 0) * roles.WP
        self._word = index[states & roles.STATES - 1]
        self._unloads = np.zeros(len(Trigger), np.bool_)
        for trigger in Trigger:
            least, most = OPEN.get(trigger, (trigger, trigger))
            meant = most if case.most else least
            self._unloads[trigger] = meant in kernel.unloads
        self._cause = np.array([int(CAUSES[trigger]) for trigger in Trigger])

    def apply(self, stimuli: Stimuli) -> Block:
        """The operations of a stretch."""
        op, gfn = stimuli.op, stimuli.gfn
        time, seq = stimuli.time, stimuli.seq
        if not self._tail:
            op = self._without_tail(op, gfn)
        if stimuli.plain and not (op & HIDDEN).any():
            return Block(op, gfn, time, seq)
        kind = op & 15
        triggers = np.flatnonzero(kind == TRIGGER)
        trigger, state = gfn[triggers] & (1 << STATE_SHIFT) - 1, gfn[triggers] >> STATE_SHIFT
        unloads, has_state = self._unloads[trigger], state != NO_STATE
        copies = np.ones(len(op), np.int64)
        copies[triggers] = unloads.astype(np.int64) + has_state
        if not self._case.hidden:
            copies[op & HIDDEN != 0] = 0
        if not self._splits:
            copies[kind == Op.SPLIT] = 0
        gfn = gfn.copy()
        loads = np.flatnonzero((kind == Op.ROLE) | (kind == Op.SWITCH))
        gfn[loads] = self._word[gfn[loads]]
        op = op & ~np.uint32(HIDDEN)
        # A trigger's first copy is the unload, if it unloads; the last one the role.
        which = op[triggers] & ~np.uint32(15)
        op[triggers] = which | np.where(unloads, int(Op.UNLOAD), int(Op.ROLE)).astype(np.uint32)
        word = self._word[np.where(has_state, state, 0)]
        gfn[triggers] = np.where(unloads, self._cause[trigger], word)
        if (copies == 1).all():
            return Block(op, gfn, time, seq)
        rows = np.repeat(np.arange(len(op)), copies)
        op, gfn = op[rows], gfn[rows]
        both = unloads & has_state
        second = np.cumsum(copies)[triggers[both]] - 1
        op[second] = which[both] | np.uint32(Op.ROLE)
        gfn[second] = word[both]
        return Block(op, gfn, time[rows], seq[rows])

    @staticmethod
    def _without_tail(op: NDArray[np.uint32], gfn: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Prefetch ends with the faulting entry."""
        touch = op & 15 == Op.TOUCH
        return np.where(touch, op & ~np.uint32(_LAST) | ((gfn & 7) << LAST_SHIFT).astype(np.uint32), op)
