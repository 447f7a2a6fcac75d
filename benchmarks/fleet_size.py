# SPDX-License-Identifier: Apache-2.0
"""Estimates what a fleet costs and what limits it: tasks measured here, then 1,000 to 100,000 hosts simulated.

    python -m benchmarks.fleet_size [--events 300000 1000000 3000000] [--workers 16 64 256 1024 4096] [--json]

Measured on this machine are CPU time, memory, requests and bytes of replay tasks, of synthetic SMI storms of several
sizes and of recordings of the corpus (from a folder instead of a store); the scheduler's time for a task, by tasks that
do nothing, in each engine that is installed; and the rate of a report. Assumed, because no store of that size is at
hand, are the request rates that Amazon documents for S3 (3,500 writes and 5,500 reads a second below one prefix) and 30
ms for a request.

The simulation is of one day's dumps, replayed as fast as the given workers can. A task waits for the scheduler, which
does one thing at a time, and for the store, which admits requests at its documented rate. The limit is whatever of
workers, scheduler and store is busy for the largest share of the time.
"""

from __future__ import annotations

import argparse
import heapq
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.record import machine, say, table
from replay.fleet import engines
from replay.fleet.fleet_task import FleetTask, made_by, perform, policy_texts
from replay.fleet.results import ResultFolder
from traces.errors import Problem
from traces.reader import Trace
from traces.stores.location import location
from traces.stores.object_store import Objects
from traces.synth import Parameters, synthesize

READS, WRITES = 5500.0, 3500.0  # requests a second that S3 takes below one prefix, as Amazon documents it
LATENCY: Final = 0.03  # seconds of a request, assumed
DOLLARS: Final = {"a GB-month": 0.023, "1,000 writes": 0.005, "1,000 reads": 0.0004}  # S3 standard, us-east-1, assumed
HOSTS: Final = (1_000, 10_000, 100_000)
VMS, DUMPS = 20, 3  # a host's VMs, and its dumps a day, assumed
_CORPUS: Final = Path("traces/corpus")
_RECORDED: Final = ("smi-storm-6.1", "smi-storm-6.1-async", "churn-6.1", "huge-6.1")
_NOTHING: Final = 2000  # number of empty tasks by which a scheduler is measured


@dataclass(frozen=True)
class TaskCost:
    """What one replay task took, under two policies with virtual times; `events` is the number of rows of its VM.

    `seconds` is CPU time; `peak`, `read_bytes` and `result_bytes` are bytes; `reads` and `writes` are requests.
    """

    name: str
    events: int
    seconds: float
    peak: int
    reads: int
    writes: int
    read_bytes: int
    result_bytes: int
    result_rows: int


@dataclass(frozen=True)
class Costs:
    """Mean costs of a task: `fixed` + `each` x events CPU seconds, requests, bytes per stored event and per result."""

    fixed: float
    each: float
    reads: float
    writes: float
    event_bytes: float
    result_bytes: float
    result_rows: float
    scheduler: float  # seconds of the scheduler for one task
    report_rows: float  # rows of results that a report reads in a second
    row_bytes: float  # bytes of a row of results, once they are merged


def task_cost(name: str, trace: Path, scratch: Path) -> TaskCost:
    """Perform the replay task of a trace's first VM in a process of its own, and return what it took."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_perform, args=(theirs, trace, scratch))
    child.start()
    found = ours.recv()
    child.join()
    return TaskCost(name, **found)


def _perform(answer: Any, trace: Path, scratch: Path) -> None:
    opened = Trace.open(trace)
    vm = min(opened.metadata.spans)
    events = sum(group.rows for group in opened.metadata.row_groups if group.vm == vm)
    objects = Objects(location(str(trace.parent)))
    (stored,) = [each for each in objects.list() if each.key == trace.name]
    results = ResultFolder(location(str(scratch / f"results-{trace.stem}")), make=True)
    task = FleetTask(
        str(trace.parent), trace.name, stored.etag, stored.size, vm, 0, policy_texts(["preserve", "async"]),
        results.place.text, made_by(),
    )  # fmt: skip
    with _counted() as counts:
        begun = time.process_time()
        why = perform(task)
        seconds = time.process_time() - begun
    if why:
        raise SystemExit(f"benchmarks.fleet_size: {trace}: {why}")
    (done,) = Path(results.place.text).rglob(f"{task.id}.parquet")
    import pyarrow.parquet as pq

    answer.send({
        "events": events, "seconds": seconds, "peak": _peak(),
        **counts, "result_bytes": done.stat().st_size, "result_rows": pq.read_metadata(done).num_rows,
    })  # fmt: skip


def _peak() -> int:
    """Return the peak resident memory of this process in bytes; that of getrusage would include its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Count the requests that this process makes to object stores, and the bytes that they return."""
    counts = {"reads": 0, "writes": 0, "read_bytes": 0}
    kept = {name: getattr(Objects, name) for name in ("read", "read_all", "create", "has")}

    def counting(name: str) -> Any:
        def called(self: Objects, *given: Any, **named: Any) -> Any:
            found = kept[name](self, *given, **named)
            counts["writes" if name == "create" else "reads"] += 1
            counts["read_bytes"] += len(found) if isinstance(found, bytes) else 0
            return found

        return called

    for name in kept:
        setattr(Objects, name, counting(name))
    try:
        yield counts
    finally:
        for name, method in kept.items():
            setattr(Objects, name, method)


def fitted(costs: Sequence[TaskCost]) -> tuple[float, float]:
    """Fit seconds = fixed + each x events by least squares of relative errors.

    Return (fixed, each), neither negative.
    """
    import numpy as np

    events = np.array([cost.events for cost in costs], float)
    seconds = np.array([cost.seconds for cost in costs], float)
    weights = 1 / seconds
    (fixed, each), *_ = np.linalg.lstsq(np.stack([weights, events * weights], 1), np.ones(len(costs)), rcond=None)
    return max(float(fixed), 0.0), max(float(each), 0.0)


def scheduler_cost(engine: str) -> float | None:
    """Return the seconds that an engine's scheduler needs for a task that does nothing; None if it is not installed."""
    try:
        with engines.opened(engine, 2) as opened:
            list(opened.executor.map(abs, range(10)))  # waits until the workers have started
            begun = time.monotonic()
            futures = [opened.executor.submit(abs, number) for number in range(_NOTHING)]
            for future in futures:
                future.result()
            return (time.monotonic() - begun) / _NOTHING
    except Problem as problem:
        say(f"fleet_size: {engine}: {problem}")
        return None


