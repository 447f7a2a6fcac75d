# SPDX-License-Identifier: Apache-2.0
"""Measures what recording costs: one live workload, bare and under each recorder in turns, over the same tracepoints.

    python -m benchmarks.record [--rounds 3] [--loops 10000] [--json]

The workload is the scenario `storm` of the test VMM, which runs a fixed number of loops. Every recorder starts the same
command and records the whole machine; a run during which another VM was alive is repeated. A recorder that is missing
or was refused stays in the table, with the reason. A second table reads the rings of the same storm in bulk and by
bcc's callbacks (benchmarks/drain.py).

Slow-down: the time inside KVM_RUN per loop, divided by that of the bare run of the same round; it includes the work of
the probes. Events lost: as the tool says. Unaccounted: the events per loop that kvmtrace's counters saw, less those
that the tool kept or says it lost. It is not 0 where a tool loses events silently, or where somebody else's BPF program
swallows perf's events. Recorder CPU: user and system time of everything that the recorder started, from its start to
the finished file (for kvmtrace this includes compiling the probes and writing the Parquet file), less that of the
workload, which includes the probes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.drain import WAYS, Drained
from benchmarks.drain import run as drain
from benchmarks.measure import Run, measure_undisturbed, storm
from benchmarks.recorders import KINDS, RING_BYTES, recorders
from tracer.probing import host
from traces.errors import ENVIRONMENT, VERDICT_FAILED, Problem

BYTES_PER_LOOP = 200_000  # on disk, at most: perf stores some 1,590 events of 90 bytes each for a loop
WANTED_RATIO = 10.0  # events per CPU second read in bulk, over those read by bcc's callbacks

Row = list[str]


def say(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def compare(rounds: int, loops: int, timeout: float) -> list[list[Run]]:
    """Run every recorder once in each round, the bare workload first, and return the runs by round.

    A recorder that could not run is not tried again in later rounds. Raises Problem where the workload alone does not
    run.
    """
    done: list[list[Run]] = []
    failed: dict[str, Run] = {}
    for number in range(rounds):
        done.append([])
        for recorder in recorders():
            say(f"round {number + 1} of {rounds}: {recorder.name}")
            run = failed.get(recorder.name) or measure_undisturbed(recorder, loops, timeout)
            if run.why:
                failed[recorder.name] = run
            done[-1].append(run)
    if why := done[0][0].why:
        raise Problem(f"the workload alone does not run: {why}", ENVIRONMENT)
    return done


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Return the median, followed by the range unless all values look the same: `3.10 (2.90 to 3.40)`."""
    middle, low, high = (f"{value:{form}}" for value in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def slow_downs(rounds: list[list[Run]], column: int) -> list[float]:
    """Return, for each round, a recorder's guest time per loop divided by that of the bare run."""
    pairs = [(runs[column], runs[0]) for runs in rounds if not runs[column].why and not runs[0].why]
    return [(run.guest_seconds / run.loops) / (bare.guest_seconds / bare.loops) for run, bare in pairs]


def events_per_loop(rounds: list[list[Run]]) -> float:
    """Return the median number of events per loop by kvmtrace's counters.

    It includes a share of the events outside loops.

    Raises Problem where kvmtrace did not record.
    """
    counted = [run for runs in rounds for run in runs if run.kept and "emitted" in run.kept.extra]
    if not counted:
        raise Problem(f"kvmtrace did not record: {rounds[0][1].why}", VERDICT_FAILED)
    return statistics.median(run.kept.extra["emitted"] / run.loops for run in counted if run.kept)


def recorder_rows(rounds: list[list[Run]]) -> list[Row]:
    rows: list[Row] = []
    expected = events_per_loop(rounds)
    for column, first in enumerate(rounds[0]):
        runs = [runs[column] for runs in rounds if not runs[column].why]
        if not runs:
            rows.append([first.recorder, first.why, *[""] * 7])
            continue
        kept = [run.kept for run in runs if run.kept]
        lost = [one.lost for one in kept if one.lost is not None]
        missing = [run.loops * expected - run.kept.events - (run.kept.lost or 0) for run in runs if run.kept]
        row = [first.recorder, spread([run.guest_seconds for run in runs]), spread(slow_downs(rounds, column), ".1f")]
        if column == 0:
            rows.append([*row, *["-"] * 6])
            continue
        rows.append([
            *row,
            spread([one.events for one in kept], ",.0f"),
            spread(lost, ",.0f") if lost else "some; it does not say how many",
            spread([round(100 * one / expected / runs[0].loops, 2) + 0.0 for one in missing], ".2f") + " %",
            spread([one.size / one.events for one in kept if one.events], ".2f"),
            spread([run.recorder_cpu_seconds for run in runs], ".1f"),
            spread([run.whole_seconds for run in runs], ".1f"),
        ])  # fmt: skip
    return rows


def drain_rows(drained: list[Drained]) -> list[Row]:
    rows = []
    for way in WAYS:
        runs = [run for run in drained if run.way == way]
        rows.append([
            way,
            spread([run.emitted for run in runs], ",.0f"),
            spread([run.read for run in runs], ",.0f"),
            spread([run.lost for run in runs], ",.0f"),
            spread([run.cpu_seconds for run in runs]),
            spread([run.per_cpu_second / 1e6 for run in runs]),
        ])  # fmt: skip
    return rows


def ratios(drained: list[Drained]) -> list[float]:
    """Return, for each round, the events read in bulk per CPU second divided by those read by callbacks."""
    bulk, callback = ([run.per_cpu_second for run in drained if run.way == way] for way in WAYS)
    return [one / other for one, other in zip(bulk, callback, strict=True)]


def table(head: Row, rows: list[Row]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] + ["---:"] * (len(head) - 1), *rows))


