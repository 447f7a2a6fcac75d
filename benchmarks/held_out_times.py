# SPDX-License-Identifier: Apache-2.0
"""Compares predicted times with recordings that the model of time was not fitted to, under both root policies.

    python -m benchmarks.held_out_times [--machine amd-icount] [--runs 3] [--directory DIR]

Each scenario is recorded on 6.1-async, whose recordings are replayed under `preserve`, and on 6.1, which shows how long
it really takes under that policy. Working sets differ from those of `benchmarks.virtual_time`; there are 20 and 200
loops, alone in the lab guest and next to a task that never sleeps. On `amd-icount` and `intel` the guest's clock counts
its instructions, so that other load on this machine changes nothing; on `amd` the clock is this machine's, and medians
of several runs are compared. Results go to traces/timing/held_out.json. Recordings are kept only in DIR, if it is
given; those that are there already are not made again. `python -m benchmarks.time_accuracy` writes the results to
docs/time-accuracy.md. This runs nightly, and takes an hour.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final

from replay import plan
from replay.decode.capabilities import Capabilities
from replay.run import replay
from replay.timing.reference_clock import TimeCategory
from replay.timing.timed_run import Settings, VmTime
from tracer import vmm
from tracer.lab import prebuilt
from tracer.lab.fetch import fetch
from tracer.lab.lab_cpus import lab_cpu
from tracer.lab.session import boot, compiled_probes, several
from traces.errors import Problem
from traces.reader import Trace
from traces.recording.compact import compact

RESULTS: Final = Path(__file__).parents[1] / "traces" / "timing" / "held_out.json"
OLD, NEW, POLICY = "6.1-async", "6.1", "preserve"
MACHINES: Final = ("amd-icount", "intel", "amd")
LOADS: Final = ("alone", "busy")
# Arguments of the VMM. benchmarks.virtual_time, whose recordings the model of time was fitted to, has 20 loops over
# each scenario's default working set.
CELLS: Final = (
    "smi-storm --loops 20 --pages 96",
    "smi-storm --loops 20 --pages 400",
    "smi-storm --loops 200 --pages 32",
    "smi-grow --loops 20 --pages 32",
    "cr4-toggle --loops 20 --pages 160",
    "cr4-toggle --loops 200 --pages 24",
    "efer-toggle --loops 20 --pages 320",
    "efer-toggle --loops 200 --pages 40",
    "mmio --loops 20 --pages 128",
    "mmio --loops 200 --pages 16",
    "slot-delete --loops 20 --pages 192",
    "slot-move --loops 20 --pages 128",
    "huge --loops 200 --pages 4096",
    "wp-toggle --loops 20 --pages 384",
    "steady --loops 20000 --pages 64",
)
_NOT_ITS_OWN: Final = (TimeCategory.STEAL, TimeCategory.IDLE, TimeCategory.PAUSED)
_LONG: Final = ("--timeout", "3600")  # option of the VMM; seconds of the guest's clock
_BUSY: Final = """
import os, signal, subprocess, sys
child = os.fork()
while not child:
    pass
status = subprocess.call(sys.argv[1:])
os.kill(child, signal.SIGKILL)
sys.exit(status)
"""


class BesideMeasured:
    """A predicted time next to measured ones, in ns: `low` and `high`, the `band` about them, and `measured`."""

    low: int
    high: int
    band: tuple[int, int]
    measured: Sequence[int]

    @property
    def median(self) -> int:
        return int(statistics.median(self.measured))

    @property
    def error(self) -> float:
        """Return how far the prediction lies from the measured median, as a share of the median.

        It is 0 if the median lies between `low` and `high`; otherwise it is the error of the nearer of the two.
        """
        if self.low <= self.median <= self.high:
            return 0.0
        nearest = self.low if self.median < self.low else self.high
        return nearest / self.median - 1

    @property
    def inside(self) -> bool:
        return self.band[0] <= self.median <= self.band[1]


@dataclass(frozen=True)
class Predicted(BesideMeasured):
    """One scenario on one machine; the times of its passes in ns, one for each run's recording where there is a list.

    `recorded` is under the old policy. `low` and `high` are medians, over these recordings, of the time predicted for
    the new policy, and `band` is the median of the predicted bands; `measured` is how long the new policy took. `own`
    is for how much of `high` and of `measured` (medians) the vCPU had a CPU. `hang` is the longest soft-hang that the
    model finds in a recording of the new policy.
    """

    machine: str
    load: str
    cell: str
    recorded: list[int]
    measured: list[int]
    low: int
    high: int
    band: tuple[int, int]
    own: tuple[int, int]
    hang: int

    @property
    def own_error(self) -> float:
        """Return the relative error of the predicted time in which the vCPU has a CPU."""
        return self.own[0] / self.own[1] - 1

    @property
    def steal(self) -> float:
        """Return the share of the measured time in which the vCPU had no CPU."""
        return max(1 - self.own[1] / self.median, 0.0)

    @property
    def waits(self) -> bool:
        """Return whether the scenario changes memslots, because the old policy then waits for its zap worker."""
        return self.cell.startswith("slot-")

    @property
    def width(self) -> float:
        """Return the band's upper end divided by its lower end."""
        return self.band[1] / max(self.band[0], 1)


