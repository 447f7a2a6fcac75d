# SPDX-License-Identifier: Apache-2.0
"""What an engine and a store add to replaying many recordings, what a second worker brings, how fast footers are read.

    python -m benchmarks.fleet_replay [--engine local] [--tasks 200] [--rounds 4] [--footers 10000] [--json]

One synthetic recording under many names in a store on loopback (moto, a process of its own on the same CPUs). In each
round as many tasks are done by one worker and by two, one after the other. Told are

- the wall time of one worker as a multiple of that of two, the median of the rounds: of use on an idle machine only.
  Also what two processes bring over one that replay the same file and do nothing else: two CPUs may be threads of
  one core;
- CPU seconds outside of the tasks, of all processes but the store's, for each task, whatever else the machine does. In
  a task is the replay of its rows; outside are the scheduler, the executor, the store's client, opening the recording
  and writing the result, but not the start of processes. It does not grow with a task, so that tasks may be shorter
  than the second that it is compared with. What an engine with one worker takes in a second without work, its own
  heartbeat, is counted separately, and belongs to a task of a second as well;
- footers a second of an index, compared with what the same server gives the same client when nothing is done with them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.record import machine, say
from replay.fleet import engines, fleet_catalogue, fleet_run, fleet_task
from replay.fleet.fleet_catalogue import Catalogue
from replay.fleet.fleet_task import FleetTask, PolicyText
from replay.fleet.results import ResultFolder
from tests.fleet.servers import BUCKET, environment, s3
from traces.reader import Trace
from traces.stores.location import location
from traces.stores.object_store import Objects
from traces.stores.remote_trace import TAIL
from traces.synth import Parameters, synthesize

POLICIES: Final = (PolicyText("async"), PolicyText("preserve"))
ENDPOINT: Final = f"s3://{BUCKET}"
WRITERS: Final = 16
IDLE: Final = 10.0  # seconds
SPEEDUP: Final = 1.8
OVERHEAD: Final = 0.1  # of a task of a second


@dataclass(frozen=True)
class MeasuredRun:
    """Tasks by some workers: seconds of the wall clock, of the CPU in the tasks, and outside of them."""

    tasks: int
    seconds: float
    inside: float
    outside: float


def counting(folder: str, task: FleetTask) -> str:
    """A task that leaves behind how much CPU its replay took. Its process does one task at a time."""
    real = fleet_task.rows_for
    spent = 0.0

    def counted(trace: Trace, task: FleetTask) -> list[dict[str, Any]]:
        nonlocal spent
        began = time.process_time()
        rows = real(trace, task)
        spent = time.process_time() - began
        return rows

    fleet_task.rows_for = counted
    try:
        return fleet_task.perform(task)
    finally:
        fleet_task.rows_for = real
        with (Path(folder) / str(os.getpid())).open("a") as file:
            file.write(f"{spent}\n")


def alone(file: str) -> int:
    """A replay without a store."""
    task = FleetTask("", "trace.parquet", "", 0, 1, 0, POLICIES, "", fleet_task.made_by())
    return len(fleet_task.rows_for(Trace.open(Path(file)), task))


@contextmanager
def store() -> Iterator[int]:
    """A bucket on loopback, in this process's environment and that of its workers; the number of its process."""
    before = set(psutil.Process().children())
    with s3() as port:
        (server,) = set(psutil.Process().children()) - before
        os.environ.update(environment(port))
        yield server.pid


def filled(prefix: str, data: bytes, count: int) -> str:
    """A place with this many objects of these bytes."""
    place = f"{ENDPOINT}/{prefix}"
    objects = Objects(location(place))
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda number: objects.create(f"host=h{number:05}/trace.parquet", data), range(count)))
    return place


def cpu(but: int) -> float:
    """CPU seconds of this process, of all below it that live, and of those that are gone; not of one of them."""
    times = psutil.Process().cpu_times()
    spent: float = times.user + times.system + times.children_user + times.children_system
    for each in psutil.Process().children(recursive=True):
        if each.pid != but:
            own = each.cpu_times()
            spent += own.user + own.system + own.children_user + own.children_system
    return spent


