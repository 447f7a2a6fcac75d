# SPDX-License-Identifier: Apache-2.0
"""Columns of a batch of rows as lists of Python's own values, for what must look at rows one by one."""

from __future__ import annotations

from typing import Any

import pyarrow as pa


def values_of(column: pa.Array) -> list[Any]:
    """Return what `to_pylist` does, in a tenth of the time where it would make an Arrow scalar of each number."""
    found: list[Any]
    if pa.types.is_dictionary(column.type):
        names = column.dictionary.to_pylist()
        found = [None if index is None else names[index] for index in values_of(column.indices)]
    elif not pa.types.is_integer(column.type):
        found = column.to_pylist()
    elif not column.null_count:
        found = column.to_numpy().tolist()
    else:
        values = column.fill_null(0).to_numpy().astype(object)
        values[column.is_null().to_numpy(zero_copy_only=False)] = None
        found = values.tolist()
    return found