def file_name(cell: str) -> str:
    return cell.replace(" --", "-").replace(" ", "-")


def record(machine: str, kernel: str, load: str, directory: Path) -> None:
    """Record in one boot every cell that is not in `directory` yet, and store what the VMM printed next to it."""
    directory.mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in CELLS if not (directory / f"{file_name(cell)}.parquet").is_file()]
    if not todo:
        return
    print(f"held_out_times: {machine}, {kernel}, {load}: {directory}", file=sys.stderr)
    before = [sys.executable, "-c", _BUSY] if load == "busy" else []
    jobs = {file_name(cell): [*before, str(vmm.binary()), *cell.split(), *_LONG] for cell in todo}
    booted, on_amd = fetch(kernel), not lab_cpu(machine).model
    command, give = several(jobs, "time", segments=True)
    done = boot(
        booted,
        command,
        cpu=machine,
        probes=prebuilt.have(booted) if on_amd else compiled_probes(booted),
        give=give,
        into=directory,
        timeout=3 * 3600,
    )
    if done.code or done.signalled:
        raise Problem(f"{machine}, {kernel}, {load}: {done.stderr.strip()[-300:]}")
    for cell in todo:
        segments = directory / f"{file_name(cell)}.kvmt"
        compact(segments, directory / f"{file_name(cell)}.parquet")
        shutil.rmtree(segments)


def passes_ns(directory: Path, cell: str) -> int:
    """Return how many ns the passes of the scenario took by the VMM's measure."""
    said = (directory / f"{file_name(cell)}.stdout").read_text().splitlines()[-1]
    return int(json.loads(said)["wall_ns"])


def shown(directory: Path, cell: str, policy: str) -> tuple[VmTime, float]:
    """Replay a recording under a policy.

    Return the times of its VM, and the VMM's measured time divided by the recorded one.

    The factor is a little above 1, because the VMM measures a little more than the vCPU's rows show.
    """
    capabilities = Capabilities(Trace.open(directory / f"{file_name(cell)}.parquet"))
    (vm,) = replay(plan.make(capabilities, [policy]), Settings()).times
    return vm, passes_ns(directory, cell) / sum(map(sum, vm.recorded))


def own(spent: Sequence[int]) -> int:
    """Return for how many of the ns spent, by category of time, the vCPU had a CPU."""
    return sum(spent) - sum(spent[category] for category in _NOT_ITS_OWN)


def hold(machine: str, load: str, cell: str, old: list[Path], new: list[Path]) -> Predicted:
    """Predict the new policy's time from each recording of the old one; return it next to the new recordings."""
    told = [shown(directory, cell, POLICY) for directory in old]
    came = [shown(directory, cell, POLICY) for directory in new]

    def median(of: Callable[[VmTime], float], several: list[tuple[VmTime, float]]) -> int:
        return round(statistics.median(of(vm) * scale for vm, scale in several))

    return Predicted(
        machine, load, cell,
        [passes_ns(directory, cell) for directory in old], [passes_ns(directory, cell) for directory in new],
        median(lambda vm: vm.outcomes[0].vcpus[0].wall, told), median(lambda vm: vm.outcomes[-1].vcpus[0].wall, told),
        (
            median(lambda vm: vm.outcomes[0].vcpus[0].band[0], told),
            median(lambda vm: vm.outcomes[-1].vcpus[0].band[1], told),
        ),
        (
            median(lambda vm: own(vm.outcomes[-1].vcpus[0].spent), told),
            median(lambda vm: own(vm.recorded[0]), came),
        ),
        median(lambda vm: max((hang.ns for hang in vm.outcomes[-1].vcpus[0].stalls), default=0), came),
    )  # fmt: skip


def kept() -> list[Predicted]:
    """Return the results in traces/timing/held_out.json; none if the file does not exist."""
    if not RESULTS.is_file():
        return []
    found = json.loads(RESULTS.read_text())["held"]
    return [Predicted(**{**one, "band": tuple(one["band"]), "own": tuple(one["own"])}) for one in found]


def dated() -> str:
    """Return the date of these results."""
    return str(json.loads(RESULTS.read_text())["date"]) if RESULTS.is_file() else "no day yet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", action="append", choices=MACHINES, help="[default: all]")
    parser.add_argument("--runs", type=int, default=3, help="of amd; the others' clocks need one")
    parser.add_argument("--directory", type=Path, help="keep the recordings there")
    options = parser.parse_args()
    machines = options.machine or MACHINES
    found = [one for one in kept() if one.machine not in machines]
    with ExitStack() as stack:
        directory = options.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for machine in machines:
            for load in LOADS:
                places: dict[str, list[Path]] = {OLD: [], NEW: []}
                for run in range(options.runs if machine == "amd" else 1):
                    for kernel in (OLD, NEW):
                        place = directory / machine / load / f"{kernel}-{run}"
                        record(machine, kernel, load, place)
                        places[kernel].append(place)
                found += [hold(machine, load, cell, places[OLD], places[NEW]) for cell in CELLS]
    document: dict[str, Any] = {"schema": 1, "date": str(date.today()), "unit": "ns", "held": list(map(asdict, found))}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except Problem as problem:
        print(f"held_out_times: {problem}", file=sys.stderr)
        sys.exit(problem.code)
