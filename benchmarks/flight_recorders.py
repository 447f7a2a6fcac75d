# SPDX-License-Identifier: Apache-2.0
"""The always-on recorders that `benchmarks.flight_overhead` compares, and the workloads that they record."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.recorders import NAMES, RING_BYTES, Kept, Recorder, perf_read, trace_cmd_read
from tracer.probing import tracefs
from tracer.probing.probes import PROBES, preset_kinds

PRESETS: Final = ("all", "mmu", "time", "roots")


@dataclass(frozen=True)
class Scenario:
    """A workload of the test VMM: its arguments, its default number of loops, and tracepoints for other tools.

    `tracepoints` returns those that perf and trace-cmd record.
    """

    words: tuple[str, ...]
    loops: int
    tracepoints: Callable[[], tuple[str, ...]]


def mmu_tracepoints() -> tuple[str, ...]:
    """Return the names of those tracepoints of the preset `mmu` that this kernel has."""
    root = tracefs.tracefs() or tracefs.MOUNT_POINTS[0]
    wanted = preset_kinds("mmu")
    points = (point for probe in PROBES if probe.kind in wanted for point in probe.points)
    names = dict.fromkeys(point.where for point in points if point.how in ("tp", "raw"))
    return tuple(name for name in names if tracefs.tracepoint(root, name) is not None)


# In a storm on a KVM that emulates in software nearly all events are the emulator's; only the preset `all` has these.
SCENARIOS: Final = {
    "storm": Scenario(("storm",), 5_000, lambda: NAMES),
    "smi-storm": Scenario(("smi-storm",), 20, mmu_tracepoints),
}


def recorders(tracepoints: Sequence[str]) -> tuple[Recorder, ...]:
    """Return all recorders that are compared; those other than kvmtrace record these tracepoints."""
    ring = f"{RING_BYTES >> 20} MiB a CPU"
    return (
        *(Recorder(flight(each), sys.executable, _flight(each), _flight_read) for each in PRESETS),
        Recorder("--flight --max-overhead 1%", sys.executable, _flight("mmu", "--max-overhead", "1%"), _flight_read),
        Recorder(f"perf record -a --overwrite, {ring}", "perf", _overwrite(tracepoints), _overwrite_read),
        Recorder("perf kvm stat live", "perf", _live, _live_read),
        Recorder(f"trace-cmd start, {ring}", "trace-cmd", _ftrace(tracepoints), trace_cmd_read),
    )


def flight(preset: str) -> str:
    """Return the name of kvmtrace's flight recorder with this preset of events, as the table shows it."""
    return f"--flight --events {preset}"


def _flight(preset: str, *more: str) -> Callable[[Path, Sequence[str]], list[str]]:
    def command(scratch: Path, workload: Sequence[str]) -> list[str]:
        options = ["--flight", "30s", "--events", preset, *more, "--json", "-o", str(scratch / "dumps")]
        return [sys.executable, "-m", "kvmtrace", "record", *options, "--", *workload]

    return command


def _flight_read(scratch: Path) -> Kept:
    said = json.loads((scratch / "stdout").read_text())
    return Kept(said["events"], said["lost"], 0)


def _overwrite(tracepoints: Sequence[str]) -> Callable[[Path, Sequence[str]], list[str]]:
    """Return perf's own flight recorder: it overwrites its ring, and reads it when the workload has ended."""

    def command(scratch: Path, workload: Sequence[str]) -> list[str]:
        options = ["-q", "-a", "--overwrite", "-m", str(RING_BYTES // 4096), "-e", ",".join(tracepoints)]
        return ["perf", "record", *options, "-o", str(scratch / "perf.data"), "--", *workload]

    return command


def _overwrite_read(scratch: Path) -> Kept:
    kept = perf_read(scratch)
    return Kept(kept.events, None, kept.size)


def _live(scratch: Path, workload: Sequence[str]) -> list[str]:
    """Return a command that starts `perf kvm stat live` before the workload, and ends it after."""
    return ["sh", "-c", _LIVE, str(scratch), *workload]


# perf counts from its first output on, and prints once a second.
_LIVE: Final = """cd "$0"; perf kvm stat live -d 1 >live 2>&1 & p=$!
while kill -0 $p 2>/dev/null && ! ls -l /proc/$p/fd | grep -q perf_event; do sleep 0.2; done
sleep 1; "$@"; s=$?; kill -INT $p; wait $p; exit $s"""


def _live_read(scratch: Path) -> Kept:
    """Return the number of VM exits that `perf kvm stat live` counted; it prints a number each second."""
    said = (scratch / "live").read_text(errors="replace")
    return Kept(sum(map(int, re.findall(r"Total Samples:(\d+)", said))), None, 0)


def _ftrace(tracepoints: Sequence[str]) -> Callable[[Path, Sequence[str]], list[str]]:
    """Return ftrace by trace-cmd: its ring is overwritten, and extracted into a file when the workload has ended."""

    def command(scratch: Path, workload: Sequence[str]) -> list[str]:
        start = ["trace-cmd", "start", "-b", str(RING_BYTES >> 10)]
        start += [word for name in tracepoints for word in ("-e", name)]
        return ["sh", "-c", _FTRACE.format(start=" ".join(start)), str(scratch), *workload]

    return command


_FTRACE: Final = """cd "$0" && {start} >&2 || exit
"$@"; s=$?; trace-cmd stop >&2; trace-cmd extract -o trace.dat >&2; trace-cmd reset >&2; exit $s"""
