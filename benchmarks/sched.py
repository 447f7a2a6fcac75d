# SPDX-License-Identifier: Apache-2.0
"""Measures what recording the time that vCPUs did not get costs everybody else: two programs on scheduler tracepoints.

    python -m benchmarks.sched [--rounds 5] [--switches 200000] [--json]

Two processes that are no vCPUs pass one byte to and fro on one CPU, which is nothing but wake-ups and switches. They do
so without a program, and with the recorder's two programs attached while a VM runs. The kernel's own measurement of one
run of each program (kernel.bpf_stats_enabled), whichever task was switched, is printed next to it. Needs root and KVM.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tracer import vmm
from tracer.probing.bpf import Probes
from tracer.probing.libbpf import program_info
from traces.errors import Problem

PROGRAMS = ("sched_switched", "sched_woken")
BPF_STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
_RUN_NS, _RUNS = 192, 200  # struct bpf_prog_info: run_time_ns, run_cnt


def ping_pong(switches: int, cpu: int) -> float:
    """Return the seconds that this many switches between two processes on one CPU take."""
    (to, at), (back, there) = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        os.sched_setaffinity(0, {cpu})
        while os.read(to, 1):
            os.write(there, b"x")
        os._exit(0)
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    os.close(to)
    began = time.perf_counter()
    for _ in range(switches // 2):
        os.write(at, b"x")
        os.read(back, 1)
    seconds = time.perf_counter() - began
    os.sched_setaffinity(0, allowed)
    os.kill(child, 9)
    os.waitpid(child, 0)
    for fd in (at, back, there):
        os.close(fd)
    return seconds


def kernel_counted(probes: Probes) -> dict[str, tuple[int, int]]:
    """Return {program: (ns, runs)} as the kernel counted them. Raises Problem where it gives no information."""
    found = {}
    for name in PROGRAMS:
        if not (info := program_info(probes.function(name))):
            raise Problem(f"the kernel does not tell about {name}")
        ns, runs = (int.from_bytes(info[at:][:8], sys.byteorder) for at in (_RUN_NS, _RUNS))
        found[name] = (ns, runs)
    return found


def measure(rounds: int, switches: int) -> dict[str, Any]:
    """Return the medians over the rounds as the document that `--json` prints.

    A round runs bare, then with the programs.
    """
    cpu = max(os.sched_getaffinity(0))
    bare, recorded = [], []
    with ExitStack() as stack:
        probes = Probes(frozenset({"sched_in"}), os.cpu_count() or 1, 1 << 20)
        stack.callback(probes.close)
        before = BPF_STATS.read_text()
        stack.callback(BPF_STATS.write_text, before)
        guest = subprocess.Popen([vmm.binary(), "roots", "--loops", "1000000000"], stdout=subprocess.DEVNULL)
        stack.callback(guest.wait)
        stack.callback(guest.kill)
        for _ in range(rounds):
            bare.append(ping_pong(switches, cpu))
            probes.attach()
            recorded.append(ping_pong(switches, cpu))
            probes.detach()
        BPF_STATS.write_text("1")
        probes.attach()
        ping_pong(switches, cpu)
        probes.detach()
        counted = kernel_counted(probes)
    return {
        "schema": 1,
        "switch_ns": round(statistics.median(bare) / switches * 1e9),
        "recorded_switch_ns": round(statistics.median(recorded) / switches * 1e9),
        "program_ns": {name: round(ns / max(runs, 1)) for name, (ns, runs) in counted.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--switches", type=int, default=200_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.rounds, arguments.switches)
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"a wake-up and a switch: {found['switch_ns']:,} ns bare, {found['recorded_switch_ns']:,} ns recorded")
    for name, ns in found["program_ns"].items():
        print(f"one run of {name}: {ns:,} ns")


if __name__ == "__main__":
    main()
