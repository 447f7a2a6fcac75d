# SPDX-License-Identifier: Apache-2.0
"""Measures whole commands: CPU time against decoding the same file, peak memory, two VMs on two cores, and many VMs.

    python -m benchmarks.whole_commands [--events 10000000,100000000] [--rounds 3] [--keep DIRECTORY] [--json]

Recordings are generated (`kvmtrace synth --policy async --smi-rate 1000 --working-set 512`), one for each number of
events. In every round all commands take turns with decoding, a process of its own that reads every column with our
reader (`Trace.open(path).batches()`) and does nothing else. A command's ratio is its CPU time (user and system, of the
process and its children, start-up included) divided by that of decoding in the same round; figures are medians, and
ranges over the rounds. Memory is the peak of the command's largest process. Start-up takes each process some 0.5 s,
which is nothing for 100 million events but much for 10 million, so that ratios have targets only at the largest number
of events.

For the smallest number of events there are two more measurements:

- one recording of two VMs, replayed on one core and on two: how many times as fast the second core makes it;
- recordings of 1,000 VMs, of 100 VMs and of 1,000 vCPUs: what a row costs in `replay`, `report --no-replay` and
  decoding, divided by what it costs in the recording of one VM with one vCPU, and the peak memory. 100 VMs of 10
  million events have as many rows each as 1,000 of 100 million, whose recording takes too long to make.

With `--keep` recordings are made in that directory and stay there; one that exists is not made again.

The first HTML page that a machine makes takes a second and 90 MiB more, because the page's JavaScript is bundled once.

The benchmark does not fail for a figure, because a busy machine is no fault of the code; the table says which figures
miss their target.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.record import machine, say, spread, table
from traces.errors import VERDICT_FAILED, Problem

KVMTRACE: Final = (sys.executable, "-m", "kvmtrace")
STORM: Final = ("--policy", "async", "--smi-rate", "1000", "--working-set", "512")
DECODE: Final = "import sys; from traces.reader import Trace; [None for _ in Trace.open(sys.argv[1]).batches()]"
MEMORY: Final = 350  # target: the most MiB that a command may use
CORES: Final = 1.7  # target: the least speed-up of two VMs by a second core
MANY: Final = 1.5  # target: the most that a row of many VMs may cost, over a row of one VM
MANY_OF: Final = (("--vms", 1000, "VMs"), ("--vms", 100, "VMs"), ("--vcpus", 1000, "vCPUs"))  # recordings of many


@dataclass(frozen=True)
class Command:
    """A measured command; `target` is the largest wanted multiple of decoding's CPU time, None where there is none."""

    name: str
    argv: tuple[str, ...]
    target: float | None = None

    def over(self, path: Path) -> list[str]:
        return [*self.argv, str(path)]


DECODING: Final = Command("decoding", (sys.executable, "-c", DECODE))
COMMANDS: Final = (
    Command("replay --no-time", (*KVMTRACE, "replay", "--no-time"), 2),
    Command("replay", (*KVMTRACE, "replay"), 3),
    Command("report --no-replay", (*KVMTRACE, "report", "--no-replay"), 3),
    Command("report", (*KVMTRACE, "report"), 6),
    Command("report --format html", (*KVMTRACE, "report", "--format", "html"), 8),
)
OF_MANY: Final = (DECODING, *(each for each in COMMANDS if each.name in ("replay", "report --no-replay")))


@dataclass(frozen=True)
class Run:
    """One run: CPU seconds, seconds of the wall clock, and the peak memory of the largest process in bytes."""

    cpu: float
    seconds: float
    peak: int


def run(argv: Sequence[str], cores: frozenset[int] | None = None) -> Run:
    """Run a command once on these cores (by default on all) and return what it took. Raises Problem where it fails."""
    # A child process inherits the CPU affinity of this one.
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        started = time.monotonic()
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finally:
        os.sched_setaffinity(0, before)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise Problem(f"{' '.join(argv)} ended with {child.returncode}", VERDICT_FAILED)
    return Run(usage.ru_utime + usage.ru_stime, time.monotonic() - started, usage.ru_maxrss << 10)


def made(directory: Path, events: int, *options: str) -> Path:
    """Return a generated recording in `directory`, and make it if it is not there.

    A process of its own makes it, because what this process starts later inherits its peak memory.
    """
    path = directory / f"{'-'.join([*(option.strip('-') for option in options), str(events)])}.parquet"
    if not path.exists():
        say(f"whole_commands: making {path.name}")
        run([*KVMTRACE, "synth", str(path), *STORM, "--events", str(events), *options])
    return path


def rows_of(path: Path) -> int:
    told = subprocess.run([*KVMTRACE, "info", "--json", str(path)], stdout=subprocess.PIPE, check=True).stdout
    return int(json.loads(told)["events"])


