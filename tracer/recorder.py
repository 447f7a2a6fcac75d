# SPDX-License-Identifier: Apache-2.0
"""One recording, from attached probes to a finished Parquet file.

The order matters: nothing is attached before the output can be written, the VMs that are already there are read before
the first event, and at the end the probes are detached before the last drain, so that every event counted as emitted is
either in the file or counted as lost.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tracer.owner_names import OwnerNames
from tracer.probing import host
from tracer.probing.bpf import Probes, loss_table
from tracer.probing.btf import kernel_btf
from tracer.recording_options import Options, check
from tracer.ring import Rings, default_ring_bytes, ring_count
from tracer.writer import SegmentThread, Sink, prefer_this_thread
from traces import outputs
from traces.command_line import interrupts
from traces.command_line.extras import have
from traces.command_line.progress import Progress
from traces.errors import Problem
from traces.record import RECORD
from traces.recording.recording_summary import of_segments
from traces.schema import BY_NAME

if TYPE_CHECKING:
    from traces.recording.recording_summary import Summary

IDLE_SECONDS = 0.02  # between drains: long enough for full batches, short against a ring (32 MiB: 0.1 s at 4 M/s)
FLUSH_SECONDS = 1.0
SAY_SECONDS = 0.25  # between two texts of the live line
SETTLE_SECONDS = 1.0  # after the command ended: RCU callbacks still free its tables
QUIET_SECONDS = 0.1
GAP, SUSPEND = BY_NAME["gap"].code, BY_NAME["host_suspend"].code
SUSPENDED = 1_000_000  # ns that the host must have been suspended for a `host_suspend` row
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class RecordingOutcome:
    """How a recording ended: a summary of the file, why it stopped, the command's exit status, and its cost."""

    summary: Summary
    stopped: str
    status: int | None
    cpu_seconds: float
    seconds: float
    missed: dict[str, int]  # by probe, runs that the kernel skipped


