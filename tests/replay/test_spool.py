# SPDX-License-Identifier: Apache-2.0
"""The spool gives back what was put in, from memory and from its temporary file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay import spool
from replay.simulate.operations import Block, Ranges
from replay.simulate.timed_operations import Timed

TIMES = ("lead", "guest", "idle", "cost", "wall")
NEAR = st.integers(-3, 300)
ANY = st.one_of(
    NEAR, st.integers(0, 1 << 17), st.integers((1 << 40) - 9, (1 << 40) + 9), st.integers(-(1 << 63), (1 << 63) - 1)
)


def parts() -> st.SearchStrategy[list[Timed]]:
    """Parts of 0 to 5 operations whose columns are alike, near each other, or anything that their type holds."""

    def column(size: int, kind: type, values: st.SearchStrategy[int]) -> st.SearchStrategy[np.ndarray]:
        lists = st.one_of(st.lists(values, min_size=size, max_size=size), values.map(lambda one: [one] * size))
        return lists.map(lambda made: np.array(made, kind))

    def part(size: int) -> st.SearchStrategy[Timed]:
        block = st.builds(
            Block,
            column(size, np.uint32, st.integers(0, (1 << 32) - 1)),
            *(column(size, np.int64, ANY) for _ in range(3)),
        )
        columns = {name: column(size, np.int64, ANY) for name in TIMES}
        columns |= {"queue": column(size, np.int32, st.integers(0, (1 << 31) - 1))}
        columns |= {"was": column(size, np.uint8, st.integers(0, 255))}
        return st.builds(Timed, block, **columns)

    return st.lists(st.integers(0, 5).flatmap(part), max_size=4)


@given(parts(), st.sampled_from([0, 40, 1 << 20]), st.booleans())
def test_what_was_put_in_comes_out(made: list[Timed], held: int, seq: bool) -> None:
    with pytest.MonkeyPatch.context() as patch, spool.Spool(seq=seq) as kept:
        patch.setattr(spool, "IN_MEMORY", held)
        ranges = [Ranges([(n, n + 1)]) for n in range(len(made))]
        for one, of in zip(made, ranges, strict=True):
            kept.append(one, of)
        for _ in range(2):
            found = list(kept)
            assert [of for _, of in found] == ranges
            for (one, _), expected in zip(found, made, strict=True):
                for name in ("op", "gfn", "time", "seq"):
                    wanted = getattr(expected.block, name) * (1 if name != "seq" or seq else 0)
                    assert getattr(one.block, name).dtype == wanted.dtype
                    assert getattr(one.block, name).tolist() == wanted.tolist()
                for name in ("queue", "was", *TIMES):
                    wanted = getattr(expected, name)
                    assert getattr(one, name).dtype == wanted.dtype
                    assert getattr(one, name).tolist() == wanted.tolist()
                    getattr(one, name)[:] = 0  # each reader may change them
