# SPDX-License-Identifier: Apache-2.0
"""Runs a workload once under one recorder, in its own session and with a time limit, and reads the recording."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import workload
from benchmarks.recorders import Kept, Recorder
from tracer import vmm
from tracer.recording_options import owns_vm

ATTEMPTS = 4  # runs at most, to get one during which no other VM is alive
LOOK_SECONDS = 0.5  # between two searches for other VMs, because reading /proc costs some milliseconds


@dataclass(frozen=True)
class Run:
    """One run under one recorder, times in seconds; `why` says why it failed, and is empty if it did not.

    `disturbed` says that another VM was alive during the run.
    """

    recorder: str
    why: str = ""
    loops: int = 0
    guest_seconds: float = 0.0
    whole_seconds: float = 0.0
    recorder_cpu_seconds: float = 0.0
    work_cpu_seconds: float = 0.0  # of the VMM's process, with the probes that run in it
    kept: Kept | None = None
    disturbed: bool = False


def other_vms(session: int) -> bool:
    """Return whether a process outside `session` owns a VM now, whose events would be recorded as well."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if owns_vm(int(entry.name)) and os.getsid(int(entry.name)) != session:
                    return True
    return False


def supervise(child: subprocess.Popen[bytes], timeout: float) -> tuple[float, bool]:
    """Wait for a child that leads a session.

    Return the CPU seconds of its tree, and whether another VM was seen meanwhile.

    Raises subprocess.TimeoutExpired after ending the whole session.
    """
    deadline, look, disturbed = time.monotonic() + timeout, 0.0, False
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_utime + usage.ru_stime, disturbed
        now = time.monotonic()
        if now > deadline:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(OSError):
                    os.killpg(child.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(5)
            raise subprocess.TimeoutExpired(child.args, timeout)
        if now > look:
            look, disturbed = now + LOOK_SECONDS, disturbed or other_vms(child.pid)
        time.sleep(0.01)


def storm(loops: int, timeout: float, scenario: Sequence[str] = ("storm",)) -> list[str]:
    return [str(vmm.binary()), *scenario, "--loops", str(loops), "--timeout", str(int(timeout))]


def measure(recorder: Recorder, loops: int, timeout: float, scenario: Sequence[str] = ("storm",)) -> Run:
    """Run the workload under one recorder and read what it kept; the recorder's files are removed."""
    if shutil.which(recorder.program) is None:
        return Run(recorder.name, f"{recorder.program} is not installed")
    loops = max(1, round(loops * recorder.share))
    with tempfile.TemporaryDirectory(prefix="kvmtrace-bench-") as name:
        scratch = Path(name)
        result = scratch / "workload.json"
        work = storm(loops, timeout, scenario)
        argv = recorder.command(scratch, [sys.executable, "-S", str(workload.__file__), str(result), *work])
        with (scratch / "stdout").open("wb") as out, (scratch / "stderr").open("wb") as err:
            started = time.monotonic()
            environment = {**os.environ, **recorder.environment}
            child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
            )
            try:
                cpu, disturbed = supervise(child, timeout)
            except subprocess.TimeoutExpired:
                return Run(recorder.name, f"not done after {timeout:g} s")
            whole = time.monotonic() - started
        if child.returncode != 0 or not result.exists():
            return Run(recorder.name, f"refused: {last_words(scratch / 'stderr')}")
        ended = json.loads(result.read_text())
        guest = sum(ended["output"]["guest_ns"]) / 1e9
        kept = recorder.read(scratch)
        used, vmm_used = ended["cpu_seconds"], ended["vmm_cpu_seconds"]
        return Run(recorder.name, "", loops, guest, whole, cpu - used, vmm_used, kept, disturbed)


def last_words(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return "; ".join(lines[:3]) or "it says nothing"


def measure_undisturbed(recorder: Recorder, loops: int, timeout: float, scenario: Sequence[str] = ("storm",)) -> Run:
    """Repeat a run until no other VM is seen during it, ATTEMPTS times at most; return the last run."""
    for _ in range(ATTEMPTS - 1):
        run = measure(recorder, loops, timeout, scenario)
        if not run.disturbed:
            return run
    return measure(recorder, loops, timeout, scenario)
