# SPDX-License-Identifier: Apache-2.0
"""Memory that compiled loops read as C structures, and numpy as rows with named fields."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_LINE: Final = 64  # bytes of a cache line, to which pools are aligned


def row_type(*names: str) -> np.dtype[np.void]:
    """A structure of int64 fields."""
    return np.dtype([(name, np.int64) for name in names])


def make_pool(rows: int, layout: Any) -> NDArray[Any]:
    """Zeroed rows of a structure that begin with a cache line; memory that is not touched costs nothing yet."""
    dtype = _structure(tuple(layout)) if isinstance(layout, list) else np.dtype(layout)
    raw = np.zeros(rows * dtype.itemsize + _LINE, np.uint8)
    return np.ndarray(rows, dtype, raw.data, -raw.__array_interface__["data"][0] % _LINE)


@cache
def _structure(fields: tuple[Any, ...]) -> np.dtype[np.void]:
    """One of that many fields takes numpy 0.1 ms to make, and a VM has a dozen pools."""
    return np.dtype(list(fields))


def grown(old: NDArray[Any], rows: int) -> NDArray[Any]:
    """A larger pool that begins with what `old` holds."""
    new = make_pool(rows, old.dtype)
    new[: len(old)] = old
    return new


def by_vcpu(vcpu: NDArray[Any], count: int) -> list[NDArray[np.int64]]:
    """The places of each vCPU's rows, in order; `vcpu` has each row's dense number, and none is -1."""
    order = np.argsort(vcpu, kind="stable")
    return np.split(order, np.searchsorted(vcpu[order], np.arange(1, count)))[:count]


def as_bytes(pool: NDArray[Any]) -> NDArray[np.uint8]:
    """A pool as a compiled loop takes it."""
    return pool.view(np.uint8)


def as_structures(pool: NDArray[Any]) -> Any:
    """The same memory as the loop takes it uncompiled: an array of ctypes structures."""
    return (np.ctypeslib.as_ctypes_type(pool.dtype) * len(pool)).from_buffer(pool.view(np.uint8))
