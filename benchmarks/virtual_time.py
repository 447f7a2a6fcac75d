# SPDX-License-Identifier: Apache-2.0
"""Records what predicted times are compared with: the same work under two root policies and the shadow MMU.

    python -m benchmarks.virtual_time [--runs 4] [--out traces/timing]

Each scenario runs several times on 6.1 (which keeps roots), on 6.1-async (which frees them) and on 6.1 with
`kvm.tdp_mmu=0`, in a boot of its own for each run, with a recorder and without. The recorded run with the median time
is kept, with the times of all runs in `measured.json`. Zaps are not recorded entry by entry (`--events time`), because
that would cost the kernel that frees roots more than the zaps do. `python -m benchmarks.time_accuracy` makes
`docs/time-accuracy.md` of the results. Use a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from datetime import date
from pathlib import Path

from tracer import vmm
from tracer.lab.fetch import fetch
from tracer.lab.matrix import DIRECT, MMUS, TDP, Cell, record
from tracer.lab.session import boot
from traces.errors import Problem

LOOPS = "20"
SCENARIOS = ("smi-storm", "smi-grow", "cr4-toggle", "efer-toggle", "mmio", "slot-delete")
MACHINES = (("6.1", TDP), ("6.1-async", TDP), ("6.1", DIRECT))


def bare(kernel: str, mmu: str) -> list[int]:
    """Run all scenarios without a recorder in one boot, and return the guest's time for each in ns."""
    program = str(vmm.binary())
    script = "\n".join(f"{program} {scenario} --loops {LOOPS} || exit 1; echo" for scenario in SCENARIOS)
    done = boot(fetch(kernel), ["sh", "-c", script], cpu=MMUS[mmu].cpu, parameters=MMUS[mmu].parameters)
    if done.code or done.signalled:
        raise Problem(f"a scenario without a recorder failed on {kernel}")
    return [int(json.loads(line)["wall_ns"]) for line in done.stdout.splitlines() if line.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "traces" / "timing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, dict[str, list[int]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for kernel, mmu in MACHINES:
            cells = [Cell(scenario, ("--loops", LOOPS), kernel, mmu) for scenario in SCENARIOS]
            recorded: list[list[int]] = []
            without: list[list[int]] = []
            for run in range(options.runs):
                print(f"virtual_time: {' '.join(filter(None, (kernel, mmu)))}, run {run + 1}", file=sys.stderr)
                directory = Path(name) / str(run)
                directory.mkdir(exist_ok=True)
                rows, problems = record(cells, directory, events="time")
                if problems:
                    raise problems[0]
                recorded.append([next(row.guest_ns for row in rows if row.scenario == s) for s in SCENARIOS])
                without.append(bare(kernel, mmu))
            for i, cell in enumerate(cells):
                times = [each[i] for each in recorded]
                median = sorted(range(options.runs), key=times.__getitem__)[options.runs // 2]
                file = f"{cell.name}.parquet"
                shutil.copy(Path(name) / str(median) / file, options.out / file)
                measured[cell.name] = {"recorded": times, "bare": [each[i] for each in without]}
    document = {"schema": 1, "date": str(date.today()), "unit": "ns", "measured": measured}
    (options.out / "measured.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
