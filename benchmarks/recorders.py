# SPDX-License-Identifier: Apache-2.0
"""The recorders that `benchmarks.record` compares: how each is started, and how its counts of events are read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tracer.ring import default_ring_bytes

CPUS = os.cpu_count() or 1
RING_BYTES = default_ring_bytes(CPUS)  # bytes a CPU, kvmtrace's default; the other tools get a row with this size too

# For each tracepoint its group, its name, and the two fields that bpftrace prints. kvmtrace and perf store all fields.
TRACEPOINTS = (
    ("kvmmmu", "kvm_mmu_get_page", "gfn", "role"),
    ("kvmmmu", "kvm_mmu_prepare_zap_page", "gfn", "role"),
    ("kvmmmu", "kvm_mmu_paging_element", "pte", "level"),
    ("kvmmmu", "kvm_mmu_pagetable_walk", "addr", "pferr"),
    ("kvm", "kvm_emulate_insn", "rip", "failed"),
    ("kvm", "kvm_mmio", "gpa", "val"),
    ("kvm", "kvm_userspace_exit", "reason", "errno"),
)
KINDS = tuple(event for _, event, *_ in TRACEPOINTS)
NAMES = tuple(f"{group}:{event}" for group, event, *_ in TRACEPOINTS)


@dataclass(frozen=True)
class Kept:
    """What one recording holds: events, lost events (None if the tool does not say how many), and bytes on disk."""

    events: int
    lost: int | None
    size: int
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Recorder:
    """One recorder, which is one row of the table.

    It runs only a `share` of the workload's loops if all would take minutes.
    """

    name: str
    program: str
    command: Callable[[Path, Sequence[str]], list[str]]  # scratch directory, workload -> argv
    read: Callable[[Path], Kept]  # scratch directory -> what was kept
    environment: dict[str, str] = field(default_factory=dict)
    share: float = 1.0


def bare_command(_scratch: Path, workload: Sequence[str]) -> list[str]:
    return list(workload)


def bare_read(_scratch: Path) -> Kept:
    return Kept(0, 0, 0)


def kvmtrace_command(scratch: Path, workload: Sequence[str]) -> list[str]:
    options = ["-m", "kvmtrace", "record", "--json", "-o", str(scratch / "trace.parquet"), "--events", ",".join(KINDS)]
    return [sys.executable, *options, "--", *workload]


def kvmtrace_read(scratch: Path) -> Kept:
    said = json.loads((scratch / "stdout").read_text())
    extra = {"drain_cpu_seconds": float(said["recorder_cpu_seconds"]), "emitted": float(said["emitted"])}
    return Kept(said["events"], said["lost"], (scratch / "trace.parquet").stat().st_size, extra)


def perf_command(*options: str) -> Callable[[Path, Sequence[str]], list[str]]:
    def command(scratch: Path, workload: Sequence[str]) -> list[str]:
        events = ["-e", ",".join(NAMES)]
        return ["perf", "record", "-q", "-a", *options, *events, "-o", str(scratch / "perf.data"), "--", *workload]

    return command


def perf_read(scratch: Path) -> Kept:
    """Read the counts of `perf report --stats`: LOST_SAMPLES are samples (perf and kernel from 6.0), LOST chunks."""
    data = scratch / "perf.data"
    argv = ["perf", "report", "-i", str(data), "--stats"]
    text = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^(.+) stats:$", text, flags=re.MULTILINE)
    by_event = "".join(block for name, block in zip(parts[1::2], parts[2::2], strict=True) if name.startswith("kvm"))
    lost: int | None = _sum(r"^\s*LOST_SAMPLES events:\s+(\d+)", by_event)
    if not lost and _sum(r"^\s*LOST events:\s+(\d+)", text):
        lost = None
    kept = _sum(r"^\s*SAMPLE events:\s+(\d+)", by_event)
    return Kept(kept, lost, data.stat().st_size)


def trace_cmd_command(scratch: Path, workload: Sequence[str]) -> list[str]:
    events = [word for name in NAMES for word in ("-e", name)]
    options = ["-q", "-b", str(RING_BYTES >> 10), *events, "-o", str(scratch / "trace.dat")]
    return ["trace-cmd", "record", *options, *workload]


def trace_cmd_read(scratch: Path) -> Kept:
    """Read the statistics of the kernel's buffer that trace-cmd saves: events read, overwritten and dropped."""
    data = scratch / "trace.dat"
    argv = ["trace-cmd", "report", "--stat", "-i", str(data)]
    text = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    lost = _sum(r"^(?:overrun|dropped events): (\d+)", text)
    return Kept(_sum(r"^read events: (\d+)", text), lost, data.stat().st_size)


def bpftrace_command(scratch: Path, workload: Sequence[str]) -> list[str]:
    """Return a bpftrace command that prints a line for each event: time, CPU, kind, and two fields."""
    script = scratch / "events.bt"
    probe = 'tracepoint:{}:{} {{ printf("%llu %d {} %llx %x\\n", nsecs, cpu, args->{}, args->{}); }}\n'
    script.write_text("".join(
        probe.format(group, event, letter, one, two)
        for letter, (group, event, one, two) in zip("gzewimu", TRACEPOINTS, strict=True)
    ))  # fmt: skip
    return ["bpftrace", "-q", "-o", str(scratch / "events.txt"), "-c", " ".join(workload), str(script)]


def bpftrace_read(scratch: Path) -> Kept:
    data, events, lost = scratch / "events.txt", 0, 0
    with data.open("rb") as lines:
        for line in lines:
            if line.startswith(b"Lost "):
                lost += int(line.split()[1])
            elif line[:1].isdigit():
                events += 1
    return Kept(events, lost, data.stat().st_size)


def _sum(pattern: str, text: str) -> int:
    return sum(int(number) for number in re.findall(pattern, text, re.MULTILINE))


def recorders() -> tuple[Recorder, ...]:
    """Return all recorders, in the order in which a round runs them.

    bpftrace gets a tenth of the loops, because it slows the workload down some 60 times.
    """
    pages = str(RING_BYTES // 4096)
    buffer = f"{RING_BYTES >> 20} MiB a CPU"
    return (
        Recorder("bare", sys.executable, bare_command, bare_read),
        Recorder("kvmtrace record", sys.executable, kvmtrace_command, kvmtrace_read),
        Recorder("perf record -a -e", "perf", perf_command(), perf_read),
        Recorder(f"perf record -a -e, {buffer}", "perf", perf_command("-m", pages), perf_read),
        Recorder(f"trace-cmd record, {buffer}", "trace-cmd", trace_cmd_command, trace_cmd_read),
        Recorder("bpftrace, 1/10 of the loops", "bpftrace", bpftrace_command, bpftrace_read, share=0.1),
        Recorder(f"bpftrace, {buffer}, 1/10 of the loops", "bpftrace", bpftrace_command, bpftrace_read,
                 {"BPFTRACE_PERF_RB_PAGES": pages}, 0.1),
    )  # fmt: skip
