# SPDX-License-Identifier: Apache-2.0
"""Import against the tools whose files it reads: each reads the same file, in turns, in one run.

    python -m benchmarks.imports [--copies 100] [--rounds 3] [--json]

The files are `traces/simultaneous/slot-delete-6.1` many times over, one copy behind the other in time, so that they
are as trace-cmd and perf wrote them: trace.dat and perf.data, and of each the text that its tool prints. What is
measured are whole processes, start-up included; figures are medians of the rounds.

    trace-cmd report FILE >/dev/null     what `kvmtrace import FILE` of a trace.dat is compared with
    trace-cmd report FILE | awk          events counted by name: what an import of the text is compared with
    perf script -i FILE | python         the same of a perf.data

Of a pipeline the CPU time is that of all its processes, its time on the clock that of the slowest. Import writes its
trace as Parquet besides, which the others do not.
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
    """Medians of one command: events a second of clock and of CPU time, peak memory in MiB."""

    command: str
    per_second: float
    per_cpu_second: float
    memory: float


def many_pages(data: bytes, copies: int) -> bytes:
    """A trace.dat of version 6 with each CPU's pages many times over, later each time."""
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
    """A perf.data with its samples many times over, later each time."""
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


def measured(command: str, directory: Path) -> tuple[float, float, float]:
    """Seconds on the clock, of CPU, and the peak in MiB of a shell's command line and all that it runs."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-S", "-c", MEASURE, command], capture_output=True, text=True, cwd=directory)
    code, cpu, memory = done.stdout.split()
    if int(code):
        raise SystemExit(f"{command}: it ended with {code}")
    return time.monotonic() - began, float(cpu), float(memory)


def commands(directory: Path) -> dict[str, str]:
    """What is measured, by its name in the table."""
    python = shlex.quote(sys.executable)
    ours = f"{python} -m kvmtrace import"
    return {
        "trace-cmd report trace.dat": "trace-cmd report trace.dat",
        "kvmtrace import trace.dat": f"{ours} trace.dat -o a.parquet --force",
        "trace-cmd report trace.dat | awk": f"trace-cmd report trace.dat | awk {shlex.quote(AWK)}",
        "kvmtrace import report.txt": f"{ours} report.txt -o b.parquet --force",
        "perf script perf.data | python": f"perf script -f -i perf.data | {python} -S -c {shlex.quote(COUNTING)}",
        "kvmtrace import script.txt": f"{ours} script.txt -o c.parquet --force",
        "kvmtrace import perf.data": f"{ours} perf.data -o d.parquet --force",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--copies", type=int, default=100, help="some 4,500 events each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    for tool in ("trace-cmd", "perf"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is not installed")
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory(prefix="kvmtrace-bench-") as name:
        directory = Path(name)
        (directory / "trace.dat").write_bytes(many_pages(recorded(f"{NAME}.dat"), asked.copies))
        (directory / "perf.data").write_bytes(many_samples(recorded(f"{NAME}.data"), asked.copies))
        for command in ("trace-cmd report trace.dat > report.txt", "perf script -f -i perf.data > script.txt"):
            subprocess.run(command, shell=True, cwd=directory, stderr=subprocess.DEVNULL, check=True)  # noqa: S602
        taken: dict[str, list[tuple[float, float, float]]] = {each: [] for each in commands(directory)}
        for _ in range(asked.rounds):
            for each, command in commands(directory).items():
                taken[each].append(measured(command, directory))
        counts = {each: Trace.open(directory / f"{each}.parquet").metadata.events for each in "abcd"}
    events = counts["a"]
    figures = [_figure(each, runs, events) for each, runs in taken.items()]
    if asked.json:
        print(json.dumps({"machine": machine(), "events": counts, "figures": [asdict(each) for each in figures]}))
        return
    print(f"{machine()}; {events:,} events of kinds that a trace has ({counts})\n")
    rows = [(f.command, f"{f.per_second:,.0f}", f"{f.per_cpu_second:,.0f}", f"{f.memory:.0f}") for f in figures]
    print(table(("command", "events/s", "events/CPU s", "MiB"), rows))


def _figure(command: str, runs: list[tuple[float, float, float]], events: int) -> ImportFigure:
    clock, cpu, memory = (statistics.median(each) for each in zip(*runs, strict=True))
    return ImportFigure(command, events / clock, events / cpu, memory)


if __name__ == "__main__":
    main()
