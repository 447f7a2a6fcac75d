# SPDX-License-Identifier: Apache-2.0
"""Records what the clock was never fitted to, under both root policies, and compares its predictions with it.

    python -m benchmarks.held_out_times [--machine amd-icount] [--runs 3] [--directory DIR]

Each scenario is recorded on 6.1-async, whose recordings are replayed under `preserve`, and on 6.1, which shows how long
that takes: with other working sets than `benchmarks.virtual_time` has, 20 and 200 loops, alone in the lab guest and
with a task that never sleeps. On `amd-icount` and `intel` the guest's clock counts its instructions, so that what
else this machine does changes nothing; on `amd` it is this machine's, and medians of several runs are compared. The
results are kept in traces/timing/held_out.json, the recordings in DIR only, if one is given (what is there is not made
again); `python -m benchmarks.time_accuracy` makes the table of docs/time-accuracy.md of them. Nightly: an hour.
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
from tracer.lab.session import boot, several
from traces.compact import compact
from traces.errors import Problem
from traces.reader import Trace

RESULTS: Final = Path(__file__).parents[1] / "traces" / "timing" / "held_out.json"
OLD, NEW, POLICY = "6.1-async", "6.1", "preserve"
MACHINES: Final = ("amd-icount", "intel", "amd")
LOADS: Final = ("alone", "busy")
# Words of the VMM's command line. virtual_time, which the clock's assumptions were made with, has 20 loops over each
# scenario's default working set.
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
_LONG: Final = ("--timeout", "3600")  # the VMM's, in the guest's seconds
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
    """A time that was predicted, `low` and `high` with a `band` about them, and the times that were measured; ns."""

    low: int
    high: int
    band: tuple[int, int]
    measured: Sequence[int]

    @property
    def median(self) -> int:
        return int(statistics.median(self.measured))

    @property
    def error(self) -> float:
        """Relative, of the number predicted; of an interval, how far the measured median lies outside."""
        if self.low <= self.median <= self.high:
            return 0.0
        nearest = self.low if self.median < self.low else self.high
        return nearest / self.median - 1

    @property
    def inside(self) -> bool:
        return self.band[0] <= self.median <= self.band[1]


@dataclass(frozen=True)
class Predicted(BesideMeasured):
    """One scenario on one machine; ns of its passes, as each run's recording has them.

    `recorded` is under the old policy, `low` and `high` are the median of what the clock predicts of these for the new
    one, `band` that of its bands, and `measured` what that took. `own` is what of `high` and of `measured` (their
    medians) the vCPU had a CPU for. `hang` is the longest soft-hang that a recording of the new policy is said to have.
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
        """Relative, of the vCPU's own time."""
        return self.own[0] / self.own[1] - 1

    @property
    def steal(self) -> float:
        """The share of the measured time in which the vCPU had no CPU."""
        return max(1 - self.own[1] / self.median, 0.0)

    @property
    def waits(self) -> bool:
        """Whether memslots change, for which the old policy waits."""
        return self.cell.startswith("slot-")

    @property
    def width(self) -> float:
        """How many times its lower end the band's upper end is."""
        return self.band[1] / max(self.band[0], 1)


def file_name(cell: str) -> str:
    return cell.replace(" --", "-").replace(" ", "-")


def record(machine: str, kernel: str, load: str, directory: Path) -> None:
    """Record every cell in one boot, what is there apart, next to a .json of what the VMM said."""
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
        probes=prebuilt.have(booted) if on_amd else prebuilt.of(booted),
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
    """How long the passes took, as the VMM says."""
    said = (directory / f"{file_name(cell)}.stdout").read_text().splitlines()[-1]
    return int(json.loads(said)["wall_ns"])


def shown(directory: Path, cell: str, policy: str) -> tuple[VmTime, float]:
    """What a recording's rows show, replayed under a policy; and how many times as long the VMM says that it took.

    The VMM's own measure has a little around what the vCPU's rows show.
    """
    capabilities = Capabilities(Trace.open(directory / f"{file_name(cell)}.parquet"))
    (vm,) = replay(plan.make(capabilities, [policy]), Settings()).times
    return vm, passes_ns(directory, cell) / sum(map(sum, vm.recorded))


def own(spent: Sequence[int]) -> int:
    """ns that the vCPU had a CPU for."""
    return sum(spent) - sum(spent[category] for category in _NOT_ITS_OWN)


def hold(machine: str, load: str, cell: str, old: list[Path], new: list[Path]) -> Predicted:
    """Predict each of a cell's recordings of the old policy, and compare their median with the new one's."""
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
    """The results that are there."""
    if not RESULTS.is_file():
        return []
    found = json.loads(RESULTS.read_text())["held"]
    return [Predicted(**{**one, "band": tuple(one["band"]), "own": tuple(one["own"])}) for one in found]


def dated() -> str:
    """When they were made."""
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