@dataclass(frozen=True)
class SimulatedDay:
    """A day of dumps replayed: how long it takes, and the share of that time in which each part was busy."""

    hosts: int
    workers: int
    tasks: int
    hours: float
    workers_busy: float
    scheduler_busy: float
    store_busy: float

    @property
    def limit(self) -> str:
        """Return which of "workers", "scheduler" and "store" is busy for the largest share of the time."""
        shares = {"workers": self.workers_busy, "scheduler": self.scheduler_busy, "store": self.store_busy}
        return max(shares, key=lambda name: shares[name])


def simulate(
    hosts: int, workers: int, costs: Costs, events: Sequence[int], most: int = 300_000, seed: int = 1
) -> SimulatedDay:
    """Simulate the replay of one day's dumps.

    More than `most` tasks are scaled up from a simulation of `most` of them: time is proportional to their number.
    """
    every = hosts * VMS * DUMPS
    tasks, rng = min(every, most), random.Random(seed)
    free = [0.0] * min(workers, tasks)  # when each worker is free
    heapq.heapify(free)
    scheduler = store = worked = end = 0.0
    one = costs.reads / READS + costs.writes / WRITES  # seconds of the store's capacity that one task uses
    for _ in range(tasks):
        at = heapq.heappop(free)
        begin = max(at, scheduler)
        scheduler = begin + costs.scheduler  # the scheduler hands out one task after the other
        admitted = max(scheduler, store)
        store = admitted + one
        took = (costs.reads + costs.writes) * LATENCY + costs.fixed + costs.each * rng.choice(events)
        worked += took
        end = max(end, admitted + took)
        heapq.heappush(free, admitted + took)
    scale = every / tasks
    return SimulatedDay(
        hosts,
        workers,
        every,
        end * scale / 3600,
        worked / (end * len(free)),
        tasks * costs.scheduler / end,
        tasks * one / end,
    )


def sized(costs: Costs, events_an_hour: float) -> list[list[str]]:
    """Return table rows of what a million recorded VM-hours come to: bytes, CPU time, requests, and dollars of S3."""
    hours, rows = 1e6, 1e6 * costs.result_rows
    events = hours * events_an_hour
    stored, cpu = events * costs.event_bytes, events * costs.each + hours * costs.fixed
    reads, writes = hours * costs.reads, hours * (costs.writes + 1 / VMS)  # a recording is one object of some VMs
    requests = reads / 1000 * DOLLARS["1,000 reads"] + writes / 1000 * DOLLARS["1,000 writes"]
    return [
        ["recordings", f"{stored / 1e12:,.2f} TB", f"{stored / 1e9 * DOLLARS['a GB-month']:,.0f} $ a month"],
        ["replay, two policies", f"{cpu / 3600:,.0f} CPU hours", ""],
        ["requests", f"{reads / 1e6:,.1f} M reads, {writes / 1e6:,.2f} M writes", f"{requests:,.0f} $"],
        ["results", f"{hours * costs.result_bytes / 1e9:,.1f} GB as they are written", ""],
        ["results, merged", f"{rows * costs.row_bytes / 1e9:,.1f} GB, {rows / 1e6:,.0f} M rows", ""],
        ["report", f"{rows / costs.report_rows:,.0f} s", ""],
    ]