def in_turns(rounds: int, runs: dict[str, Callable[[], Run]]) -> dict[str, list[Run]]:
    """Run each of the functions once in every round, and return their runs by name."""
    done: dict[str, list[Run]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, one in runs.items():
            say(f"whole_commands: round {number + 1} of {rounds}, {name}")
            done[name].append(one())
    return done


def whole(path: Path, rounds: int) -> dict[str, list[Run]]:
    """Run decoding and every command on one recording, and return the runs by name."""
    every = (DECODING, *COMMANDS)
    return in_turns(rounds, {each.name: lambda each=each: run(each.over(path)) for each in every})  # type: ignore[misc]


def two_cores(path: Path, rounds: int) -> dict[str, list[Run]]:
    """Run `replay` of two VMs on one core and on two; return nothing where this process may use only one core."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        return {}
    argv = (*KVMTRACE, "replay", str(path))
    sets = {"one core": frozenset(cores[:1]), "two cores": frozenset(cores)}
    return in_turns(rounds, {name: lambda on=on: run(argv, on) for name, on in sets.items()})  # type: ignore[misc]


def many(paths: dict[str, Path], rounds: int) -> dict[str, list[Run]]:
    """Run commands on recordings of one VM and of many, and return the runs by command and recording."""
    return in_turns(rounds, {
        f"{each.name}, {name}": lambda each=each, path=path: run(each.over(path))  # type: ignore[misc]
        for name, path in paths.items()
        for each in OF_MANY
    })  # fmt: skip


def ratios(done: dict[str, list[Run]], name: str, of: str, figure: Callable[[Run], float]) -> list[float]:
    """Return, for each round, a figure of one command divided by that of another."""
    return [figure(one) / figure(other) for one, other in zip(done[name], done[of], strict=True)]


def judged(values: Sequence[float], target: float | None, most: bool = True) -> str:
    """Return the target as text, with ": MISSED" if the median of the values does not meet it."""
    if target is None:
        return ""
    middle = sorted(values)[len(values) // 2]
    kept = middle <= target if most else middle >= target
    return f"{'at most' if most else 'at least'} {target:g}{'' if kept else ': MISSED'}"


def whole_table(done: dict[str, list[Run]], events: int, largest: bool) -> str:
    rows = []
    for each in (DECODING, *COMMANDS):
        runs = done[each.name]
        times = ratios(done, each.name, DECODING.name, lambda one: one.cpu)
        peaks = [one.peak / (1 << 20) for one in runs]
        target = each.target if largest else None
        rows.append([
            each.name, spread([one.cpu for one in runs]), spread([one.cpu / events * 1e9 for one in runs], ".0f"),
            spread(times), judged(times, target), f"{max(peaks):,.0f}",
            judged([max(peaks)], MEMORY if each is not DECODING else None),
        ])  # fmt: skip
    head = [f"{events:,} events", "CPU s", "ns a row", "times decoding", "target", "peak MiB", "target"]
    return table(head, rows)


def many_rows(done: dict[str, list[Run]], rows: dict[str, int]) -> list[list[str]]:
    found = []
    one, *others = rows
    for name in others:
        for each in OF_MANY:
            runs = done[f"{each.name}, {name}"]
            times = ratios(done, f"{each.name}, {name}", f"{each.name}, {one}", lambda run: run.cpu)
            times = [value * rows[one] / rows[name] for value in times]
            peak = max(run.peak for run in runs) / (1 << 20)
            of_command = each is not DECODING
            found.append([
                f"{each.name}: CPU time a row of {name}, over one VM's", spread(times),
                judged(times, MANY if of_command else None), f"{peak:,.0f}",
                judged([peak], MEMORY if of_command else None),
            ])  # fmt: skip
    return found


def many_table(directory: Path, events: int, rounds: int, document: dict[str, Any]) -> str:
    """Return the table of two VMs on two cores and of many VMs, and add what was measured to the document."""
    paths = {"one VM": made(directory, events)}
    for option, count, label in MANY_OF:
        paths[f"{count:,} {label}"] = made(directory, events, option, str(count))
    done = many(paths, rounds)
    cores = two_cores(made(directory, events, "--vms", "2"), rounds)
    document |= {"many": plain(done), "cores": plain(cores)}
    rows = many_rows(done, {name: rows_of(path) for name, path in paths.items()})
    what = "replay of two VMs: speed of two cores, over one's"
    if cores:
        speeds = ratios(cores, "one core", "two cores", lambda run: run.seconds)
        peak = max(run.peak for runs in cores.values() for run in runs) / (1 << 20)
        target = judged(speeds, CORES, most=False)
        rows.insert(0, [what, spread(speeds), target, f"{peak:,.0f}", judged([peak], MEMORY)])
    else:
        rows.insert(0, [what, "not measured: this process may run on one core only", "", "", ""])
    return table([f"{events:,} events", "times", "target", "peak MiB", "target"], rows)


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.whole_commands", description="What whole commands cost.")
    parser.add_argument("--events", default="10000000,100000000", help="of the recordings, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="of recordings, for the next time")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    numbers = options.events.split(",")
    if options.rounds < 1 or not all(each.isdigit() and int(each) >= 100_000 for each in numbers):
        parser.error("--rounds from 1, --events from 100,000")
    options.events = sorted(map(int, numbers))
    return options


def main() -> None:
    options = options_of()
    facts = machine()
    document: dict[str, Any] = {"schema": 2, **facts}
    texts = []
    with tempfile.TemporaryDirectory(prefix="kvmtrace-bench-") as name:
        directory = options.keep or Path(name)
        directory.mkdir(parents=True, exist_ok=True)
        for events in options.events:
            largest = events == options.events[-1]
            path = made(directory, events)
            done = whole(path, options.rounds)
            of_these = document[str(events)] = {"commands": plain(done)}
            texts.append(whole_table(done, rows_of(path), largest))
            if events == options.events[0]:
                texts.append(many_table(directory, events, options.rounds, of_these))
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        print(f"{facts['date']}: {facts['cpu']}, {facts['cpus']} CPUs, load {facts['load']:.1f}\n")
        print("\n\n".join(texts))


def plain(done: dict[str, list[Run]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [asdict(each) for each in runs] for name, runs in done.items()}


if __name__ == "__main__":
    try:
        main()
    except Problem as problem:
        print(f"benchmarks.whole_commands: {problem}", file=sys.stderr)
        sys.exit(problem.code)
