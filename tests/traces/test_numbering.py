# SPDX-License-Identifier: Apache-2.0
"""Numbers of a batch's values, compiled and as plain Python, compared with a dictionary's; threads that work ahead."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.replay.plain import plain
from traces import numbering
from traces.background import Background, read_ahead
from traces.lives import dense

WORD = st.one_of(st.integers(0, 3), st.sampled_from([1 << 63, (1 << 64) - 1]), st.integers(0, (1 << 64) - 1))


@pytest.mark.parametrize("form", [numbering, plain("traces.numbering")])
@given(values=st.lists(WORD, max_size=60))
def test_codes_are_in_order_of_first_appearance(form: ModuleType, values: list[int]) -> None:
    codes, firsts = form.numbered(np.array(values, np.uint64))
    order = list(dict.fromkeys(values))
    assert codes.tolist() == [order.index(value) for value in values]
    assert firsts.tolist() == [values.index(value) for value in order]


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint32, np.uint16])
def test_the_values_keep_their_type_also_of_every_other_row(dtype: type[np.generic]) -> None:
    values = np.tile(np.array([7, 3, 3, 9, 7, 0], dtype), 30_000)
    values[5] = np.array(-1).astype(dtype)
    codes, found = dense(values[1::2])
    assert found.dtype == values.dtype
    assert bool((found[codes] == values[1::2]).all())


def test_many_values_that_are_all_different() -> None:
    values = np.random.default_rng(1).permutation(np.arange(100_000, dtype=np.uint64) << np.uint64(32))
    codes, firsts = numbering.numbered(values)
    assert bool((codes == np.arange(100_000)).all())
    assert bool((firsts == codes).all())


def test_what_a_thread_raises_comes_out_of_the_next_call() -> None:
    background, done = Background(), list[int]()
    background.do(lambda: done.append(1))
    background.do(lambda: done.append(2))
    background.do(lambda: done.append(1 // 0))
    with pytest.raises(ZeroDivisionError):
        background.do(lambda: done.append(3))
    background.wait()
    background.end()
    assert done == [1, 2]


def test_items_made_ahead_are_all_and_in_order_and_so_is_what_ends_them() -> None:
    assert list(read_ahead(iter(range(1, 50)))) == list(range(1, 50))
    items = read_ahead(1 // (3 - number) for number in range(9))
    assert [next(items), next(items), next(items)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(items)
