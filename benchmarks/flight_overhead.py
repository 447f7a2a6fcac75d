# SPDX-License-Identifier: Apache-2.0
"""What a flight recorder costs the guests, and recorders that people keep running today: all in one run.

    python -m benchmarks.flight_overhead [--rounds 3] [--loops 5000] [--json]

The workload is that of benchmarks.record (VMM scenario `storm`, at its full rate), each time bare and then under one
recorder. Slow-down is the CPU time of the workload's own process, which its probes are part of, over that of the bare
run just before: on a busy machine the time on the clock says little, and is given as well. The recorder's CPU time is
that of everything else in its process tree, its start included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.measure import Run, measure_undisturbed
from benchmarks.record import machine, spread, table
from benchmarks.recorders import NAMES, RING_BYTES, Kept, Recorder, bare_command, bare_read, perf_read
from traces.errors import ENVIRONMENT, Problem

PRESETS = ("all", "mmu", "time", "roots")
WANTED = {"mmu": 2.5, "roots": 1.05}


def flight_command(preset: str, *more: str) -> Callable[[Path, Sequence[str]], list[str]]:
    def command(scratch: Path, workload: Sequence[str]) -> list[str]:
        options = ["--flight", "30s", "--events", preset, *more, "--json", "-o", str(scratch / "dumps")]
        return [sys.executable, "-m", "kvmtrace", "record", *options, "--", *workload]

    return command


def flight_read(scratch: Path) -> Kept:
    said = json.loads((scratch / "stdout").read_text())
    return Kept(said["events"], said["lost"], 0)


def overwrite_command(scratch: Path, workload: Sequence[str]) -> list[str]:
    """perf's own flight recorder: the ring is overwritten, and read at the end."""
    options = ["-q", "-a", "--overwrite", "-m", str(RING_BYTES // 4096), "-e", ",".join(NAMES)]
    return ["perf", "record", *options, "-o", str(scratch / "perf.data"), "--", *workload]


def overwrite_read(scratch: Path) -> Kept:
    kept = perf_read(scratch)
    return Kept(kept.events, None, kept.size)


def live_command(scratch: Path, workload: Sequence[str]) -> list[str]:
    """`perf kvm stat live` runs no command of its own: it is begun before, and ended after."""
    script = 'cd "$0"; perf kvm stat live -d 1 >live 2>&1 & p=$!; sleep 1; "$@"; s=$?; kill -INT $p; wait $p; exit $s'
    return ["sh", "-c", script, str(scratch), *workload]


def recorders() -> tuple[Recorder, ...]:
    """All that are compared."""
    flights = [
        Recorder(f"--flight --events {each}", sys.executable, flight_command(each), flight_read) for each in PRESETS
    ]
    bounded = flight_command("mmu", "--max-overhead", "1%")
    return (
        *flights,
        Recorder("--flight --max-overhead 1%", sys.executable, bounded, flight_read),
        Recorder("perf record -a --overwrite", "perf", overwrite_command, overwrite_read),
        Recorder("perf kvm stat live", "perf", live_command, bare_read),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.flight_overhead", description="What a flight recorder costs.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loops", type=int, default=5_000, help="of the storm; 10,000 are about 2 s bare")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds that one run may take")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if os.geteuid() != 0 or not Path("/dev/kvm").exists():
        raise SystemExit("benchmarks.flight_overhead: needs root and /dev/kvm")
    facts, bare = machine(), Recorder("bare", sys.executable, bare_command, bare_read)
    pairs: dict[str, list[tuple[Run, Run]]] = {}
    try:
        for number in range(options.rounds):
            for recorder in recorders():
                print(f"round {number + 1} of {options.rounds}: {recorder.name}", file=sys.stderr)
                pair = [measure_undisturbed(each, options.loops, options.timeout) for each in (bare, recorder)]
                if pair[0].why:
                    raise Problem(f"the workload alone does not run: {pair[0].why}", ENVIRONMENT)
                pairs.setdefault(recorder.name, []).append((pair[0], pair[1]))
    except (Problem, subprocess.TimeoutExpired) as problem:
        print(f"benchmarks.flight_overhead: {problem}", file=sys.stderr)
        raise SystemExit(ENVIRONMENT) from None
    if options.json:
        runs = {name: [[asdict(run) for run in pair] for pair in each] for name, each in pairs.items()}
        print(json.dumps({"schema": 1, **facts, "loops": options.loops, "pairs": runs}, indent=2))
        return
    rows, slow = [], {}
    for name, each in pairs.items():
        good = [(one, other) for one, other in each if not other.why]
        if not good:
            rows.append([name, each[0][1].why, "", "", "", ""])
            continue
        ratios = [other.work_cpu_seconds / one.work_cpu_seconds for one, other in good]
        slow[name] = statistics.median(ratios)
        kept = [other.kept for _, other in good if other.kept is not None]
        counts = any(one.events for one in kept)
        lost = [one.lost for one in kept if one.lost is not None]
        rows.append([
            name, spread(ratios), spread([other.guest_seconds / one.guest_seconds for one, other in good]),
            spread([other.recorder_cpu_seconds for _, other in good], ".1f"),
            spread([one.events for one in kept], ",.0f") if counts else "none",
            spread(lost, ",.0f") if lost and counts else "the rest, overwritten" if counts else "",
        ])  # fmt: skip
    where = f"{facts['date']}, kernel {facts['kernel']}, {facts['cpu']}, {facts['cpus']} CPUs, load {facts['load']:.1f}"
    print(f"{where}; storm of {options.loops:,} loops, medians (and ranges) of {options.rounds} pairs\n")
    head = ["recorder", "slow-down, CPU", "slow-down, clock", "recorder CPU, s", "events kept", "events lost"]
    print(table(head, rows))
    for preset, most in WANTED.items():
        if (found := slow.get(f"--flight --events {preset}")) is not None:
            print(f"\n{preset}: {found:.2f}x of bare (wanted: at most {most:g}x)")


if __name__ == "__main__":
    main()