class Stop:
    """Set by SIGINT, SIGTERM and SIGHUP: the first ends the recording cleanly, a second leaves it to `recover`."""

    def __init__(self) -> None:
        self.reason = ""
        self.hard = False

    def handle(self, number: int, _frame: object) -> None:
        if self.reason:
            self.hard = True
        self.reason = self.reason or f"ended by {signal.Signals(number).name}"

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        # nohup's way to outlive a terminal is to have SIGHUP ignored.
        heard = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Recorder:
    """Drains the rings of loaded probes into the directory of one recording."""

    flush_seconds = FLUSH_SECONDS
    idle_seconds = IDLE_SECONDS

    def __init__(self, options: Options, probes: Probes, ring_bytes: int, stop: Stop) -> None:
        self.options = options
        self.stop = stop
        self.probes = probes
        self.rings = Rings(probes.ring_fds, ring_bytes)
        self.drained = self.events = 0  # rows taken from the rings; if there is a limit, of them the events
        self.snapshot = self._look()
        self.clock = [host.clock_sample()]
        self._awake = host.suspended()
        self.counted = host.Counted()
        self.owners = OwnerNames()
        self.missed: dict[str, int] = {}
        self._turned_away: dict[tuple[int, int], int] = {}
        self.writer = self._open(self._manifest(ring_bytes))
        self._child: subprocess.Popen[bytes] | None = None
        self._said = 0.0

    def _open(self, manifest: dict[str, Any]) -> Sink:
        """Begin to store, and return what takes the records."""
        options = self.options
        self._segments = SegmentThread(options.directory, manifest, options.max_events, options.max_size)
        self._turned_away = self._segments.turned_away
        return self._segments

    def _flush(self) -> None:
        """Make durable what was recorded until now; called every `flush_seconds`."""
        self._store(self._progress)

    def _store(self, changes: Callable[[], dict[str, Any]]) -> None:
        """Store changes of the manifest; `changes` is called by the writer's thread."""
        self._segments.flush(changes)

    def _look(self) -> dict[str, Any]:
        """Return a snapshot of the VMs that are alive now and to be recorded."""
        only = self.options.vm
        return {"vms": [vm for vm in self.probes.snapshot()["vms"] if only is None or vm["tgid"] == only]}

    def _manifest(self, ring_bytes: int) -> dict[str, Any]:
        from importlib.metadata import version

        lab = {key.removeprefix("KVMTRACE_LAB_").lower(): value for key, value in os.environ.items()
               if key.startswith("KVMTRACE_LAB_")}  # fmt: skip
        return {
            "recorder": version("kvmtrace"),
            # Without its directory: a trace gets mailed around.
            "command": [Path(self.options.command[0]).name, *self.options.command[1:]] if self.options.command else [],
            "preset": self.options.preset,
            "vm_filter": self.options.vm,
            "rings": {"count": len(self.probes.ring_fds), "bytes": ring_bytes},
            "lab": lab,
            **host.host(kernel_btf()),
            "layout": self.probes.layout.metadata(),
            "snapshot": self.snapshot,
            **self._progress(),
        }

    def _progress(self) -> dict[str, Any]:
        """Return what changes while recording; each flush writes it, so that a killed recording has it, too.

        It reads debugfs and whole maps, which may take long on a host with many VMs: the drain never calls it.
        """
        self.missed = self.probes.missed()
        threads = self.probes.threads()
        owners = {thread["tgid"] for thread in threads.values()} | {vm["tgid"] for vm in self.snapshot["vms"]}
        return {
            "probes": [attachment.metadata() for attachment in self.probes.plan.attachments],
            "hooks": [attachment.metadata() for attachment in self.probes.plan.hooks],
            "clock": {"name": "boottime", "samples": [*self.clock, host.clock_sample()]},
            "threads": {str(tid): thread for tid, thread in threads.items()},
            "vm_names": self.owners.of(owners),
            "stats": self.counted.look(),
            "loss": loss_table(self.probes.counters(), self._turned_away),
            "missed": self.missed,
        }

    def run(self, progress: Progress) -> tuple[str, int | None]:
        """Attach, record until something ends it, detach, drain; return (why it ended, the command's status)."""
        options, started, flushed = self.options, time.monotonic(), time.monotonic()
        self.probes.attach()
        try:
            self._meet_latecomers()
            if options.command:
                self._child = subprocess.Popen(options.command, stdout=options.command_stdout)
            prefer_this_thread()  # only now: the command must not inherit it
            while not (reason := self._ended(started)):
                if not self._drain_once():
                    time.sleep(self.idle_seconds)
                now = time.monotonic()
                if now - flushed >= self.flush_seconds:
                    flushed = now
                    self._flush()
                self._show(progress, now - started)
            if self._child and self._child.poll() is not None:
                self._settle()
        finally:
            self.probes.detach()
            if self._child and self._child.poll() is None:
                self._child.terminate()
        status = self._child.wait() if self._child else None
        self._finish()
        return reason, status

    def _meet_latecomers(self) -> None:
        """Add VMs created after the snapshot but before the probes: no row will show their creation.

        It also prints what a user could not know: that no VM is running yet, or what a pid namespace hides.
        """
        known = {vm["kvm"] for vm in self.snapshot["vms"]} | self.probes.born()
        new = [vm for vm in self._look()["vms"] if vm["kvm"] not in known]
        if new:
            self.snapshot = {"vms": [*self.snapshot["vms"], *new]}
            self._store(lambda: {"snapshot": self.snapshot})
        if self.options.vm is not None or self.options.command:
            return
        if not self.snapshot["vms"]:
            print("kvmtrace: no VM is running yet: recording from the first one's creation on", file=sys.stderr)
        if self.probes.pid_namespace_level():
            print(
                "kvmtrace: in a pid namespace: the names and slots of VMs that already run outside of it are not "
                "known, and their threads are numbered from 2^30 on",
                file=sys.stderr,
            )

    def _drain_once(self) -> bool:
        """Read the rings once; return whether more is waiting already."""
        self._look_at_clocks()
        batches, complete_at = self.rings.drain()
        if batches:
            self.drained += sum(len(batch) for batch in batches)
            if self.options.max_events is not None:
                self.events += sum(int(np.count_nonzero(batch["kind"] != GAP)) for batch in batches)
            self.writer.write(batches, complete_at)
        return self.rings.fill > 0.05

    def _look_at_clocks(self) -> None:
        """Write a row if the host was suspended since the last call: only the boot clock advances then."""
        before, self._awake = self._awake, host.suspended()
        slept = self._awake.least - before.most
        if slept >= SUSPENDED:
            record = np.zeros(1, RECORD)
            record["time"], record["kind"], record["vcpu"] = self._awake.boot, SUSPEND, -1
            record["w0"], record["w1"] = before.boot, slept
            self.writer.write([record], 0)

    def _ended(self, started: float) -> str:
        options = self.options
        if self.stop.reason:
            return self.stop.reason
        if self.writer.error:
            return "the disk refused"
        if self._child and self._child.poll() is not None:
            return "the command ended"
        if options.duration is not None and time.monotonic() - started >= options.duration:
            return f"{options.duration:g} s are over"
        if full := self._full():
            return full
        if options.max_events is not None and self.events >= options.max_events:
            return f"{options.max_events:,} events reached"
        if options.vm is not None and not Path(f"/proc/{options.vm}").is_dir():
            return f"the VM's process {options.vm} ended"
        return ""

    def _full(self) -> str:
        """Return why nothing more can be stored; empty while there is room."""
        return self._segments.full

    def _settle(self) -> None:
        """Wait until no event came for a moment, at most a second, while the kernel frees a VM that has ended."""
        end = time.monotonic() + SETTLE_SECONDS
        last = time.monotonic()
        while (now := time.monotonic()) < end and now - last < QUIET_SECONDS:
            before = self.drained
            self._drain_once()
            if self.drained > before:
                last = now
            time.sleep(IDLE_SECONDS / 4)

    def _finish(self) -> None:
        """Drain for the last time: every event emitted is now stored or lost, or else the file reports a bug."""
        deadline = time.monotonic() + 2.0
        while True:
            self._drain_once()
            counters = self.probes.counters()
            expected = int(counters["emitted"].sum() - counters["lost"].sum())
            if self.drained >= expected or time.monotonic() > deadline:
                break
            time.sleep(IDLE_SECONDS)
        if len(gaps := open_gaps(counters)):
            self.writer.write([gaps], 0)
        self._close()

    def _close(self) -> None:
        """End storing; everything is durable afterwards."""
        self._segments.close(self._progress)

    def _show(self, progress: Progress, seconds: float) -> None:
        if not progress.shown or seconds - self._said < SAY_SECONDS:
            return
        self._said = seconds
        lost = int(self.probes.counters()["lost"].sum())
        with contextlib.suppress(OSError):  # the terminal may be gone, and its SIGHUP on the way
            progress.say(
                f"recording: {self.drained:,} events, {self.drained / max(seconds, 0.001):,.0f}/s, lost {lost:,}, "
                f"ring {self.rings.fill:.0%}, {self._stored()}"
            )

    def _stored(self) -> str:
        """Return how much is stored, as text for the live line."""
        return f"{self._segments.bytes_written / 1e6:,.1f} MB"


