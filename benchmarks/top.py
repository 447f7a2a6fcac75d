# SPDX-License-Identifier: Apache-2.0
"""Measures how much CPU time `kvmtrace top` uses while guests make a given number of events a second.

    python -m benchmarks.top [--rate 100000] [--seconds 20] [--rounds 3] [--json]

`kvmtrace top` runs as a person would start it, on a terminal of 120 by 40 characters that is read but not drawn. Guests
load new roots as fast as they can, and are stopped and continued so that they make `--rate` events a second, which
`perf stat` counts. The figure is the CPU time of top's own process (/proc/PID/stat) over those seconds. The time that
its BPF programs ran in other processes is counted by the kernel (kernel.bpf_stats_enabled) and printed next to it.
Needs root and KVM.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pty
import signal
import statistics
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.record import machine
from benchmarks.sched import BPF_STATS
from tracer import vmm
from traces.errors import ENVIRONMENT, Problem

COUNTED = ("kvmmmu:kvm_mmu_get_page", "kvmmmu:kvm_mmu_prepare_zap_page", "kvm:kvm_userspace_exit")
GUESTS = 2
BEAT_MS = 50  # the interval at which guests are stopped or continued
SETTLE_SECONDS = 3.0  # from when top first shows a VM until the measurement begins
HERTZ = os.sysconf("SC_CLK_TCK")
WANTED = 0.02  # of a CPU, at 100,000 events a second


@dataclass(frozen=True)
class TopRun:
    """One run: events a second, and the shares of one CPU that top and its BPF programs used."""

    rate: float
    cpu: float
    programs: float  # of top's BPF programs, in whichever process they ran


class Guests:
    """Guests that are stopped and continued so that they make `rate` events a second, as `perf stat` counts them."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        words = [str(vmm.binary()), "roots", "--pages", "1", "--loops", "1000000000", "--timeout", "3600"]
        self._guests = [subprocess.Popen(words, stdout=subprocess.DEVNULL) for _ in range(GUESTS)]
        events = [word for name in COUNTED for word in ("-e", name)]
        self._perf = subprocess.Popen(
            ["perf", "stat", "-a", "-x", ",", "-I", str(BEAT_MS), *events], stderr=subprocess.PIPE, text=True
        )
        self.counted = 0
        self._thread = threading.Thread(target=self._pace, daemon=True)
        self._thread.start()

    def _pace(self) -> None:
        assert self._perf.stderr is not None
        owed = 0.0
        lines: list[int] = []
        for line in self._perf.stderr:
            words = line.split(",")
            if len(words) < 4 or not words[1].isdigit():
                continue
            lines.append(int(words[1]))
            if len(lines) < len(COUNTED):
                continue
            self.counted += sum(lines)
            owed = min(owed + self._rate * BEAT_MS / 1000 - sum(lines), float(self._rate))
            lines = []
            for guest in self._guests:
                guest.send_signal(signal.SIGCONT if owed > 0 else signal.SIGSTOP)

    def close(self) -> None:
        """End the guests and `perf stat`."""
        for process in (self._perf, *self._guests):
            process.kill()
            process.wait()
        self._thread.join()


@contextlib.contextmanager
def top_on_a_terminal() -> Iterator[int]:
    """Run `kvmtrace top` on a terminal of its own, and yield its process ID once it shows a VM.

    Raises Problem if it shows none within 120 seconds.
    """
    pid, terminal = pty.fork()
    if not pid:
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [sys.executable, "-m", "kvmtrace", "top"])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))

    shows = threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError):
            while drawn := os.read(terminal, 1 << 16):
                if b"process" in drawn:
                    shows.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        if not shows.wait(120):
            raise Problem("kvmtrace top shows no VM", ENVIRONMENT)
        yield pid
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        os.close(terminal)


def used(pid: int) -> float:
    """Return the CPU seconds that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / HERTZ


def program_seconds(pid: int) -> float:
    """Return the seconds for which a process's BPF programs have run, as the kernel counts them, each program once."""
    found: dict[str, int] = {}
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            facts = dict(line.split(":", 1) for line in entry.read_text().splitlines() if ":" in line)
            if "prog_id" in facts and "run_time_ns" in facts:
                found[facts["prog_id"]] = int(facts["run_time_ns"])
    return sum(found.values()) / 1e9


def measure(rate: int, seconds: float) -> TopRun:
    """Run top and the guests once, and return what was used in `seconds` after the start-up."""
    guests = Guests(rate)
    try:
        with top_on_a_terminal() as pid:
            time.sleep(SETTLE_SECONDS)
            began, before, events, programs = time.monotonic(), used(pid), guests.counted, program_seconds(pid)
            time.sleep(seconds)
            passed = time.monotonic() - began
            after, programs = used(pid), program_seconds(pid) - programs
            events = guests.counted - events
    finally:
        guests.close()
    if not events:
        raise Problem("perf stat counted nothing", ENVIRONMENT)
    return TopRun(events / passed, (after - before) / passed, programs / passed)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.top", description="What top uses of a CPU.")
    parser.add_argument("--rate", type=int, default=100_000, help="events a second")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    if os.geteuid() != 0 or not Path("/dev/kvm").exists():
        raise SystemExit("benchmarks.top: needs root and /dev/kvm")
    facts, before = machine(), BPF_STATS.read_text()
    BPF_STATS.write_text("1")
    try:
        runs = [measure(options.rate, options.seconds) for _ in range(options.rounds)]
    except Problem as problem:
        print(f"benchmarks.top: {problem}", file=sys.stderr)
        raise SystemExit(ENVIRONMENT) from None
    finally:
        BPF_STATS.write_text(before)
    if options.json:
        print(json.dumps({"schema": 1, **facts, "runs": [asdict(run) for run in runs]}, indent=2))
        return
    print(
        f"{facts['date']}, kernel {facts['kernel']}, {facts['cpu']}, {facts['cpus']} CPUs, load {facts['load']:.1f}\n"
    )
    print("| events a second | top, of a CPU | its BPF programs, of a CPU |\n|-:|-:|-:|")
    for run in runs:
        print(f"| {run.rate:,.0f} | {run.cpu:.1%} | {run.programs:.1%} |")
    median = statistics.median(run.cpu for run in runs)
    print(f"\ntop, median: {median:.1%} of a CPU (wanted: at most {WANTED:.0%} at 100,000 events a second).")


if __name__ == "__main__":
    main()
