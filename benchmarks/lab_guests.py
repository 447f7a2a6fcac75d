# SPDX-License-Identifier: Apache-2.0
"""Records third-party guests on real kernels in the lab, and reports how much the model covers and whether it matches.

`python -m benchmarks.lab_guests` records every guest of `tracer.lab.guests` on two kernels, compares each recording
with the model and with its own rows, and writes docs/lab-guests.md; `--check` records a smaller set and writes nothing.
The results are kept in lab_guests.json next to this file: with `--guest` only the named guests are measured anew. The
exit status is 1 where a recording lost events, where a VM's replay under its own policy differs from its rows, where a
modelled response does not match, or where less than 95 % of the responses are modelled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tracer.lab import guests
from tracer.lab.guests import GUESTS, GuestRun
from traces.errors import Problem
from traces.reader import Trace

KERNELS: Final = ("6.1", "7.x")
LEAST_MODELLED: Final = 0.95
TABLE: Final = Path(__file__).parents[1] / "docs" / "lab-guests.md"
KEPT: Final = Path(__file__).with_suffix(".json")  # the results that docs/lab-guests.md shows
RESULTS: Final = "results.json"


@dataclass(frozen=True)
class Measured:
    """The results of one guest on one kernel; counts are None where nothing was recorded or it could not be read.

    `responses` are the MMU responses that the model accounts for, and `matched` are those that are as it says; `apart`
    are responses that have no model. `agrees` is None where no VM's replay could be compared with its rows. `on` is the
    date.
    """

    guest: str
    kernel: str
    release: str
    status: int | None
    said: str
    events: int | None = None
    lost: int | None = None
    vms: int | None = None
    responses: int | None = None
    matched: int | None = None
    apart: int | None = None
    agrees: bool | None = None
    on: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%d}")

    @property
    def modelled(self) -> float:
        """Return the share of responses that are modelled; 1 where there are none."""
        whole = (self.responses or 0) + (self.apart or 0)
        return (self.responses or 0) / whole if whole else 1.0

    @property
    def skipped(self) -> bool:
        """Return whether the guest made no VM because the emulated processor cannot do what the guest tests."""
        return self.status == guests.SKIPPED and not self.vms

    @property
    def holds(self) -> bool:
        """Return whether the guest ran, and nothing is wrong with its recording."""
        return not self.skipped and not self.faults

    @property
    def faults(self) -> list[str]:
        """Return one line for each thing that is wrong with the run or with its recording."""
        if self.status is None:
            return [f"did not run ({self.said})"]
        if self.skipped:
            return []
        if self.status and not self.vms:
            return [f"made no VM, and ended with {self.status}" + (f": {self.said}" if self.said else "")]
        if self.events is None or self.responses is None:
            return [self.said or "no recording"]
        found = []
        if self.lost:
            found.append(f"{self.lost:,} events lost")
        if self.matched != self.responses:
            found.append(f"{(self.responses or 0) - (self.matched or 0):,} responses do not match")
        if self.modelled < LEAST_MODELLED:
            found.append(f"{self.modelled:.1%} modelled")
        if self.agrees is False:
            found.append("the replay under its own policy differs from the rows")
        return found


def measure(run: GuestRun) -> Measured:
    """Compare a guest's recording with the model (`kvmtrace validate`) and with its own rows (`kvmtrace replay`)."""
    if run.trace is None:
        return Measured(run.guest.name, run.kernel, "", run.status, run.said or "no recording")
    trace = Trace.open(run.trace)
    idle = not trace.counts().keys() & {"mmu_load", "kvm_page_fault"}  # there was no VM, or no vCPU of it ran
    told = {"responses": 0, "matched": 0} if idle else _asked("validate", str(run.trace))
    replayed = _asked("replay", "--no-time", str(run.trace))
    problem = (told.get("problem") or replayed.get("problem") or "").replace(str(run.trace), run.trace.name)
    return Measured(
        run.guest.name,
        run.kernel,
        str(trace.metadata.raw["host"]["kernel"]),
        run.status,
        run.said or problem or ("no word of why" if run.status is None else ""),
        trace.metadata.events,
        trace.metadata.lost,
        len(trace.metadata.vms),
        told.get("responses"),
        told.get("matched"),
        told.get("not_modelled", {}).get("responses", 0),
        replayed.get("own_policy", {}).get("agrees"),
    )


def _asked(*words: str) -> dict[str, Any]:
    """Return the JSON output of a kvmtrace command; {"problem": last line of its errors} where there is none."""
    done = subprocess.run([sys.executable, "-m", "kvmtrace", *words, "--json"], capture_output=True, text=True)
    try:
        said: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"problem": (done.stderr.strip().splitlines() or ["no answer"])[-1]}
    return said