def open_gaps(counters: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return gap records for the CPUs on which nothing was recorded after a loss."""
    cpus = np.flatnonzero(counters["gap_count"])
    records = np.zeros(len(cpus), RECORD)
    records["time"] = host.clock_sample()["boot"]
    records["kind"] = GAP
    records["vcpu"] = -1
    records["cpu"] = cpus
    for word, name in (("w0", "gap_count"), ("w1", "gap_kinds"), ("w2", "gap_since")):
        records[word] = counters[name][cpus]
    return records


@dataclass
class Taken:
    """A recording in its directory, not compacted: why it ended, the command's status, runs that the kernel skipped."""

    options: Options
    stopped: str
    status: int | None
    missed: dict[str, int]
    drained: int


def take(*several: Options) -> Iterator[Taken]:
    """Make recordings one after the other with one set of probes; all must ask for the same events, rings and VM.

    Each is yielded once it has ended, and left in its directory as segments. Raises Problem; what was flushed before
    stays on disk.
    """
    for options in several:
        check(options)
        outputs.check(options.out, outputs.RECORDING)
    stop, cpus, first = Stop(), os.cpu_count() or 1, several[0]
    ring_bytes = first.ring_bytes or default_ring_bytes(cpus)
    with stop.listening():
        probes = Probes(first.kinds, ring_count(cpus), ring_bytes, first.vm)
        try:
            for options in several:
                probes.reset()
                recorder = Recorder(options, probes, ring_bytes, stop)
                with Progress("recording") as progress:
                    reason, status = recorder.run(progress)
                if stop.hard:
                    raise Problem(
                        f"stopped before compaction: run `kvmtrace recover {options.directory}`", interrupts.CODE
                    )
                yield Taken(options, reason, status, recorder.missed, recorder.drained)
        finally:
            probes.close()


def _compacted(taken: Taken) -> Summary:
    from traces.recording.arrow_records import spare_allocations  # not before the probes are attached: it loads Arrow
    from traces.recording.compact import compact

    spare_allocations()
    options = taken.options
    with Progress(f"compacting {taken.drained:,} events into {options.out}"):
        summary = compact(options.directory, options.out)
    shutil.rmtree(options.directory)
    return summary


def record(*several: Options) -> Iterator[RecordingOutcome]:
    """Make recordings as `take` does and compact each into its file; without pyarrow they stay segments."""
    started, cpu = time.monotonic(), time.process_time()
    for taken in take(*several):
        summary = _compacted(taken) if have("pyarrow") else of_segments(taken.options.directory)
        used, passed = time.process_time() - cpu, time.monotonic() - started
        yield RecordingOutcome(summary, taken.stopped, taken.status, used, passed, taken.missed)
        started, cpu = time.monotonic(), time.process_time()