def report_rate(rows: int = 2_000_000) -> tuple[float, float]:
    """Return how many rows of results one `fleet report` reads in a second, and the bytes of a row on disk."""
    from benchmarks.fleet_report import made, run
    from benchmarks.fleet_rows import Fleet

    with tempfile.TemporaryDirectory(prefix="kvmtrace-bench-") as name:
        count = made(Fleet(1000, 2, max(rows // 33_000, 1)), Path(name) / "results")
        size = sum(path.stat().st_size for path in Path(name).rglob("*.parquet"))
        return count / run(Path(name) / "results").seconds, size / count


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.fleet_size", description="What a fleet costs, and its limits.")
    parser.add_argument("--events", type=int, nargs="+", default=[300_000, 1_000_000, 3_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvmtrace-bench-") as name:
        scratch, measured = Path(name), []
        for events in options.events:
            say(f"fleet_size: a task of {events:,} events")
            trace = scratch / f"synthetic-{events}.parquet"
            synthesize(trace, Parameters(policy="async", smi_rate=400, working_set=1500, vcpus=4, events=events))
            measured.append(task_cost(f"synthetic, {events:,}", trace, scratch))
        for trace in (_CORPUS / f"{each}.parquet" for each in _RECORDED):
            measured.append(task_cost(trace.stem, trace, scratch))
        stored = sum((scratch / f"synthetic-{events}.parquet").stat().st_size for events in options.events)
        say("fleet_size: schedulers")
        schedulers = {name: cost for name in (engines.LOCAL, engines.DASK) if (cost := scheduler_cost(name))}
    say("fleet_size: the report")
    fixed, each = fitted(measured)
    costs = Costs(
        fixed, each, _mean(measured, "reads"), _mean(measured, "writes"), stored / sum(options.events),
        _mean(measured, "result_bytes"), _mean(measured, "result_rows"), max(schedulers.values()), *report_rate(),
    )  # fmt: skip
    events_of = [cost.events for cost in measured if cost.name.startswith("synthetic")]
    days = [simulate(hosts, workers, costs, events_of) for hosts in HOSTS for workers in options.workers]
    if options.json:
        print(json.dumps({
            "machine": machine(), "tasks": [asdict(cost) for cost in measured], "costs": asdict(costs),
            "schedulers": schedulers, "days": [{**asdict(day), "limit": day.limit} for day in days],
        }, indent=1))  # fmt: skip
        return
    _print(measured, costs, schedulers, days)


def _mean(costs: Sequence[TaskCost], name: str) -> float:
    return float(sum(getattr(cost, name) for cost in costs)) / len(costs)


def _print(
    measured: Sequence[TaskCost], costs: Costs, schedulers: dict[str, float], days: Sequence[SimulatedDay]
) -> None:
    print(table(
        ["task", "events", "CPU s", "MiB", "reads", "writes", "result bytes", "rows"],
        [[each.name, f"{each.events:,}", f"{each.seconds:.2f}", f"{each.peak >> 20:,}", str(each.reads),
          str(each.writes), f"{each.result_bytes:,}", str(each.result_rows)] for each in measured],
    ))  # fmt: skip
    print(
        f"\nA task takes {costs.fixed:.2f} s and {costs.each * 1e6:.2f} s for a million events; a scheduler, for each:"
    )
    print(", ".join(f"{name} {cost * 1e3:.2f} ms" for name, cost in schedulers.items()))
    print(
        f"A report takes {costs.report_rows / 1e6:.2f} M rows a second; a stored event {costs.event_bytes:.2f} bytes.\n"
    )
    for rate in (1e4, 1e6, 36e6):
        print(f"A million VM-hours, at {rate:,.0f} events an hour:\n")
        print(table(["of", "how much", "S3"], sized(costs, rate)), "\n")
    print("All hosts upload a dump within a minute, below one prefix:\n")
    print(table(
        ["hosts", "writes a second", "of what the store takes"],
        [[f"{hosts:,}", f"{hosts / 60:,.0f}", f"{hosts / 60 / WRITES:.0%}"] for hosts in HOSTS],
    ), "\n")  # fmt: skip
    print(f"A day of {DUMPS} dumps a host, {VMS} VMs in each, each of one of the synthetic sizes:\n")
    print(table(
        ["hosts", "workers", "tasks", "hours", "workers busy", "scheduler", "store", "limit"],
        [[f"{day.hosts:,}", f"{day.workers:,}", f"{day.tasks:,}", f"{day.hours:,.2f}", f"{day.workers_busy:.0%}",
          f"{day.scheduler_busy:.0%}", f"{day.store_busy:.0%}", day.limit] for day in days],
    ))  # fmt: skip


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    try:
        main()
    except Problem as problem:
        print(f"benchmarks.fleet_size: {problem}", file=sys.stderr)
        sys.exit(problem.code)
