# SPDX-License-Identifier: Apache-2.0
"""Run the tasks of a fleet's replay: finished tasks are not run again, and one that fails does not affect the others.

This module decides which tasks to run and how many at a time. Where they run, and what happens to the tasks of a worker
that dies, is up to the executor (engines.py). A task whose worker died is tried again alone, so that other tasks on
that worker are not blamed for it.

A process ends itself when a task's time is up (time_limit.py). If the executor says how the process ended, that is
known at once. Dask does not say it; the task is then tried once more, alone, and the time that it takes tells.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from replay.fleet.engines import FleetEngine
from replay.fleet.fleet_catalogue import Catalogue
from replay.fleet.fleet_task import FleetTask, PolicyText, made_by, perform
from replay.fleet.results import ResultFolder, task_of
from replay.fleet.worker_processes import OUT_OF_TIME
from traces.command_line.durations import duration
from traces.command_line.progress import Progress
from traces.errors import Problem
from traces.text import printable

ATTEMPTS: Final = 2  # how often a task whose worker died is tried alone
_LOOK: Final = 0.5  # seconds between two checks for ^C, for workers, and of the clock
_NO_WORKER: Final = 120  # seconds without any worker after which a run gives up
_SAME: Final = (
    "trace", "etag", "host", "kernel", "vendor", "preset", "start", "duration_ns", "vm", "vm_name", "vcpus",
)  # fmt: skip


@dataclass(frozen=True)
class FailedTask:
    """A task that failed, and the reason."""

    task: FleetTask
    reason: str


@dataclass
class FleetRun:
    """The result of a run: how many tasks were done, failed, or had been done before."""

    tasks: int
    before: int  # tasks that were done, or had failed, in an earlier run
    done: int = 0
    failed: list[FailedTask] = field(default_factory=list)
    failed_before: int = 0
    merged: int = 0
    seconds: float = 0.0
    rows: int = 0  # trace rows of the VMs that were replayed


def chosen(catalogue: Catalogue, where: str) -> pl.DataFrame:
    """Return the catalogue's rows that can be replayed and for which the SQL condition `where` is true.

    Raises Problem if the condition is invalid.
    """
    rows = catalogue.rows.filter((pl.col("reason") == "") & (pl.col("vcpus") > 0))
    if not where:
        return rows
    try:
        return rows.filter(pl.sql_expr(where))
    except (pl.exceptions.PolarsError, TypeError, ValueError) as error:
        why = (str(error).splitlines() or [""])[0].partition("; valid columns")[0]
        columns = ", ".join(rows.columns)
        raise Problem(f"--where {printable(where)}: {printable(why)[:200]}: the columns are {columns}") from None


def tasks_of(
    catalogue: Catalogue, rows: pl.DataFrame, policies: tuple[PolicyText, ...], results: str, seconds: float = 0.0
) -> dict[str, tuple[FleetTask, dict[str, Any]]]:
    """Return the tasks by id, each with its row of the catalogue, the largest first.

    `results` is the place for their results; `seconds` is the time that each may take, and 0 means no limit.
    """
    found = []
    for row in rows.iter_rows(named=True):
        task = FleetTask(
            catalogue.root, row["trace"], row["etag"] or "", row["size"], row["vm"], row["decoded"], policies, results,
            made_by(), seconds,
        )  # fmt: skip
        found.append((task.id, task, row))
    found.sort(key=lambda each: (-each[1].decoded, each[0]))
    return {name: (task, row) for name, task, row in found}


def run(
    tasks: dict[str, tuple[FleetTask, dict[str, Any]]],
    folder: ResultFolder,
    engine: FleetEngine,
    memory: int = 0,
    *,
    retry_failed: bool = False,
    perform: Callable[[FleetTask], str] = perform,
) -> FleetRun:
    """Run the tasks that have no result yet.

    `memory` is the number of bytes that the rows of all running tasks may take; 0 leaves it to the engine.
    """
    began = time.monotonic()
    state = folder.state()
    failed_before = {task_of(each) for each in state.failures}
    known = state.done(list(tasks)) | (set() if retry_failed else failed_before)
    wanted = [(name, task) for name, (task, _) in tasks.items() if name not in known]
    found = FleetRun(len(tasks), len(tasks) - len(wanted))
    found.failed_before = 0 if retry_failed else len(failed_before & tasks.keys())
    events = {name: int(row["events"] or 0) for name, (_, row) in tasks.items()}
    with Progress("replaying", len(wanted)) as progress:
        shown = _Shown(progress, [events[name] for name, _ in wanted])
        for name, task, reason in _performed(wanted, engine, memory, perform, shown):
            if reason:
                found.failed.append(FailedTask(task, reason))
                folder.put_failed(name, _facts(tasks[name][1], reason))
            else:
                found.done += 1
                found.rows += events[name]
            shown.finished(events[name], failed=bool(reason))
        progress.say("putting results together")
        found.merged = folder.merge()
    found.seconds = time.monotonic() - began
    return found


def _performed(
    wanted: Sequence[tuple[str, FleetTask]],
    engine: FleetEngine,
    memory: int,
    perform: Callable[[FleetTask], str],
    shown: _Shown,
) -> Iterator[tuple[str, FleetTask, str]]:
    """Yield each finished task, in any order, with the reason if it failed, else with an empty text."""
    limit = memory or engine.memory
    left, alone = deque(wanted), deque[tuple[str, FleetTask, int, str]]()
    under_way: dict[Future[str], tuple[str, FleetTask, int, float]] = {}
    size = 0
    idle_since = time.monotonic()
    while left or alone or under_way:
        slots = engine.slots
        if slots:
            idle_since = time.monotonic()
        elif time.monotonic() - idle_since > _NO_WORKER:
            raise Problem(f"{engine.name}: no worker is left: run the same again when there are some")
        while left and slots > len(under_way) and (not under_way or size + left[0][1].decoded <= limit):
            name, task = left.popleft()
            size += task.decoded
            under_way[engine.executor.submit(perform, task)] = (name, task, 0, time.monotonic())
        if not left and not under_way and alone and slots:
            name, task, attempt, _ = alone.popleft()
            size += task.decoded
            under_way[engine.executor.submit(perform, task)] = (name, task, attempt, time.monotonic())
        if not under_way:
            time.sleep(_LOOK)
        done, _ = wait(under_way, timeout=_LOOK, return_when=FIRST_COMPLETED)
        shown.look()
        for future in done:
            name, task, attempt, began = under_way.pop(future)
            size -= task.decoded
            error = CancelledError() if future.cancelled() else future.exception()
            if error is None:
                yield name, task, future.result()
            elif not (how := engine.died(error)):
                text = (str(error).splitlines() or [""])[0]
                yield name, task, printable(f"{type(error).__name__}: {text}"[:300])
            elif how == OUT_OF_TIME or (attempt and 0 < task.seconds <= time.monotonic() - began):
                yield name, task, f"not done after {task.seconds:g} seconds, the limit for a task (--time-limit)"
            elif attempt < ATTEMPTS:
                alone.append((name, task, attempt + 1, how))
            else:
                yield name, task, f"the process that replays it died, alone and {attempt + 1} times: {how}"


def _facts(row: dict[str, Any], reason: str) -> dict[str, Any]:
    """Return the result row of a failed task, made from its catalogue row and the reason."""
    same = {name: row[name] for name in _SAME}
    return {**same, "recorded_policy": row["policy"], "events": row["events"], "lost": row["lost"], "reason": reason}


class _Shown:
    """Reports how many tasks are done, at which rate, and the time left,
    estimated from the rows still to be replayed.
    """

    def __init__(self, progress: Progress, rows: Sequence[int]) -> None:
        self._progress, self._all = progress, sum(rows)
        self._tasks, self._done, self._failed, self._rows = len(rows), 0, 0, 0
        self._began = time.monotonic()

    def finished(self, rows: int, *, failed: bool) -> None:
        """Count a task that is finished."""
        self._done += 1
        self._failed += failed
        self._rows += rows
        passed = max(time.monotonic() - self._began, 1e-3)
        left = passed * (self._all - self._rows) / max(self._rows, 1)
        bad = f", {self._failed:,} failed" if self._failed else ""
        self._progress.say(
            f"{self._done:,} of {self._tasks:,} VMs, {self._done / passed:.1f} a second, "
            f"{duration(int(left * 1e9))} left{bad}"
        )
        self._progress.at(self._done)

    def look(self) -> None:
        """Raise if ^C was pressed."""
        self._progress.at(self._done)
