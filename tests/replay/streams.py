# SPDX-License-Identifier: Apache-2.0
"""Streams of operations for tests: few frames, at the borders of tables, so that operations meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from replay.simulate.operations import Block, Cause, Op, Ranges, Word, pack
from traces.kernels.policies import PolicyParameters

# Around the borders of tables of each level, groups of 8 and words of 64 bits; the last ones need level 5.
_NEAR = [0, 1, 7, 8, 9, 63, 64, 511, 512, 513, 1023, 1024, (1 << 18) - 1, 1 << 18, (1 << 18) + 512, 1 << 19]
FRAMES = [*_NEAR, (1 << 27) - 1, 1 << 27, (1 << 27) + 513, (1 << 36) - 1, 1 << 36, (1 << 36) + 8, (1 << 40) - 1]
# SPLIT of a 1 GiB leaf is 262,144 leaves, which is slow in the reference: it has a test of its own.
BOUNDS = [*_NEAR[:13], 1 << 27, (1 << 27) + 512, (1 << 27) + 1024, 1 << 36, (1 << 36) + 512, 1 << 40, 1 << 52]
WORDS = [Word(0x10), Word(0x11), Word(0x1010, as_id=1), Word(0x20, level=5), Word(0x1020, level=5, as_id=1)]
_KINDS = [Op.TOUCH] * 24 + [Op.FIX] * 3 + [Op.ENTER] * 3 + [Op.UNLOAD] * 4 + [Op.ROLE] * 4 + [Op.SWITCH] * 4
_KINDS += [Op.INVALIDATE] * 2 + [Op.ZAP] * 3 + [Op.SPLIT] * 2 + [Op.COLLAPSE] * 2 + [Op.ZAP_ALL, Op.END]
_LEVELS = [1] * 6 + [2] * 3 + [3]


@dataclass(repr=False)
class Stream:
    """A VM's stream, whole."""

    parameters: PolicyParameters
    words: list[Word]
    vcpus: int
    block: Block
    ranges: Ranges

    def __repr__(self) -> str:
        rows = list(zip(self.block.op.tolist(), self.block.gfn.tolist(), strict=True))
        return f"Stream({self.parameters}, {self.words}, {self.vcpus}, block_of({rows}), {self.ranges})"

    def cut(self, start: int, end: int) -> Block:
        block = self.block
        return Block(block.op[start:end], block.gfn[start:end], block.time[start:end], block.seq[start:end])


def block_of(rows: list[tuple[int, int]]) -> Block:
    """A block of (op, gfn)."""
    number = np.arange(len(rows), dtype=np.int64)
    op = np.array([op for op, _ in rows], np.uint32)
    return Block(op, np.array([gfn for _, gfn in rows], np.int64), 10 * number, number)


def parameters() -> st.SearchStrategy[PolicyParameters]:
    """Every point that the built-in policy has, named by kernels or not."""
    return st.builds(
        PolicyParameters,
        name=st.just("drawn"),
        own_reference=st.booleans(),
        zap_all_fast=st.sampled_from(["invalidate", "empty"]),
        request=st.sampled_from(["obsolete", "reload"]),
        flush_per_table=st.booleans(),
        zap_tables=st.booleans(),
        split_in_place=st.booleans(),
        prefetch=st.sampled_from([1, 8]),
        assume_refault=st.booleans(),
        recovers=st.booleans(),
    )


def _operation(choose: Any, vcpus: int, words: int, ranges: int, few: int) -> tuple[int, int]:
    """One operation; `choose(n)` is a number below n."""
    kind = _KINDS[choose(len(_KINDS))]
    vcpu = choose(vcpus)
    level = _LEVELS[choose(len(_LEVELS))]
    gfn = FRAMES[choose(few)]
    if kind in (Op.TOUCH, Op.FIX):
        return pack(kind, vcpu, level, choose(8), choose(8), choose(12) == 1), gfn
    if kind == Op.UNLOAD:
        return pack(kind, vcpu), choose(len(Cause))
    if kind in (Op.ROLE, Op.SWITCH):
        return pack(kind, vcpu), choose(words)
    if kind in (Op.ZAP, Op.SPLIT):
        return pack(kind, level=choose(2)), choose(ranges)
    if kind == Op.COLLAPSE:
        return pack(kind, vcpu=choose(2), level=1 + level % 3), gfn
    return pack(kind, vcpu if kind == Op.ENTER else 0), 0


@st.composite
def streams(draw: st.DrawFn, longest: int = 60) -> Stream:
    """Short streams, drawn one by one so that a failure shrinks; or, as often, longer ones from a drawn seed."""
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6))  # six overfill the four slots
    vcpus = draw(st.integers(1, 3))
    few = draw(st.sampled_from([4, 12, len(FRAMES)]))
    bounds = st.sampled_from(BOUNDS)
    rows = draw(st.lists(st.tuples(bounds, bounds).map(lambda pair: (min(pair), max(pair))), min_size=1, max_size=4))
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
        choose = lambda n: int(rng.integers(n))  # noqa: E731
        count = 6 * longest
    else:
        choose = lambda n: draw(st.integers(0, n - 1))  # noqa: E731
        count = draw(st.integers(0, longest))
    operations = [_operation(choose, vcpus, len(words), len(rows), few) for _ in range(count)]
    return Stream(draw(parameters()), words, vcpus, block_of(operations), Ranges(rows))
