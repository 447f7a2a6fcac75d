# SPDX-License-Identifier: Apache-2.0
"""Arrays of structures: compiled loops read them as C structures, and numpy as rows with named fields."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_SMALL: Final = 1 << 12  # bytes
_LINE: Final = 64  # bytes of a cache line, to which pools are aligned


def row_type(*names: str) -> np.dtype[np.void]:
    """Return the type of a structure whose fields are all int64."""
    return np.dtype([(name, np.int64) for name in names])


def make_pool(rows: int, layout: Any) -> NDArray[Any]:
    """Return `rows` zeroed structures; pages that are never touched take no memory.

    Large pools are aligned to a cache line; for small ones that is not worth its 4 us, of which a VM has sixty.
    """
    dtype = _structure(tuple(layout)) if isinstance(layout, list) else np.dtype(layout)
    if rows * dtype.itemsize <= _SMALL:
        return np.zeros(rows, dtype)
    raw = np.zeros(rows * dtype.itemsize + _LINE, np.uint8)
    return np.ndarray(rows, dtype, raw.data, -raw.__array_interface__["data"][0] % _LINE)


@cache
def _structure(fields: tuple[Any, ...]) -> np.dtype[np.void]:
    """Return a structure's type from a cache: numpy needs 0.1 ms for one
    with many fields, and each VM has a dozen pools.
    """
    return np.dtype(list(fields))


def grown(old: NDArray[Any], rows: int) -> NDArray[Any]:
    """Return a pool of `rows` structures that begins with those of `old`."""
    new = make_pool(rows, old.dtype)
    new[: len(old)] = old
    return new


def by_vcpu(vcpu: NDArray[Any], count: int) -> list[NDArray[np.int64]]:
    """Return for each vCPU the positions of its rows, in order.

    `vcpu` has the dense vCPU number of each row, and no -1.
    """
    order = np.argsort(vcpu, kind="stable")
    return np.split(order, np.searchsorted(vcpu[order], np.arange(1, count)))[:count]


def as_bytes(pool: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a pool as bytes, the form that compiled loops take."""
    return pool.view(np.uint8)


def as_structures(pool: NDArray[Any]) -> Any:
    """Return the same memory as an array of ctypes structures, the form
    that the loops take when they run uncompiled.
    """
    return (np.ctypeslib.as_ctypes_type(pool.dtype) * len(pool)).from_buffer(pool.view(np.uint8))
