# SPDX-License-Identifier: Apache-2.0
"""Measures how fast a report is made, and its memory, against `trace-cmd report | awk` and `perf script | python`.

    python -m benchmarks.report [--rounds 3] [--events 100000000] [--loops 100] [--json]

An SMI storm on 6.1-async is recorded in the lab by all three recorders at once, over the same five tracepoints. The
peers print it as text, in which awk and Python count events by name and faults by page. kvmtrace does the same with its
own recording (`export --csv gfns`: installs by page), and makes its whole report of the recorded rows (verdict,
windows, gfns, regions, root lives, faults not served, stuck vCPUs). It does both for a synthetic trace of --events as
well, where start-up does not matter. All take turns in one run; the time of a pipeline is that of the wall clock, its
memory that of its largest process. perf and trace-cmd come from the distribution (linux-perf, trace-cmd); if one is not
installed, a line says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.record import machine, say, spread, table
from tracer import vmm
from tracer.lab.fetch import fetch
from tracer.lab.session import SHARE, boot
from traces.errors import VERDICT_FAILED, Problem

KERNEL = "6.1-async"
KVMTRACE = (sys.executable, "-m", "kvmtrace")
TRACEPOINTS = (
    "kvm:kvm_exit", "kvm:kvm_entry", "kvm:kvm_page_fault", "kvmmmu:kvm_mmu_spte_requested", "kvmmmu:kvm_mmu_set_spte"
)  # fmt: skip
PERF, TRACE_CMD = "perf.data.stdout", "trace.dat.stdout"  # the lab hands files of this name back
BUFFER_KIB = 65_536  # trace-cmd's buffer for a CPU, large enough that no event of the storm is lost
BOUND = 2 << 30  # bytes that the report of 100 million events may take

AWK = """
{ name = ""; for (i = 3; i <= NF; i++) if ($i ~ /^kvm_[a-z_]+:$/) { name = $i; break }
  events[name]++
  if (name == "kvm_page_fault:") for (; i < NF; i++) if ($i == "address") { pages[substr($(i + 1), 1, 15)]++; break } }
END { for (name in events) print name, events[name]; print length(pages) }
"""
PYTHON = """
import sys
from collections import Counter
events, pages = Counter(), Counter()
for line in sys.stdin:
    words = line.split()
    name = next((word for word in words[3:] if word.startswith(("kvm:", "kvmmmu:"))), "")
    events[name] += 1
    if name == "kvm:kvm_page_fault:":
        pages[words[words.index("address") + 1][:15]] += 1
