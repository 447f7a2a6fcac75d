# SPDX-License-Identifier: Apache-2.0
"""Compares `kvmtrace import` with the tools whose files it imports: each reads the same file, in turns, in one run.

    python -m benchmarks.imports [--copies 100 1000] [--rounds 3] [--json]

The files hold `traces/simultaneous/slot-delete-6.1` many times over, one copy after the other in time, in the formats
that trace-cmd and perf write (trace.dat and perf.data), and as the text that each tool prints of them. Whole processes
are measured, start-up included. Each import is compared with a peer that reads the same file:

    trace-cmd report trace.dat           prints the events; the peer of an import of trace.dat
    trace-cmd report trace.dat | awk     counts them by name, the least that one does with a text; the peer of an
                                         import of trace-cmd's output
    awk report.txt                       counts them in a text that somebody sent, without trace-cmd and trace.dat
    perf script | python, python         the same for perf.data and its text

The CPU time of a pipeline is that of all its processes. Import also writes its trace as Parquet, which the peers do
not. Ratios are of the same round; all figures are medians. With several sizes the cost of one further event is printed
too, without what the processes cost to start.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.record import machine, table
from tests.traces.binary_files import recorded
from traces.reader import Trace

Taken = tuple[float, float, float]  # seconds on the clock, of CPU, peak MiB

NAME = "slot-delete-6.1"
SPAN = 10_000_000_000  # ns between copies
PAGE = 4096
COUNTING = (
    "import sys, collections; counts = collections.Counter(line.split(':')[2] for line in sys.stdin if ': kvm' in line "
    "or ' kvm' in line); print(sum(counts.values()))"
)
MEASURE = (
    "import resource, subprocess, sys\n"
    "code = subprocess.run(sys.argv[1], shell=True, stdout=-3, stderr=-3).returncode\n"
    "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
    "print(code, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)"
)
AWK = "{ for (i = 4; i < 7; i++) if ($i ~ /^kvm/) { n[$i]++; break } } END { for (e in n) print e, n[e] }"


@dataclass(frozen=True)
class ImportFigure:
    """Medians of one command on one file size: events per second of clock and of CPU time, and peak memory in MiB.

    `times` and `cpu_times` are these rates divided by those of the command's peer; 1 for a peer.
    """

    command: str
    events: int
    per_second: float
    per_cpu_second: float
    memory: float
    times: float
    cpu_times: float


def many_pages(data: bytes, copies: int) -> bytes:
    """Return a trace.dat (version 6) in which each CPU's pages are repeated, each copy later than the one before."""
    begin = data.index(b"flyrecord\0") + 10
    places = [struct.unpack_from("<QQ", data, begin + 16 * cpu) for cpu in range(2)]
    first = (begin + 32 + PAGE - 1) // PAGE * PAGE
    table, pages = b"", []
    for at, size in places:
        table += struct.pack("<QQ", first + sum(map(len, pages)), size * copies)
        for copy in range(copies):
            for page in range(at, at + size, PAGE):
                (when,) = struct.unpack_from("<Q", data, page)
                pages.append(struct.pack("<Q", when + copy * SPAN) + data[page + 8 : page + PAGE])
    return data[:begin] + table + bytes(first - begin - 32) + b"".join(pages)


def many_samples(data: bytes, copies: int) -> bytes:
    """Return a perf.data in which the samples are repeated, each copy later than the one before."""
    at, size = struct.unpack_from("<QQ", data, 40)
    records, head = [], []
    place = at
    while place < at + size:
        number, _, length = struct.unpack_from("<IHH", data, place)
        (records if number in (9, 68) else head).append(data[place : place + length])
        place += length
    (sample_type,) = struct.unpack_from("<Q", data, struct.unpack_from("<Q", data, 24)[0] + 24)
    when = 8 + 8 * sum(bool(sample_type & bit) for bit in (1 << 16, 1, 2))
    made = [b"".join(head)]
    for copy in range(copies):
        for one in records:
            if one[0] != 9:
                made.append(one)
                continue
            (time_,) = struct.unpack_from("<Q", one, when)
            made.append(one[:when] + struct.pack("<Q", time_ + copy * SPAN) + one[when + 8 :])
    body = b"".join(made)
    moved = len(body) - size
    low, high = struct.unpack_from("<QQ", data, 72)
    behind = bytearray(data[at + size :])
    for number in range((low | high << 64).bit_count()):
        begin, length = struct.unpack_from("<QQ", behind, 16 * number)
        struct.pack_into("<QQ", behind, 16 * number, begin + moved, length)
    start = bytearray(data[:at])
    struct.pack_into("<Q", start, 48, len(body))
    return bytes(start) + body + bytes(behind)


def measured(command: str, directory: Path) -> Taken:
    """Run a shell command line.

    Return its seconds on the clock, its CPU seconds, and its largest process's peak in MiB.
    """
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-S", "-c", MEASURE, command], capture_output=True, text=True, cwd=directory)
    code, cpu, memory = done.stdout.split()
    if int(code):
        raise SystemExit(f"{command}: it ended with {code}")
    return time.monotonic() - began, float(cpu), float(memory)