def machine() -> dict[str, Any]:
    return {"date": date.today().isoformat(), "kernel": platform.release(), "cpu": host.cpu().get("model", ""),
            "cpus": os.cpu_count(), "load": os.getloadavg()[0]}  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.record", description="What recording costs, tool by tool.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loops", type=int, default=10_000, help="of the storm; 10,000 are about 2 s bare")
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds that one run may take")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.loops < 10 or options.timeout < 1:
        parser.error("--rounds from 1, --loops from 10, --timeout from 1")
    return options


def benchmark(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if os.geteuid() != 0 or not Path("/dev/kvm").exists():
        raise Problem("recording needs root and /dev/kvm: run it with sudo on a machine with KVM", ENVIRONMENT)
    if shutil.disk_usage(tempfile.gettempdir()).free < options.loops * BYTES_PER_LOOP:
        raise Problem(f"{tempfile.gettempdir()}: too little room for perf.data: set TMPDIR, or lower --loops")
    facts = machine()
    rounds = compare(options.rounds, options.loops, options.timeout)
    drained = []
    for number in range(options.rounds):
        for way in WAYS:
            say(f"round {number + 1} of {options.rounds}: drain, {way}")
            drained.append(drain(way, storm(options.loops, options.timeout), options.timeout))
    ratio = statistics.median(ratios(drained))
    if options.json:
        document = {
            "schema": 1, **facts, "loops": options.loops, "ring_bytes_per_cpu": RING_BYTES, "kinds": list(KINDS),
            "rounds": [[asdict(run) for run in runs] for runs in rounds],
            "slow_down": {run.recorder: slow_downs(rounds, column) for column, run in enumerate(rounds[0])},
            "drain": [{**asdict(run), "events_per_cpu_second": run.per_cpu_second} for run in drained],
            "drain_ratio": ratio,
        }  # fmt: skip
        print(json.dumps(document, indent=2))
    else:
        print(
            f"{facts['date']}, kernel {facts['kernel']}, {facts['cpu']}, {facts['cpus']} CPUs, load before "
            f"{facts['load']:.1f}; storm of {options.loops:,} loops, medians (and ranges) of {options.rounds} rounds\n"
        )
        head = ["recorder", "guest, s", "slow-down", "events kept", "events lost", "unaccounted", "bytes an event"]
        print(table([*head, "recorder CPU, s", "start to file, s"], recorder_rows(rounds)))
        if beside := sum(run.disturbed for runs in rounds for run in runs):
            print(f"\n{beside} runs had another VM alive during them, whose events are counted in.")
        head = ["drain", "events", "read", "lost", "CPU of the drain, s", "million events a CPU second"]
        print("\n" + table(head, drain_rows(drained)))
        print(f"\nIn bulk over callbacks: {spread(ratios(drained), '.1f')} (wanted: at least {WANTED_RATIO:g}).")
    return 0 if ratio >= WANTED_RATIO else VERDICT_FAILED


def main() -> None:
    try:
        code = benchmark(sys.argv[1:])
    except (Problem, subprocess.TimeoutExpired) as problem:
        print(f"benchmarks.record: {problem}", file=sys.stderr)
        code = problem.code if isinstance(problem, Problem) else ENVIRONMENT
    raise SystemExit(code)


if __name__ == "__main__":
    main()
