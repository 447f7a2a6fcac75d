# SPDX-License-Identifier: Apache-2.0
"""What an engine and a store add to replaying many recordings, what a second worker brings, how fast footers are read.

    python -m benchmarks.fleet_replay [--engine local] [--tasks 200] [--rounds 8] [--wait SECONDS] [--footers 10000]

One synthetic recording under many names in a store on loopback (moto, in a process of its own). Each round replays as
many tasks in a plain loop over the file, with one worker and with two, one after the other, so that what else the
machine does is in all three; the figures are medians of the rounds' ratios. With `--wait` tasks wait so long instead of
replaying, which measures the engine and the store alone, on whatever machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.record import machine, say
from replay.fleet import engines, fleet_catalogue, fleet_run, fleet_task
from replay.fleet.fleet_catalogue import Catalogue
from replay.fleet.fleet_task import FleetTask, PolicyText
from replay.fleet.results import ResultFolder
from tests.fleet.servers import BUCKET, environment, s3
from traces.reader import Trace
from traces.stores.location import location
from traces.stores.object_store import Objects
from traces.synth import Parameters, synthesize

POLICIES: Final = (PolicyText("async"), PolicyText("preserve"))
ENDPOINT: Final = f"s3://{BUCKET}"


def wait(seconds: float, task: FleetTask) -> str:
    """A task that takes so long, and reads and writes what one does."""
    time.sleep(seconds)
    return fleet_task.perform(task)


@contextmanager
def store() -> Iterator[None]:
    """A bucket on loopback, in this process's environment and that of its workers."""
    with s3() as port:
        os.environ.update(environment(port))
        yield


def filled(prefix: str, data: bytes, count: int) -> str:
    """A place with so many objects of these bytes."""
    place = f"{ENDPOINT}/{prefix}"
    objects = Objects(location(place))
    for number in range(count):
        objects.create(f"host=h{number:05}/trace.parquet", data)
    return place


def replays(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Seconds of each round: plain, one worker, two workers."""
    file = scratch / "trace.parquet"
    events = 2_000 if options.wait else options.events
    synthesize(file, Parameters(policy="async", vms=1, vcpus=2, events=events))
    place = filled("traces", file.read_bytes(), options.tasks)
    catalogue = fleet_catalogue.index(location(place)).catalogue
    perform: Callable[[FleetTask], str] = partial(wait, options.wait) if options.wait else fleet_task.perform
    each = max(options.tasks // options.rounds, 1)
    found: dict[str, list[float]] = {"plain": [], "one worker": [], "two workers": []}
    with engines.opened(options.engine, 1) as one, engines.opened(options.engine, 2) as two:
        for number in range(options.rounds + 1):  # the first warms up
            rows = catalogue.rows.slice(max(number - 1, 0) * each, each)
            taken = {"plain": plain(file, rows.height, options.wait)}
            for name, engine in (("one worker", one), ("two workers", two)):
                taken[name] = by(engine, catalogue, rows, perform, f"results/{options.engine}-{number}-{name[:3]}")
            if number:
                for name, seconds in taken.items():
                    found[name].append(seconds)
                say(f"round {number}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in taken.items()))
    return {"tasks of a round": each, **found}


def plain(file: Path, count: int, waits: float) -> float:
    """So many replays of the file one after the other, without store or engine."""
    if waits:
        return count * waits
    task = FleetTask("", "trace.parquet", "", 0, 1, 0, POLICIES, "", fleet_task.made_by())
    began = time.monotonic()
    for _ in range(count):
        fleet_task.rows_for(Trace.open(file), task)
    return time.monotonic() - began


def by(engine: Any, catalogue: Catalogue, rows: Any, perform: Callable[[FleetTask], str], name: str) -> float:
    """The same as a fleet."""
    folder = ResultFolder(location(f"{ENDPOINT}/{name}"))
    folder.claim({"policies": [each.mark for each in POLICIES]})
    tasks = fleet_run.tasks_of(catalogue, rows, POLICIES, folder.place.text)
    done = fleet_run.run(tasks, folder, engine, 1 << 40, perform=perform)
    assert done.done == len(tasks), done.failed[:3]
    return done.seconds


def footers(count: int, scratch: Path) -> dict[str, float]:
    """Footers a second: of so many objects, many at a time; of some of them, one at a time."""
    file = scratch / "small.parquet"
    synthesize(file, Parameters(duration=0.02))
    place = filled("many", file.read_bytes(), count)
    few = filled("few", file.read_bytes(), max(count // 20, 1))
    rates = {}
    for name, where, readers in (("one at a time", few, 1), ("32 at a time", place, fleet_catalogue.READERS)):
        fleet_catalogue.READERS = readers  # type: ignore[misc]
        began = time.monotonic()
        found = fleet_catalogue.index(location(where))
        rates[name] = found.read / (time.monotonic() - began)
    folder = scratch / "many"
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.parquet").hardlink_to(file)
    began = time.monotonic()
    fleet_catalogue.index(location(str(folder)))
    rates["of a folder"] = count / (time.monotonic() - began)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.fleet_replay", description="What a fleet's replay takes.")
    parser.add_argument("--engine", default="local", choices=["local", "dask"])
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--events", type=int, default=400_000, help="rows of each recording: about a second's work")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds that each task waits instead of replaying")
    parser.add_argument("--footers", type=int, default=10_000, help="objects to index; 0: none")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with store(), tempfile.TemporaryDirectory() as scratch:
        document: dict[str, Any] = {"machine": machine(), "load": os.getloadavg()[0], "engine": options.engine}
        if options.tasks:
            rounds = replays(options, Path(scratch))
            ones, twos, plains = rounds["one worker"], rounds["two workers"], rounds["plain"]
            document["rounds"] = rounds
            document["two workers, times one"] = statistics.median(a / b for a, b in zip(ones, twos, strict=True))
            document["store and engine, share of one worker's time"] = statistics.median(
                1 - a / b for a, b in zip(plains, ones, strict=True)
            )
        if options.footers:
            document["footers a second"] = footers(options.footers, Path(scratch))
    if options.json:
        print(json.dumps(document, indent=2))
        return
    for name in ("machine", "load", "engine", "two workers, times one", "store and engine, share of one worker's time"):
        if name in document:
            print(f"{name}: {document[name]:.3f}" if isinstance(document[name], float) else f"{name}: {document[name]}")
    for name, rate in document.get("footers a second", {}).items():
        print(f"footers a second, {name}: {rate:,.0f}")


if __name__ == "__main__":
    main()
