# SPDX-License-Identifier: Apache-2.0
"""Rows for polars: batches that our own reader has decoded and checked, as a LazyFrame.

polars' own Parquet reader is not used for any file: on some hostile ones it aborts the process, where Arrow raises. A
Problem that the reader raises comes out of `collect` as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import polars as pl
import pyarrow as pa
from polars.io.plugins import register_io_source


def lazy_rows(schema: pl.Schema, batches: Callable[[Collection[str] | None], Iterator[pa.RecordBatch]]) -> pl.LazyFrame:
    """Return the rows of `batches(columns)` (None: all of the schema), which are read anew for each `collect`."""

    def frames(
        columns: list[str] | None, predicate: pl.Expr | None, limit: int | None, _size: int | None
    ) -> Iterator[pl.DataFrame]:
        left = limit
        asked = None if columns is None else {*columns, *(predicate.meta.root_names() if predicate is not None else ())}
        for batch in batches(asked):
            frame = pl.DataFrame(pl.from_arrow(batch))
            if left is not None:
                frame = frame.head(left)
                left -= len(frame)
            if predicate is not None:
                frame = frame.filter(predicate)
            yield frame if columns is None else frame.select(columns)
            if left == 0:
                return

    return register_io_source(frames, schema=schema, validate_schema=True, is_pure=True)
