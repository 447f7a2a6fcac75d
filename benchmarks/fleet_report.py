# SPDX-License-Identifier: Apache-2.0
"""Measures `kvmtrace fleet report` on 10 million rows of generated results: its time and its peak memory.

    python -m benchmarks.fleet_report [--rows 10000000] [--rounds 3] [--json]

A seeded generator (benchmarks/fleet_rows.py) makes the rows, once with rows of vCPUs, as replays write them, and once
with rows of VMs only, all of which the report uses. Each report is a process of its own; times are those of the wall
clock, memory is the peak. The HTML page of 10,000 hosts is made as well, and its size printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Final

from benchmarks.fleet_rows import Fleet, write
from benchmarks.record import machine, say, spread, table

SECONDS: Final = 10.0
BYTES: Final = 1 << 30
KVMTRACE: Final = (sys.executable, "-m", "kvmtrace")
_HOSTS: Final = 1000
_DAYS: Final = 10


@dataclass(frozen=True)
class MeasuredReport:
    """One run: seconds of the wall clock, CPU seconds, and the peak of resident memory in bytes."""

    seconds: float
    cpu: float
    peak: int


def run(results: Path, *more: str) -> MeasuredReport:
    """Run `kvmtrace fleet report` once with these additional arguments, and return what it took."""
    begun = time.monotonic()
    child = subprocess.Popen(
        [*KVMTRACE, "fleet", "report", str(results), *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"benchmarks.fleet_report: {child.args!r} ended with {child.returncode}")
    return MeasuredReport(time.monotonic() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10)


def made(fleet: Fleet, directory: Path) -> int:
    """Write the rows of a fleet in a process of its own, and return how many they are.

    In this process its memory would count: a child's peak starts from its parent's.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(write, fleet, directory).result()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.fleet_report", description="How fast a fleet is reported on.")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    recordings = _HOSTS * _DAYS
    # A VM has a row for each of three policies, and in the first set one for each of its 4.5 vCPUs as well.
    fleets = {
        "VMs and vCPUs": Fleet(_HOSTS, _DAYS, max(round(options.rows / recordings / 16.5), 1)),
        "VMs only": Fleet(_HOSTS, _DAYS, max(round(options.rows / recordings / 3), 1), vcpu_rows=False),
    }
    found: dict[str, tuple[int, list[MeasuredReport]]] = {}
    with tempfile.TemporaryDirectory(prefix="kvmtrace-bench-") as name:
        for number, (title, fleet) in enumerate(fleets.items()):
            say(f"fleet_report: making rows, {title}")
            rows = made(fleet, Path(name) / str(number))
            runs = []
            for turn in range(options.rounds):
                say(f"fleet_report: {title}, round {turn + 1}")
                runs.append(run(Path(name) / str(number)))
            found[title] = (rows, runs)
        say("fleet_report: the page of 10,000 hosts")
        rows = made(Fleet(10_000, 2, 2, vcpu_rows=False), Path(name) / "hosts")
        page = Path(name) / "page.html"
        found["page of 10,000 hosts"] = (rows, [run(Path(name) / "hosts", "--format", "html", "-o", str(page))])
        size = page.stat().st_size
    if options.json:
        runs_of = {
            title: {"rows": rows, "runs": [asdict(each) for each in runs]} for title, (rows, runs) in found.items()
        }
        print(json.dumps({"machine": machine(), "page_bytes": size, "sets": runs_of}, indent=1))
    else:
        lines = [
            [title, f"{rows:,}", spread([each.seconds for each in runs]), spread([each.cpu for each in runs]),
             f"{max(each.peak for each in runs) >> 20:,}"]
            for title, (rows, runs) in found.items()
        ]  # fmt: skip
        print(table(["rows of", "rows", "s", "CPU s", "MiB"], lines))
        print(f"the page of 10,000 hosts is {size / 1e6:.1f} MB")
    whole = [run for title in fleets for run in found[title][1]]
    if max(each.seconds for each in whole) > SECONDS or max(each.peak for each in whole) > BYTES:
        raise SystemExit(f"benchmarks.fleet_report: more than {SECONDS:g} s or {BYTES >> 20:,} MiB")


if __name__ == "__main__":
    main()
