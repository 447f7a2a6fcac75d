# SPDX-License-Identifier: Apache-2.0
"""A trace's rows as Python tuples, for `validate`, which looks at them one by one; `replay` never does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from traces.reader import Trace
from traces.row_values import values_of


class RowTuple(NamedTuple):
    """One row of a trace; traces/SPEC.md explains the columns."""

    seq: int
    time: int
    vcpu: int | None
    cpu: int
    tid: int
    kind: str
    root: int
    role: int
    level: int
    as_id: int
    gfn: int | None
    old: int
    new: int
    table: int
    addr: int
    code: int
    value: int
    rip: int
    refs: int
    ret: int
    slot: int
    flags: int


def rows_of(trace: Trace, vm: int) -> Iterator[RowTuple]:
    """Yield one VM's rows in order of recording."""
    for batch in trace.batches(RowTuple._fields, vm=vm):
        yield from map(RowTuple._make, zip(*map(values_of, batch.columns), strict=True))