def render(several: Sequence[Measured]) -> str:
    """Return docs/lab-guests.md, with a section for each kernel."""
    lines = [
        "# Guests that nobody here wrote",
        "",
        f"Recorded in the lab and compared with the model by `make lab-guests` on {_days(several)}.",
        "*Modelled* is the share of the MMU's responses (roots, tables, SPTEs, faults) that `validate` has a model of,",
        "*matched* that of the modelled ones which are as the model says. *Own policy*: whether a replay under the",
        "recording's own root policy gives the counts that its rows show, in every VM. *Ended* is how the guest",
        "itself ended: KVM's selftests, of 6.1's source on every kernel, skip what the emulated processor cannot do. A",
        "guest *at its limit* was stopped before it had done all that it is for: what it did until then is counted.",
        "*Not compared*: no vCPU ran, or the kernel skipped runs of probes, so that an unknown number of events is",
        "missing.",
    ]
    for kernel in dict.fromkeys(one.kernel for one in several):
        those = [one for one in several if one.kernel == kernel]
        release = next((one.release for one in those if one.release), kernel)
        good, skipped = sum(one.holds for one in those), sum(one.skipped for one in those)
        lines += [
            *("", f"## {release}", ""),
            f"{good} of {len(those) - skipped} hold in all" + (f"; {skipped} cannot run here." if skipped else "."),
            "",
            "| guest | what it does | ended | VMs | events | lost | modelled | matched | own policy |",
            "|-|-|-|-:|-:|-:|-:|-:|-|",
            *map(_row, those),
        ]
        if faults := [f"- {one.guest}: {', '.join(one.faults)}" for one in those if one.faults]:
            lines += ["", "What does not hold, and why:", "", *faults]
    return "\n".join(lines) + "\n"


def _days(several: Sequence[Measured]) -> str:
    days = sorted({one.on for one in several})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _row(one: Measured) -> str:
    ended = {0: "well", guests.SKIPPED: "skipped", None: "did not run", 124: "at its limit"}
    cells = [one.guest, GUESTS[one.guest].shows, ended.get(one.status, f"with {one.status}")]
    if one.events is None:
        return f"| {' | '.join(cells)} | | | | | | |"
    cells += [f"{number:,}" for number in (one.vms or 0, one.events, one.lost or 0)]
    cells += [_share(one.responses or 0, (one.responses or 0) + (one.apart or 0))]
    cells += [_share(one.matched or 0, one.responses or 0)]
    cells += [{True: "equal", False: "**differs**", None: "not compared"}[one.agrees]]
    return f"| {' | '.join(cells)} |"


def _share(part: int, whole: int) -> str:
    """Return a share in percent, which is never rounded up to 100 %."""
    if not whole:
        return "none"
    return "100 %" if part == whole else f"{min(part / whole * 100, 99.99):.2f} %"


def kept(path: Path) -> list[Measured]:
    """Return the results in a file; none if it does not exist."""
    return [Measured(**one) for one in json.loads(path.read_text())] if path.is_file() else []


def _as_json(several: Iterable[Measured]) -> str:
    """Return the results as JSON with one line for each, so that a change of one changes one line."""
    return "[\n" + ",\n".join(json.dumps(asdict(one)) for one in several) + "\n]\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only the smaller set, on one kernel; write no table")
    parser.add_argument("--kernel", action="append", help=f"[default: {' and '.join(KERNELS)}]")
    parser.add_argument("--guest", action="append", help="only this one (repeatable)")
    parser.add_argument("--directory", type=Path, help="keep recordings and results there; what is there is not redone")
    options = parser.parse_args()
    chosen = [GUESTS[name] for name in options.guest] if options.guest else list(GUESTS.values())
    chosen = [guest for guest in chosen if guest.check or not options.check]
    with ExitStack() as stack:
        directory = options.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = {(one.guest, one.kernel): one for one in kept(directory / RESULTS)}
        for kernel in options.kernel or (KERNELS[:1] if options.check else KERNELS):
            todo = [guest for guest in chosen if (guest.name, kernel) not in found]
            for run in guests.record(kernel, todo, directory, lambda line: print(line, file=sys.stderr)):
                found[run.guest.name, kernel] = measure(run)
                (directory / RESULTS).write_text(_as_json(found.values()))
    if not options.check:
        every = {(one.guest, one.kernel): one for one in kept(KEPT)} | found
        order = {name: at for at, name in enumerate(GUESTS)}
        ordered = sorted(every.values(), key=lambda one: (KERNELS.index(one.kernel), order[one.guest]))
        KEPT.write_text(_as_json(ordered))
        TABLE.write_text(render(ordered))
    for one in found.values():
        for fault in one.faults:
            print(f"{one.guest} on {one.kernel}: {fault}")
    ran = [one for one in found.values() if not one.skipped]
    print(f"{sum(one.holds for one in ran)} of {len(ran)} guests hold; {len(found) - len(ran)} cannot run here")
    return int(not all(one.holds for one in ran))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Problem as problem:
        print(f"lab-guests: {problem}", file=sys.stderr)
        sys.exit(problem.code)
