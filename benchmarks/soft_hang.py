# SPDX-License-Identifier: Apache-2.0
"""Measures the soft-hang: 200 passes over 512 pages with an SMI after each, on kernels of either root policy.

    python -m benchmarks.soft_hang [--loops 200] [--pages 512] [--json]

Counts are those of a recording. Times are those of the guest's passes without a recorder, the median of three boots
under emulation: they compare the kernels with each other, on the same machine in the same run, and say nothing of
hardware.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import polars as pl

from tracer import vmm
from tracer.lab.fetch import fetch
from tracer.lab.matrix import Cell, record
from tracer.lab.session import boot
from traces.errors import Problem

KERNELS = ("5.10", "6.1-async", "6.1", "6.12")
RUNS = 3


@dataclass(frozen=True)
class Line:
    """One kernel: what its recording counted, and the time of the guest's passes in ms."""

    kernel: str
    policy: str
    smis: int
    loads: int
    roots: int
    faults: int
    leaves: int
    milliseconds: float


def measure(kernel: str, loops: int, pages: int, directory: Path) -> Line:
    arguments = ("--loops", str(loops), "--pages", str(pages))
    (row,), problems = record([Cell("smi-storm", arguments, kernel)], directory)
    if problems:
        raise problems[0]
    rows = pl.scan_parquet(directory / row.file).with_columns(pl.col("kind").cast(pl.String))
    entering = (pl.col("kind") == "kvm_smm_transition") & (pl.col("flags") & 1 == 1)
    loading = pl.col("kind") == "mmu_load"
    smis, loads = rows.select(entering.sum(), loading.sum()).collect().row(0)
    times = []
    for _ in range(RUNS):
        done = boot(fetch(kernel), [str(vmm.binary()), "smi-storm", *arguments])
        if done.code or done.signalled:
            raise Problem(f"smi-storm without a recorder failed on {kernel}")
        times.append(json.loads(done.stdout)["wall_ns"] / 1e6)
    median = statistics.median(times)
    return Line(kernel, row.policy, smis, loads, row.roots, row.faults, row.leaves, median)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--loops", type=int, default=200)
    parser.add_argument("--pages", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as name:
        for kernel in KERNELS:
            print(f"soft_hang: {kernel}", file=sys.stderr)
            lines.append(measure(kernel, options.loops, options.pages, Path(name)))
    if options.json:
        print(json.dumps({"schema": 1, "date": str(date.today()), "lines": [asdict(line) for line in lines]}, indent=1))
        return
    fastest = min(line.milliseconds for line in lines)
    print("| kernel | root policy | SMIs | root loads | roots | faults | leaf installs | guest, ms | |")
    print("|-|-|-:|-:|-:|-:|-:|-:|-:|")
    for line in lines:
        figures = (line.smis, line.loads, line.roots, line.faults, line.leaves, round(line.milliseconds))
        cells = [
            line.kernel,
            line.policy,
            *(f"{figure:,}" for figure in figures),
            f"{line.milliseconds / fastest:.1f}x",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
