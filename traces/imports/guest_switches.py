# SPDX-License-Identifier: Apache-2.0
"""Which task ran on which CPU of a guest, and when: from what trace-cmd or ftrace recorded inside it.

Its clock is not its host's. trace-cmd's guest files have how much the two differ (its time synchronisation); of all
else somebody has to tell.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl

from traces.command_line.progress import Progress
from traces.errors import Problem
from traces.imports.importing import read
from traces.imports.opening import Opened
from traces.imports.other_events import OTHER
from traces.imports.row_spool import RowSpool
from traces.text import count

# As ftrace and perf print it, and a raw record's fields; as trace-cmd's plugin does.
_NEXT: Final = r"next_comm=(.*?) next_pid=(\d+)"
_PREVIOUS: Final = r"prev_comm=(.*?) prev_pid=(\d+)"
_PLUGIN_NEXT: Final = r"==> (.*):(\d+) \["
_PLUGIN_PREVIOUS: Final = r"^sched_switch: *(.*?):(\d+) \["


@dataclass(frozen=True)
class GuestTasks:
    """`ran`: `cpu`, `time` (ns, the host's clock; the first of a CPU: from ever), `pid`, `task`, in order of both.

    `how` says what makes its times the host's, and what of it is a guess. `first` and `last` are its rows' times.
    """

    path: Path
    ran: pl.DataFrame
    how: str
    first: int
    last: int


def read_guest(path: Path, offset: int | None) -> GuestTasks:
    """Raises Problem where nothing says which tasks ran, or how the guest's times are the host's."""
    opened = Opened(path)
    try:
        with tempfile.TemporaryFile(prefix="kvmtrace-") as file, Progress(f"reading {path}") as progress:
            spool = RowSpool(file)
            found = read(opened, spool, progress)
            if offset is None and not found.synced:
                raise Problem(
                    f"{path}: it does not say how its clock and its host's differ, as trace-cmd's guest files do: give "
                    "--guest-offset, the seconds to be added to its times"
                )
            rows = _rows(spool)
            spool.texts.close()
    finally:
        opened.close()
    names = pl.DataFrame(
        {"pid": [thread.tid for thread in found.threads], "task": [thread.comm for thread in found.threads]},
        schema={"pid": pl.Int64, "task": pl.String},
    )
    if rows.is_empty():
        raise Problem(f"{path}: no event in it: which tasks ran is not known")
    rows = rows.with_columns(pl.col("time") + (offset or 0))
    switches = _switches(rows)
    if switches.is_empty():
        ran, by = rows.select("cpu", "time", "pid").join(names, on="pid", how="left"), "by whose each event is"
    else:
        ran, by = switches, f"by {count(len(rows.filter(_is_switch(rows))), 'row')} of sched_switch"
    moved = (
        f"moved by {offset / 1e9:+.9f} s as given" if offset is not None else "made the host's by trace-cmd's offsets"
    )
    ran = ran.with_columns(pl.col("task").fill_null("")).sort("cpu", "time", maintain_order=True)
    how = f"{by}; its times are {moved}; its CPU 0 is taken for vCPU 0, and so on"
    first, last = (int(getattr(rows["time"], end)()) for end in ("min", "max"))
    return GuestTasks(path, ran, how, first, last)


def _rows(spool: RowSpool) -> pl.DataFrame:
    parts = []
    for columns in spool.batches():
        others = columns["kind"] == OTHER
        texts: list[str | None] = [None] * len(others)
        at = np.flatnonzero(others)
        for row, text in zip(at.tolist(), spool.texts.of(columns["w0"][at], columns["w1"][at]), strict=True):
            texts[row] = text if text.startswith("sched_switch:") else None
        frame = {name: columns[of].astype(np.int64) for name, of in (("time", "time"), ("cpu", "cpu"), ("pid", "tid"))}
        parts.append(pl.DataFrame(frame).with_columns(pl.Series("text", texts, pl.String)))
    schema = {"time": pl.Int64, "cpu": pl.Int64, "pid": pl.Int64, "text": pl.String}
    return pl.concat([pl.DataFrame(schema=schema), *parts])


def _is_switch(rows: pl.DataFrame) -> pl.Series:
    return rows["text"].is_not_null()


def _switches(rows: pl.DataFrame) -> pl.DataFrame:
    """From each switch on the task that came; before a CPU's first one the task that went."""

    def part(pattern: str, plugin: str, group: int) -> pl.Expr:
        return pl.coalesce(pl.col("text").str.extract(pattern, group), pl.col("text").str.extract(plugin, group))

    found = rows.filter(_is_switch(rows)).sort("cpu", "time", maintain_order=True)
    came = found.select(
        "cpu", "time", part(_NEXT, _PLUGIN_NEXT, 2).cast(pl.Int64).alias("pid"),
        part(_NEXT, _PLUGIN_NEXT, 1).alias("task"),
    )  # fmt: skip
    went = found.group_by("cpu", maintain_order=True).first().select(
        "cpu", pl.lit(-(1 << 62), pl.Int64).alias("time"),
        part(_PREVIOUS, _PLUGIN_PREVIOUS, 2).cast(pl.Int64).alias("pid"),
        part(_PREVIOUS, _PLUGIN_PREVIOUS, 1).alias("task"),
    )  # fmt: skip
    return pl.concat([went, came]).filter(pl.col("pid").is_not_null())