print(events, len(pages))
"""


@dataclass(frozen=True)
class Task:
    """A pipeline of programs that is timed; `events` is the number of events that it reads."""

    name: str
    events: int
    pipeline: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Measured:
    """One run: seconds of the wall clock, CPU seconds, and the peak memory of the largest process in bytes."""

    seconds: float
    cpu: float
    peak: int


def recorded(scratch: Path, loops: int) -> Path:
    """Record the storm in one boot by all recorders that are installed, and return the path of kvmtrace's trace.

    Raises Problem where a recorder failed, or kvmtrace lost events.
    """
    command = [str(vmm.binary()), "smi-storm", "--loops", str(loops)]
    chosen = [argument for name in TRACEPOINTS for argument in ("-e", name)]
    if shutil.which("perf"):
        options = ["-q", "-a", "-m", "64M", "-e", ",".join(TRACEPOINTS), "-o", f"{SHARE}/{PERF}"]
        command = ["perf", "record", *options, "--", *command]
    if shutil.which("trace-cmd"):
        command = ["trace-cmd", "record", "-q", "-b", str(BUFFER_KIB), *chosen, "-o", f"{SHARE}/{TRACE_CMD}", *command]
    kinds = ",".join(name.split(":")[1] for name in TRACEPOINTS)
    ours = [sys.executable, "-m", "kvmtrace", "record", "-o", f"{SHARE}/storm.parquet", "--events", kinds]
    done = boot(fetch(KERNEL), [*ours, "--strict", "--", *command], into=scratch, timeout=600)
    if done.code or done.signalled:
        raise Problem(f"recording the storm failed: {done.stderr.strip()[-300:]}", VERDICT_FAILED)
    return scratch / "storm.parquet"


def tasks(scratch: Path, storm: Path, big: Path) -> list[Task]:
    """Return the pipelines to time: every installed tool on the storm, and kvmtrace on the large trace too."""
    found = []
    if (scratch / PERF).exists():
        text = subprocess.run(["perf", "script", "-i", str(scratch / PERF)], stdout=subprocess.PIPE, check=True).stdout
        script = ("perf", "script", "-i", str(scratch / PERF))
        found.append(Task("perf script, python", text.count(b"\n"), (script, (sys.executable, "-c", PYTHON))))
    if (scratch / TRACE_CMD).exists():
        report = ("trace-cmd", "report", "-i", str(scratch / TRACE_CMD))
        text = subprocess.run(report, stdout=subprocess.PIPE, check=True).stdout
        found.append(
            Task("trace-cmd report, awk", sum(b"kvm_" in line for line in text.splitlines()), (report, ("awk", AWK)))
        )
    for name, path in (("the same storm", storm), ("synthetic", big)):
        told = subprocess.run([*KVMTRACE, "info", "--json", str(path)], stdout=subprocess.PIPE, check=True).stdout
        events = int(json.loads(told)["events"])
        found.append(Task(f"kvmtrace report, {name}", events, ((*KVMTRACE, "report", "--no-replay", str(path)),)))
        found.append(
            Task(f"kvmtrace export --csv gfns, {name}", events, ((*KVMTRACE, "export", str(path), "--csv", "gfns"),))
        )
    return found


def run(task: Task) -> Measured:
    """Run the pipeline once and return what it took."""
    started = time.monotonic()
    children: list[subprocess.Popen[bytes]] = []
    for number, argv in enumerate(task.pipeline):
        last = number == len(task.pipeline) - 1
        before = children[-1].stdout if children else subprocess.DEVNULL
        out = subprocess.DEVNULL if last else subprocess.PIPE
        children.append(subprocess.Popen(argv, stdin=before, stdout=out, stderr=subprocess.DEVNULL))
        if before not in (None, subprocess.DEVNULL):
            before.close()  # type: ignore[union-attr]
    cpu, peak = 0.0, 0
    for child in children:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise Problem(f"{child.args!r} ended with {child.returncode}", VERDICT_FAILED)
        cpu += usage.ru_utime + usage.ru_stime
        peak = max(peak, usage.ru_maxrss << 10)
    return Measured(time.monotonic() - started, cpu, peak)


def rows(done: dict[str, list[Measured]], every: Sequence[Task]) -> list[list[str]]:
    """Return a table row for each task: medians and ranges over the rounds."""
    found = []
    for task in every:
        runs = done[task.name]
        rates = [task.events / each.seconds / 1e6 for each in runs]
        cpu = [task.events / each.cpu / 1e6 for each in runs]
        seconds = spread([each.seconds for each in runs])
        memory = f"{max(each.peak for each in runs) >> 20:,}"
        times = spread(found_ratios, ".1f") if (found_ratios := ratios(task, done, every)) else ""
        found.append([task.name, f"{task.events:,}", seconds, spread(rates, ".2f"), spread(cpu, ".2f"), times, memory])
    return found


def ratios(task: Task, done: dict[str, list[Measured]], every: Sequence[Task]) -> list[float]:
    """Return, for each round, the task's events per second divided by those of the quicker peer.

    None without a peer.
    """

    def rate(task: Task, number: int) -> float:
        return task.events / done[task.name][number].seconds

    peers = [task for task in every if len(task.pipeline) > 1]
    rounds = range(len(done[task.name]))
    return [rate(task, n) / max(rate(peer, n) for peer in peers) for n in rounds] if peers else []


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description="How fast a report is made.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--events", type=int, default=100_000_000, help="of the synthetic trace")
    parser.add_argument("--loops", type=int, default=100, help="of the storm; 1,000 faults each pass and SMI")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="kvmtrace-bench-") as name:
        scratch = Path(name)
        say("report: recording")
        storm = recorded(scratch, options.loops)
        say("report: making the synthetic trace")
        big = scratch / "big.parquet"
        storm_of = ("--policy", "async", "--smi-rate", "400", "--working-set", "1500")
        made = [*KVMTRACE, "synth", str(big), *storm_of, "--events", str(options.events)]
        subprocess.run(made, stderr=subprocess.DEVNULL, check=True)  # a child of its own: memory is measured here
        every = tasks(scratch, storm, big)
        done: dict[str, list[Measured]] = {task.name: [] for task in every}
        for number in range(options.rounds):
            for task in every:
                say(f"report: round {number + 1}, {task.name}")
                done[task.name].append(run(task))
    peak = max(each.peak for task in every if len(task.pipeline) == 1 for each in done[task.name])
    if options.json:
        runs = {name: [asdict(each) for each in several] for name, several in done.items()}
        print(json.dumps({"schema": 1, **facts, "runs": runs}, indent=1))
    else:
        print(f"{facts['date']}: {facts['cpu']}, {facts['cpus']} CPUs, load {facts['load']:.1f}\n")
        head = ["", "events", "seconds", "M events/s", "M events/CPU s", "times the quicker peer", "peak MiB"]
        print(table(head, rows(done, every)))
        for program in ("perf", "trace-cmd"):
            if not shutil.which(program):
                print(f"{program} is not installed: left out")
    if peak > BOUND:
        raise Problem(f"the report took {peak >> 20:,} MiB, more than {BOUND >> 20:,}", VERDICT_FAILED)


if __name__ == "__main__":
    try:
        main()
    except Problem as problem:
        print(f"benchmarks.report: {problem}", file=sys.stderr)
        sys.exit(problem.code)
