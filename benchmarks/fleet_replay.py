# SPDX-License-Identifier: Apache-2.0
"""Measures the replay of many recordings: what engine and object store add, what a second worker gains, footer rates.

    python -m benchmarks.fleet_replay [--engine local] [--tasks 200] [--rounds 4] [--footers 10000] [--json]

One synthetic recording is put under many names into an object store on the loopback interface (moto, a process of its
own on the same CPUs). In each round the same number of tasks is done by one worker and then by two. The output has

- the wall time of one worker divided by that of two, the median of the rounds, which is meaningful on an idle machine
only. Next to it is the same ratio for two processes that replay the same file and do nothing else, because two CPUs may
be hardware threads of one core; - CPU seconds outside of the tasks, for each task, of all processes but the store's;
other load on the machine does not count. A task is the replay of its rows; outside of it are the scheduler, the
executor, the store's client, opening the recording and writing the result, but not the start of processes. This cost
does not grow with a task, so that tasks may be shorter than the second that it is compared with. What an engine with
one worker uses in a second without work (its heartbeat) is measured separately, and is added to a task of one second; -
footers that an index reads in a second, compared with the rate at which the same client gets the same bytes from the
same server and does nothing with them.
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
SPEEDUP: Final = 1.8  # of two workers over one, at the least, on an idle machine
OVERHEAD: Final = 0.1  # the largest share of a task of one second that may be spent outside of its replay


@dataclass(frozen=True)
class MeasuredRun:
    """Tasks done by one or two workers: wall clock seconds, and CPU seconds spent in the tasks and outside of them."""

    tasks: int
    seconds: float
    inside: float
    outside: float


def counting(folder: str, task: FleetTask) -> str:
    """Perform a task, and append the CPU seconds of its replay to a file in `folder` that is named after the process.

    A worker process does one task at a time. Returns what fleet_task.perform returns.
    """
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
    """Replay a local file under POLICIES, without a store or an engine, and return the number of result rows."""
    task = FleetTask("", "trace.parquet", "", 0, 1, 0, POLICIES, "", fleet_task.made_by())
    return len(fleet_task.rows_for(Trace.open(Path(file)), task))


@contextmanager
def store() -> Iterator[int]:
    """Run an S3 server on the loopback interface, and yield its process ID.

    The environment of this process, which its workers inherit, then refers to that server and its bucket.
    """
    before = set(psutil.Process().children())
    with s3() as port:
        (server,) = set(psutil.Process().children()) - before
        os.environ.update(environment(port))
        yield server.pid


def filled(prefix: str, data: bytes, count: int) -> str:
    """Write `count` objects with this content below a prefix of the bucket, and return their location."""
    place = f"{ENDPOINT}/{prefix}"
    objects = Objects(location(place))
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda number: objects.create(f"host=h{number:05}/trace.parquet", data), range(count)))
    return place


def cpu(but: int) -> float:
    """Return the CPU seconds used so far by this process and its descendants, without the live process `but`."""
    times = psutil.Process().cpu_times()
    spent: float = times.user + times.system + times.children_user + times.children_system
    for each in psutil.Process().children(recursive=True):
        if each.pid != but:
            own = each.cpu_times()
            spent += own.user + own.system + own.children_user + own.children_system
    return spent


def replays(options: argparse.Namespace, server: int, scratch: Path) -> dict[str, Any]:
    """Run all rounds of replay tasks; return the summary's figures and the single runs that they come from."""
    file = scratch / "trace.parquet"
    synthesize(file, Parameters(policy="async", vms=1, vcpus=2, events=options.events))
    place = filled("traces", file.read_bytes(), options.tasks)
    catalogue = fleet_catalogue.index(location(place)).catalogue
    each = max(options.tasks // options.rounds, 1)
    found: dict[int, list[MeasuredRun]] = {1: [], 2: []}
    machines: list[float] = []
    idle: list[float] = []  # CPU seconds per second without work: of the first engine, then of both
    with ExitStack() as open_engines:
        opened: dict[int, Any] = {}
        for workers in (1, 2):
            opened[workers] = open_engines.enter_context(engines.opened(options.engine, workers))
            # A first run, which is not measured: worker processes start and import their modules.
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
    """Return the wall clock seconds of `count` bare replays of a file in the worker processes of an engine."""
    began = time.monotonic()
    list(engine.executor.map(alone, [str(file)] * count))
    return time.monotonic() - began


def by(engine: Any, catalogue: Catalogue, rows: Any, server: int, notes: Path) -> MeasuredRun:
    """Replay one task for each row of the catalogue by an engine, and return what that took."""
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
    """Return footers read in a second, by the way of reading.

    The ways are single requests, concurrent requests, an index of the store with `count` objects, and an index of a
    local folder with as many files.
    """
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
    """Return the figures that the document shows, by name.

    `idle` and `both` are CPU seconds per second without work, of one engine and of both together.
    """
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