PEERS = {  # the command that each import is compared with
    "kvmtrace import trace.dat": "trace-cmd report trace.dat",
    "trace-cmd report trace.dat | kvmtrace import -": "trace-cmd report trace.dat | awk",
    "kvmtrace import report.txt": "awk report.txt",
    "perf script perf.data | kvmtrace import -": "perf script perf.data | python",
    "kvmtrace import perf.data": "perf script perf.data | python",
    "kvmtrace import script.txt": "python script.txt",
}


def commands() -> dict[str, str]:
    """Return the shell command lines that are measured, by their name in the table."""
    python, awk = shlex.quote(sys.executable), f"awk {shlex.quote(AWK)}"
    count = f"{python} -S -c {shlex.quote(COUNTING)}"
    report, script = "trace-cmd report trace.dat", "perf script -f -i perf.data"

    def ours(source: str, out: str) -> str:
        return f"{python} -m kvmtrace import {source} -o {out}.parquet --force"

    return {
        "trace-cmd report trace.dat": report,
        "kvmtrace import trace.dat": ours("trace.dat", "dat"),
        "trace-cmd report trace.dat | awk": f"{report} | {awk}",
        "trace-cmd report trace.dat | kvmtrace import -": f"{report} | {ours('-', 'report-pipe')}",
        "awk report.txt": f"{awk} report.txt",
        "kvmtrace import report.txt": ours("report.txt", "report"),
        "perf script perf.data | python": f"{script} | {count}",
        "perf script perf.data | kvmtrace import -": f"{script} | {ours('-', 'script-pipe')}",
        "kvmtrace import perf.data": ours("perf.data", "data"),
        "python script.txt": f"{count} < script.txt",
        "kvmtrace import script.txt": ours("script.txt", "script"),
    }


def compare(copies: int, rounds: int, directory: Path) -> list[ImportFigure]:
    """Measure all commands on files of that many copies.

    Raises SystemExit if a command fails, or if the imports differ in their number of events.
    """
    (directory / "trace.dat").write_bytes(many_pages(recorded(f"{NAME}.dat"), copies))
    (directory / "perf.data").write_bytes(many_samples(recorded(f"{NAME}.data"), copies))
    for command in ("trace-cmd report trace.dat > report.txt", "perf script -f -i perf.data > script.txt"):
        subprocess.run(command, shell=True, cwd=directory, stderr=subprocess.DEVNULL, check=True)  # noqa: S602
    taken: dict[str, list[Taken]] = {each: [] for each in commands()}
    for _ in range(rounds):
        for each, command in commands().items():
            taken[each].append(measured(command, directory))
    counts = {path.stem: Trace.open(path).metadata.events for path in sorted(directory.glob("*.parquet"))}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"not the same events: {counts}")
    return [_figure(each, runs, taken[PEERS.get(each, each)], counts["dat"]) for each, runs in taken.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--copies", type=int, nargs="+", default=[100, 1000], help="some 4,500 events each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    for tool in ("trace-cmd", "perf"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not installed")
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with it Python would compile every module at each start
    with tempfile.TemporaryDirectory(prefix="kvmtrace-bench-") as name:
        sizes = [compare(copies, asked.rounds, Path(name)) for copies in asked.copies]
    if asked.json:
        print(json.dumps({"machine": machine(), "figures": [asdict(each) for size in sizes for each in size]}))
        return
    head = ["command", "events/s", "times its peer", "events/CPU s", "times its peer", "MiB"]
    for figures in sizes:
        print(f"{machine()}; {figures[0].events:,} events\n\n{table(head, [_row(each) for each in figures])}\n")
    if len(sizes) > 1:
        print(f"of further events\n\n{table(head[:5], _further(sizes[0], sizes[-1]))}")


def _figure(command: str, runs: list[Taken], peer: list[Taken], events: int) -> ImportFigure:
    clock, cpu, memory = (statistics.median(each) for each in zip(*runs, strict=True))
    times, cpu_times = (
        statistics.median(other[at] / mine[at] for mine, other in zip(runs, peer, strict=True)) for at in (0, 1)
    )
    return ImportFigure(command, events, events / clock, events / cpu, memory, times, cpu_times)


def _row(figure: ImportFigure) -> list[str]:
    ours = figure.command in PEERS
    return [
        figure.command,
        f"{figure.per_second:,.0f}",
        f"{figure.times:.2f}" if ours else "",
        f"{figure.per_cpu_second:,.0f}",
        f"{figure.cpu_times:.2f}" if ours else "",
        f"{figure.memory:.0f}",
    ]


def _further(few: list[ImportFigure], many: list[ImportFigure]) -> list[list[str]]:
    """Return table rows of the rate of further events: of the difference between the sizes, without start-up."""
    speeds: dict[str, list[float]] = {}
    for small, large in zip(few, many, strict=True):
        speeds[large.command] = [
            (large.events - small.events) / (large.events / getattr(large, per) - small.events / getattr(small, per))
            for per in ("per_second", "per_cpu_second")
        ]
    rows = []
    for command, each in speeds.items():
        peer = speeds[PEERS.get(command, command)]
        times = [f"{mine / other:.2f}" if command in PEERS else "" for mine, other in zip(each, peer, strict=True)]
        rows.append([command, f"{each[0]:,.0f}", times[0], f"{each[1]:,.0f}", times[1]])
    return rows


if __name__ == "__main__":
    main()
