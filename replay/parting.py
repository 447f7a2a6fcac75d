# SPDX-License-Identifier: Apache-2.0
"""Find the trace row from which a replay and the recorded rows differ, by decoding the recording once more.

Both sides are counted row by row. A count *parts* at the first row after which the two sides never again agree, or
never again lie within the allowed difference. Before that row they may differ for a while: the kernel is then in the
middle of an action, and one side counts it earlier than the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.decode.batch import Batch
from replay.decode.capabilities import Capabilities
from replay.decode.cases import Case
from replay.decode.row_counts import RowCount, RowCounts
from replay.decode.specialize import Specialization
from replay.decode.vm_inputs import VmInputs
from replay.simulate.engine import CHANGES, Engine
from replay.simulate.model_state import Violation
from replay.simulate.operations import Block

_ALL: Final = 1 << 62


@dataclass(frozen=True)
class Apart:
    """A count that differs between replay and rows.

    `parts` are the columns of `engine.CHANGES` that add up to it; `least` and `most` say how much more than the rows
    the replay may count and still agree, where `most` None means without limit.
    """

    of: RowCount
    parts: tuple[str, ...]
    least: int
    most: int | None


def first_rows(
    capabilities: Capabilities, vm: Mapping[str, Any], apart: list[Apart]
) -> dict[RowCount, tuple[int, int]]:
    """Return by count the trace row (seq) and its time (boot clock, ns) from which the replay and the rows differ."""
    counter = _Counter(capabilities, vm)
    inputs = VmInputs(capabilities, vm, groups=capabilities.own.prefetch > 1, row_counts=counter)
    vcpus = max(len(inputs.vcpus), 1)
    specialized = Specialization(capabilities.kernel, Case(), capabilities.ad_disabled, vcpus)
    engine = Engine(capabilities.own, specialized.words, vcpus, log=False)
    walks = [_Walk(each) for each in apart]
    done = 0
    with contextlib.suppress(Violation):  # the model cannot continue: report where it differed until then
        for part in inputs:
            block = specialized.block(part)
            changes = engine.feed_each(block, part.ranges, done)
            done += len(block)
            log = counter.until(int(block.seq[-1]))
            for walk in walks:
                walk.go(log, block, changes)
    log = counter.until(_ALL)
    for walk in walks:
        walk.go(log)
    return {walk.apart.of: walk.place for walk in walks if walk.place is not None}


class _Counter:
    """Counts rows as `RowCounts` does, and keeps which row counted what until `until` takes it."""

    def __init__(self, capabilities: Capabilities, vm: Mapping[str, Any]) -> None:
        self._counts = RowCounts(capabilities, len(vm["vcpus"]), log=True)
        self._log: NDArray[np.int64] = np.zeros((0, 4), np.int64)

    def feed(self, batch: Batch) -> None:
        """Count the rows of a batch."""
        self._counts.feed(batch)
        self._log = np.concatenate([self._log, self._counts.log])

    def finish(self) -> None:
        """Count what is still pending after the last row."""
        self._counts.finish()
        self._log = np.concatenate([self._log, self._counts.log])

    def until(self, seq: int) -> NDArray[np.int64]:
        """Take the counted steps up to a trace row, as rows of (seq, time, RowCount, step)."""
        held = int(np.searchsorted(self._log[:, 0], seq, "right"))
        log, self._log = self._log[:held], self._log[held:]
        return log


class _Walk:
    """Follows the difference of one count along the rows. `place` is where it has parted, or None while it has not."""

    def __init__(self, apart: Apart) -> None:
        self.apart = apart
        self.place: tuple[int, int] | None = None
        self._columns = [CHANGES.index(part) for part in apart.parts]
        self._ahead = 0  # by how much the replay has counted more than the rows so far

    def go(self, log: NDArray[np.int64], block: Block | None = None, changes: NDArray[np.int64] | None = None) -> None:
        """Take in the next counted rows, and the next block of operations with what each of them changed."""
        log = log[log[:, 2] == self.apart.of]
        steps = [(log[:, 0], log[:, 1], -log[:, 3])]
        if block is not None and changes is not None:
            added = changes[:, self._columns].sum(axis=1)
            steps.append((block.seq[added != 0], block.time[added != 0], added[added != 0]))
        seq, time, step = (np.concatenate(column) for column in zip(*steps, strict=True))
        if not len(seq):
            return
        order = np.argsort(seq, kind="stable")
        seq, time, ahead = seq[order], time[order], self._ahead + np.cumsum(step[order])
        self._ahead = int(ahead[-1])
        within = ahead >= self.apart.least
        if self.apart.most is not None:
            within &= ahead <= self.apart.most
        within[:-1] &= seq[:-1] != seq[1:]  # compare only after everything that belongs to one row is counted
        agreed = np.flatnonzero(within)
        after = int(agreed[-1]) + 1 if len(agreed) else 0
        if len(agreed):
            self.place = None
        if self.place is None and after < len(seq):
            self.place = int(seq[after]), int(time[after])
