# SPDX-License-Identifier: Apache-2.0
"""Measures what a flight recorder costs the guests, next to other recorders that people keep running today, in one run.

    python -m benchmarks.flight_overhead [--scenario storm] [--rounds 3] [--loops 5000] [--json]
    python -m benchmarks.flight_overhead --lab 6.1-async [--rounds 3] [--loops 20] [--json]

The workload is a scenario of the test VMM at its full rate, run in pairs: bare, then under one recorder. `storm` is for
a KVM that emulates in software, `smi-storm` for one with nested paging. The slow-down is the CPU time of the VMM's
process, which includes the probes that run in it, divided by that of the bare run just before. The slow-down of the
wall clock is printed as well, but says little on a busy machine. The recorder's CPU time is that of all other processes
of its process tree, its start included.

With `--lab` everything runs in one guest of that kernel, on one CPU whose clock counts instructions, so that other load
on this machine changes no figure. A VM exit is as cheap there as any other instruction.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, Final

from benchmarks.flight_recorders import SCENARIOS, Scenario, flight, recorders
from benchmarks.measure import measure_undisturbed
from benchmarks.record import machine, spread, table
from benchmarks.recorders import Recorder, bare_command, bare_read
from tracer.lab.fetch import fetch
from tracer.lab.session import boot, compiled_probes
from traces.errors import ENVIRONMENT, Problem

WANTED: Final = {"mmu": 2.5, "roots": 1.05}  # the largest slow-down of the VMM's CPU time, by preset of events
LAB_SCENARIO: Final = "smi-storm"
_CPU: Final = "amd-icount"
_MEMORY: Final = 4096  # MiB of the lab guest, whose memory also holds the files that recorders write
_LAB_TIMEOUT: Final = 7200.0

Document = dict[str, Any]
_Pair = Sequence[Mapping[str, Any]]


def measured(scenario: Scenario, rounds: int, loops: int, timeout: float) -> Document:
    """Run every recorder `rounds` times, each after a bare run, and return the document that `--json` prints.

    Raises Problem without root or /dev/kvm, and where the workload alone does not run.
    """
    if os.geteuid() != 0 or not Path("/dev/kvm").exists():
        raise Problem("needs root and /dev/kvm", ENVIRONMENT)
    facts, bare = machine(), Recorder("bare", sys.executable, bare_command, bare_read)
    pairs: dict[str, list[list[dict[str, Any]]]] = {}
    for number in range(rounds):
        for recorder in recorders(scenario.tracepoints()):
            print(f"round {number + 1} of {rounds}: {recorder.name}", file=sys.stderr, flush=True)
            pair = [measure_undisturbed(each, loops, timeout, scenario.words) for each in (bare, recorder)]
            if pair[0].why:
                raise Problem(f"the workload alone does not run: {pair[0].why}", ENVIRONMENT)
            pairs.setdefault(recorder.name, []).append([asdict(run) for run in pair])
    return {"schema": 2, **facts, "scenario": " ".join(scenario.words), "loops": loops, "pairs": pairs}


def in_lab(kernel: str, scenario: str, rounds: int, loops: int, timeout: float) -> Document:
    """Take the same measurement in a guest of the lab that runs this kernel, and return its document.

    Raises Problem.
    """
    booted = fetch(kernel, lambda line: print(line, file=sys.stderr))
    asked = {"scenario": scenario, "rounds": rounds, "loops": loops, "timeout": timeout}
    options = [f"--{name}={value}" for name, value in asked.items()]
    done = boot(
        booted,
        [sys.executable, "-m", "benchmarks.flight_overhead", "--json", *options],
        cpu=_CPU,
        probes=compiled_probes(booted),
        memory=_MEMORY,
        timeout=_LAB_TIMEOUT,
    )
    if done.code or done.signalled:
        raise Problem(f"in the guest of kernel {kernel}: {done.stderr.strip()[-300:]}", ENVIRONMENT)
    return {**json.loads(done.stdout), "date": date.today().isoformat(), "lab": kernel}


def ratios(pairs: Sequence[_Pair], figure: str) -> list[float]:
    """Return, for each pair, a figure under the recorder divided by that of the bare run."""
    return [recorded[figure] / bare[figure] for bare, recorded in pairs]


def ran(pairs: Sequence[_Pair]) -> list[_Pair]:
    """Return the pairs in which the recorder could be run."""
    return [pair for pair in pairs if not pair[1]["why"]]


def rows(document: Document) -> Iterator[list[str]]:
    """Yield one table row for each recorder: medians and ranges over its pairs."""
    for name, pairs in document["pairs"].items():
        good = ran(pairs)
        if not good:
            yield [name, pairs[0][1]["why"], "", "", "", ""]
            continue
        kept = [recorded["kept"] for _, recorded in good]
        counts = any(one["events"] for one in kept)
        lost = [one["lost"] for one in kept if one["lost"] is not None]
        yield [
            name, spread(ratios(good, "work_cpu_seconds")), spread(ratios(good, "guest_seconds")),
            spread([recorded["recorder_cpu_seconds"] for _, recorded in good], ".1f"),
            spread([one["events"] for one in kept], ",.0f") if counts else "none",
            spread(lost, ",.0f") if lost and counts else "the rest, overwritten" if counts else "",
        ]  # fmt: skip


def text(document: Document) -> str:
    """Return the table with the machine that it was measured on, and the slow-downs next to the wanted ones."""
    where = f"{document['date']}, kernel {document['kernel']}"
    where += f" ({document['lab']}, {_CPU} of the lab)" if "lab" in document else f", load {document['load']:.1f}"
    where += f", {document['cpu']}, {document['cpus']} CPU{'' if document['cpus'] == 1 else 's'}"
    rounds = max(map(len, document["pairs"].values()))
    what = f"{document['scenario']} of {document['loops']:,} loops, medians (and ranges) of {rounds} pairs"
    head = ["recorder", "slow-down, CPU", "slow-down, clock", "recorder CPU, s", "events kept", "events lost"]
    lines = [f"{where}; {what}", "", table(head, list(rows(document)))]
    for preset, most in WANTED.items():
        if good := ran(document["pairs"].get(flight(preset), ())):
            found = statistics.median(ratios(good, "work_cpu_seconds"))
            lines += ["", f"{preset}: {found:.2f}x of bare (wanted: at most {most:g}x)"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.flight_overhead", description="What a flight recorder costs.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lab", metavar="KERNEL", help="in a guest of this kernel of the lab")
    parser.add_argument("--scenario", choices=SCENARIOS, help=f"of the VMM: storm, with --lab {LAB_SCENARIO}")
    parser.add_argument("--loops", type=int, help="of the scenario; 10,000 of storm are about 2 s bare")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds that one run may take")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = options.scenario or (LAB_SCENARIO if options.lab else "storm")
    scenario = SCENARIOS[chosen]
    asked = (options.rounds, options.loops or scenario.loops, options.timeout)
    try:
        document = in_lab(options.lab, chosen, *asked) if options.lab else measured(scenario, *asked)
    except (Problem, subprocess.TimeoutExpired) as problem:
        print(f"benchmarks.flight_overhead: {problem}", file=sys.stderr)
        raise SystemExit(ENVIRONMENT) from None
    print(json.dumps(document, indent=2) if options.json else text(document))


if __name__ == "__main__":
    main()
