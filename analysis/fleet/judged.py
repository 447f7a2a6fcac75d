# SPDX-License-Identifier: Apache-2.0
"""Rows of results as judgements: each VM under each policy, compared with itself under the recorded policy.

A task's rows (one trace, one VM, all policies) are consecutive, so that a batch of rows needs no other: whatever the
number of rows, no more than a batch is held. Rows of vCPUs are not looked at.

Time saved is soft-hang time under the recorded policy less that under the other one, faults spared likewise. Both are
intervals: the least is the recorded policy's low end less the other's high end. Where the other has no upper end the
least is null, and the VM is undecided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import polars as pl
import pyarrow as pa

from replay.fleet.fleet_schema import RESULTS
from traces.errors import Problem

DIMENSIONS: Final = ("host", "kernel", "vendor", "preset", "recorded_policy", "own_policy", "day")
AGREES: Final = "agrees"
AGREEMENTS: Final = (AGREES, "open", "differs")
_TEXTS: Final = (
    "row",
    "trace",
    "etag",
    "host",
    "kernel",
    "vendor",
    "preset",
    "recorded_policy",
    "policy",
    "own_policy",
)
# Intervals that are compared with the recorded policy's: the column of the lower end, and that of the upper end.
_SAVED: Final = {"stalled_low_ns": "stalled_high_ns", "faults_low": "faults_high"}
_ENDS: Final = {
    "stalls_low": "stalls_high", "longest_stall_low_ns": "longest_stall_high_ns", "refaults_low": "refaults_high",
    **_SAVED,
}  # fmt: skip
COLUMNS: Final = (
    *_TEXTS, "vm", "vm_name", "start", "duration_ns", "vcpus", "lost", "reason",
    *(end for ends in _ENDS.items() for end in ends),
)  # fmt: skip
_TASK: Final = ("trace", "etag", "vm")
_ROWS: Final = 1 << 16  # rows that are judged together
_MOST: Final = 1 << 55  # the largest number accepted: 1.1 years in ns; int64 has room for sums of a hundred such
_NEEDED: Final = ("policy", "recorded_policy", "vm", "duration_ns", "vcpus", "own_policy", "faults_low", "refaults_low")
_MOST_VCPUS: Final = 1 << 16
_KINDS: Final = ("vm", "failed")


def judged(batches: Iterator[pa.RecordBatch], where: str) -> Iterator[pl.DataFrame]:
    """Yield rows of VMs and of failed tasks, in frames of some 65,536 rows, with what a policy saves.

    Added columns are `day`, `own` (the row is that of the recorded policy), `paired` (there is a row of the recorded
    policy) and `saved_low_ns`, `saved_high_ns`, `spared_low`, `spared_high`, which are null in rows of the recorded
    policy and in rows that are not paired. Raises a Problem that names `where` for numbers that no replay makes.
    """
    held: list[pl.DataFrame] = []
    for batch in batches:
        held.append(_rows(batch, where))
        if sum(map(len, held)) < _ROWS:
            continue
        rows = pl.concat(held)
        _check(rows, where)
        # The last task's rows may continue in the next batch.
        tasks = rows.select(pl.struct(_TASK).rle_id()).to_series()
        begin = int((tasks < tasks[-1]).sum())
        held = [rows[begin:]]
        if begin:
            yield _paired(rows[:begin])
    if sum(map(len, held)):
        rows = pl.concat(held)
        _check(rows, where)
        yield _paired(rows)


def _rows(batch: pa.RecordBatch, where: str) -> pl.DataFrame:
    for field in batch.schema:
        found = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if found != RESULTS.field(field.name).type:
            raise Problem(f"{where}: damaged: column {field.name} is {found}, not {RESULTS.field(field.name).type}")
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        raise Problem(f"{where}: damaged: {str(error).splitlines()[0]}") from None
    frame = pl.DataFrame(pl.from_arrow(batch))
    frame = frame.with_columns(pl.col(name).cast(pl.Categorical) for name in _TEXTS)
    return frame.filter(pl.col("row").is_in(_KINDS)).with_columns(
        pl.col(name).cast(pl.String) for name in ("vm_name", "reason")
    )


def _check(rows: pl.DataFrame, where: str) -> None:
    names = [*(end for ends in _ENDS.items() for end in ends), "duration_ns", "lost"]
    odd = rows.select(
        *(((pl.col(name) < 0) | (pl.col(name) > _MOST)).any().alias(name) for name in names),
        ((pl.col("vcpus") < 0) | (pl.col("vcpus") > _MOST_VCPUS)).any().alias("vcpus"),
        *((pl.col(low) > pl.col(high)).any().alias(f"{low} and {high}") for low, high in _ENDS.items()),
        *(
            (pl.col(low).is_null() & pl.col(high).is_not_null()).any().alias(f"{low} without {high}")
            for low, high in _ENDS.items()
        ),
        (~pl.col("own_policy").is_in(AGREEMENTS) & (pl.col("row") == "vm")).any().alias("own_policy"),
        *((pl.col(name).is_null() & (pl.col("row") == "vm")).any().alias(f"{name} (empty)") for name in _NEEDED),
    ).row(0, named=True)
    for name, found in odd.items():
        if found:
            raise Problem(f"{where}: damaged: {name} of its rows is what no replay makes")


def _paired(rows: pl.DataFrame) -> pl.DataFrame:
    own = pl.col("policy") == pl.col("recorded_policy")
    rows = rows.with_columns(task=pl.struct(_TASK).rle_id(), own=own.fill_null(False), day=pl.col("start").dt.date())
    recorded = rows.filter("own").unique("task", keep="first").select(
        "task", *(pl.col(end).alias(f"own_{end}") for ends in _SAVED.items() for end in ends)
    )  # fmt: skip
    both = rows.join(recorded, on="task", how="left", maintain_order="left")
    other = ~pl.col("own")
    return both.with_columns(
        paired=pl.col("own_faults_low").is_not_null(),
        saved_low_ns=pl.when(other).then(pl.col("own_stalled_low_ns") - pl.col("stalled_high_ns")),
        saved_high_ns=pl.when(other).then(pl.col("own_stalled_high_ns") - pl.col("stalled_low_ns")),
        spared_low=pl.when(other).then(pl.col("own_faults_low") - pl.col("faults_high")),
        spared_high=pl.when(other).then(pl.col("own_faults_high") - pl.col("faults_low")),
    ).drop("task", *(f"own_{end}" for ends in _SAVED.items() for end in ends))


def dimensions(text: str) -> Sequence[str]:
    """Return the columns that --by names. Raises Problem for a name that is not one of them."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in DIMENSIONS:
            raise Problem(f"--by {name or repr(name)}: give some of {', '.join(DIMENSIONS)}, with commas between")
    return tuple(dict.fromkeys(names))