def replays(options: argparse.Namespace, server: int, scratch: Path) -> dict[str, Any]:
    """The figures of all rounds, and the runs that they are of."""
    file = scratch / "trace.parquet"
    synthesize(file, Parameters(policy="async", vms=1, vcpus=2, events=options.events))
    place = filled("traces", file.read_bytes(), options.tasks)
    catalogue = fleet_catalogue.index(location(place)).catalogue
    each = max(options.tasks // options.rounds, 1)
    found: dict[int, list[MeasuredRun]] = {1: [], 2: []}
    machines: list[float] = []
    idle: list[float] = []  # with one engine, then with both
    with ExitStack() as open_engines:
        opened: dict[int, Any] = {}
        for workers in (1, 2):
            opened[workers] = open_engines.enter_context(engines.opened(options.engine, workers))
            # Processes begin, and import what they need.
            by(opened[workers], catalogue, catalogue.rows.head(4 * workers), server, scratch / f"warm-{workers}")
            spent, began = cpu(server), time.monotonic()
            time.sleep(IDLE)
            idle.append((cpu(server) - spent) / (time.monotonic() - began))
        one, two = opened[1], opened[2]
        for number in range(options.rounds):
            rows = catalogue.rows.slice(number * each, each)
            for workers, engine in opened.items():
                found[workers].append(by(engine, catalogue, rows, server, scratch / f"{number}-{workers}"))
            times = ", ".join(f"{workers} {runs[-1].seconds:.2f} s" for workers, runs in found.items())
            machines.append(wall(one, file, each // 2) / wall(two, file, each // 2))
            say(f"fleet_replay: round {number + 1}, workers: {times}; processes alone: {machines[-1]:.2f} times one")
    runs = {workers: [asdict(run) for run in of] for workers, of in found.items()}
    return {"two processes alone, times one": statistics.median(machines), **summary(found, *idle), "runs": runs}


def wall(engine: Any, file: Path, count: int) -> float:
    """Seconds of this many replays by an engine's processes, and of nothing else."""
    began = time.monotonic()
    list(engine.executor.map(alone, [str(file)] * count))
    return time.monotonic() - began


def by(engine: Any, catalogue: Catalogue, rows: Any, server: int, notes: Path) -> MeasuredRun:
    """A run of one task for each row."""
    notes.mkdir()
    folder = ResultFolder(location(f"{ENDPOINT}/results/{notes.name}"))
    folder.claim({"policies": [each.mark for each in POLICIES]})
    tasks = fleet_run.tasks_of(catalogue, rows, POLICIES, folder.place.text, 600)
    before = cpu(server)
    done = fleet_run.run(tasks, folder, engine, 1 << 40, perform=partial(counting, str(notes)))
    spent = cpu(server) - before
    assert done.done == len(tasks), done.failed[:3]
    inside = sum(float(line) for file in notes.iterdir() for line in file.read_text().split())
    return MeasuredRun(done.done, done.seconds, inside, spent - inside)


def footers(count: int, scratch: Path) -> dict[str, float]:
    """Footers a second: of this many objects by an index; by requests alone, from the same store; of a folder."""
    file = scratch / "small.parquet"
    synthesize(file, Parameters(duration=0.02))
    data = file.read_bytes()
    say(f"fleet_replay: writing {count:,} recordings")
    place = location(filled("many", data, count))
    objects = Objects(place)
    rates: dict[str, float] = {}

    def asked(number: int) -> bytes:
        return objects.read(f"host=h{number:05}/trace.parquet", max(len(data) - TAIL, 0), len(data))

    def rate(name: str, done: int, began: float) -> None:
        rates[name] = done / (time.monotonic() - began)
        say(f"fleet_replay: footers a second, {name}: {rates[name]:,.0f}")

    few = range(max(count // 20, 1))
    began = time.monotonic()
    for number in few:
        asked(number)
    rate("requests, one at a time", len(few), began)
    began = time.monotonic()
    with ThreadPoolExecutor(fleet_catalogue.READERS) as pool:
        list(pool.map(asked, range(count)))
    rate(f"requests, {fleet_catalogue.READERS} at a time", count, began)
    began = time.monotonic()
    found = fleet_catalogue.index(place)
    assert found.read == found.catalogue.rows["trace"].n_unique() == count
    rate("index", count, began)
    folder = scratch / "many"
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.parquet").hardlink_to(file)
    began = time.monotonic()
    fleet_catalogue.index(location(str(folder)))
    rate("index of a folder", count, began)
    return rates


def summary(runs: dict[int, list[MeasuredRun]], idle: float, both: float) -> dict[str, float]:
    """The figures that the runs come to; `idle` and `both` are CPU seconds a second of one engine and of the two."""
    one, two = runs[1], runs[2]
    every = [*one, *two]
    tasks, inside = sum(run.tasks for run in every), sum(run.inside for run in every)
    outside = sum(run.outside - both * run.seconds for run in every) / tasks
    pairs = [a.seconds / b.seconds for a, b in zip(one, two, strict=True)]
    return {
        "two workers, times one": statistics.median(pairs),
        "least of a round": min(pairs),
        "CPU s in a task": inside / tasks,
        "CPU s outside, for each task": outside,
        "CPU s of an idle engine with one worker, each second": idle,
        "CPU outside, share of a task of a second": outside + idle,
        "wall s of one worker outside, for each task": statistics.median(
            (run.seconds - run.inside) / run.tasks for run in one
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.fleet_replay", description="What a fleet's replay takes.")
    parser.add_argument("--engine", default="local", choices=["local", "dask"])
    parser.add_argument("--tasks", type=int, default=200, help="0: none")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--events", type=int, default=1_000_000, help="rows of each recording")
    parser.add_argument("--footers", type=int, default=10_000, help="objects to index; 0: none")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with store() as server, tempfile.TemporaryDirectory() as scratch:
        document: dict[str, Any] = {"machine": machine(), "load": os.getloadavg()[0], "engine": options.engine}
        if options.tasks:
            document |= replays(options, server, Path(scratch))
        if options.footers:
            document["footers a second"] = footers(options.footers, Path(scratch))
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        shown = {name: value for name, value in document.items() if not isinstance(value, dict)}
        rates = {f"footers a second, {name}": rate for name, rate in document.get("footers a second", {}).items()}
        for name, value in (shown | rates).items():
            print(f"{name}: {value:,.3f}" if isinstance(value, float) else f"{name}: {value}")
    if options.tasks and document["CPU outside, share of a task of a second"] > OVERHEAD:
        raise SystemExit(f"benchmarks.fleet_replay: more than {OVERHEAD:.0%} of a task of a second is no replay")
    if options.tasks and document["load"] < 1 and document["two workers, times one"] < SPEEDUP:
        raise SystemExit(f"benchmarks.fleet_replay: two workers are less than {SPEEDUP:g} times one")


if __name__ == "__main__":
    main()
