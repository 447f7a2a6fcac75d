# SPDX-License-Identifier: Apache-2.0
"""Lives: telling apart the objects that one kernel address or page frame named in turn.

A `struct kvm` pointer or a root's page frame is reused as soon as its object is freed, so neither is an identity. These
helpers turn (address, birth, death) per row into small ids, a whole batch at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from traces.numbering import numbered

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


def dense(values: NDArray[np.generic]) -> tuple[Ints, NDArray[np.generic]]:
    """Return codes 0, 1, ... of the values in order of first appearance, and the value of each code."""
    if len(values) and bool((values == values[0]).all()):
        return np.zeros(len(values), np.int64), values[:1]
    codes, firsts = numbered(np.ascontiguousarray(values, np.uint64))
    return codes, values[firsts]


def first_rows(codes: Ints, count: int) -> Ints:
    """Return the first row of each of the codes 0..count-1, all of which occur."""
    rows = np.empty(count, np.int64)
    rows[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
    return rows


class Lives(NamedTuple):
    """The lives in a batch: `ids` by row, `current` by code after the batch (0: none), and rows where one `began`."""

    ids: Ints
    current: Ints
    began: Ints


def follow(codes: Ints, current: Ints, born: Flags, dying: Flags, next_id: int) -> Lives:
    """Number the lives in a batch of rows, each about the object `codes` (dense) names.

    `current` is each code's life before the batch, 0 for none. A life begins with a `born` row, or with the first row
    of a code that has none; it ends after a `dying` row. New lives get next_id, next_id + 1, ... in order of rows.
    """
    if not born.any() and not dying.any() and bool(current.all()):
        return Lives(current[codes], current, np.empty(0, np.int64))
    order = np.argsort(codes, kind="stable")
    grouped = codes[order]
    first = np.ones(len(codes), np.bool_)
    first[1:] = grouped[1:] != grouped[:-1]
    dead = dying[order]
    begins = born[order]
    begins[1:] |= dead[:-1] & ~first[1:]
    begins |= first & (current[grouped] == 0)
    began = np.sort(order[begins])
    ids = np.where(first, current[grouped], 0)
    ids[begins] = next_id + np.searchsorted(began, order[begins])
    ids = fill_forward(ids, begins | first)
    last = np.append(first[1:], True)
    after = current.copy()
    after[grouped[last]] = np.where(dead[last], 0, ids[last])
    out = np.empty_like(ids)
    out[order] = ids
    return Lives(out, after, began)


def fill_forward(values: Ints, known: Flags) -> Ints:
    """Return each row's value, or that of the nearest known row before it; the first row must be known."""
    rows = np.where(known, np.arange(len(values)), 0)
    return values[np.maximum.accumulate(rows)]
