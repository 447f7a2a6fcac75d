# SPDX-License-Identifier: Apache-2.0
"""This host's vCPUs, second by second: a recorder that stores nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tracer.flight.vcpu_time import Rows, idle_codes, thread_time
from tracer.order import HOLD_NANOSECONDS
from tracer.probing import host
from tracer.probing.bpf import Probes
from tracer.recorder import Recorder, Stop
from tracer.recording_options import Options, check
from tracer.ring import Rings, ring_count
from tracer.top.meter import KINDS, Meters, VcpuSecond
from traces.command_line.progress import Progress

SECOND = 10**9
_RING = 1 << 23  # bytes of each CPU's ring: 95,000 events; the last 50 ms always stay in it
_TICK_SECONDS = 0.1
_CROWDED = 0.5  # share of a ring: with more than that, it is read again at once
_LIVES = frozenset({"vm_create", "vm_destroy"})  # so that an address stands for the VM that has it now
_OPTIONS = Options(Path(), frozenset(KINDS), "list")

Show = Callable[[list[VcpuSecond]], None]


class LiveMeters:
    """Counts rows where they lie in the rings, and shows the lines of each second."""

    def __init__(self, show: Show) -> None:
        self.meters = Meters(idle_codes(host.cpu()), thread_time)
        self.error: Exception | None = None
        self._show, self._next = show, 0

    def write(self, batches: Sequence[Rows], complete_at: int) -> None:
        """Ignore the recorder's own rows, such as that the host slept: they belong to no vCPU."""

    def look(self, rings: Rings) -> int:
        """Count the rows that can be taken in order of time, end a second that is over; return how many rows."""
        parts, complete_at = rings.peek()
        reached = complete_at - HOLD_NANOSECONDS
        taken = self.meters.see_until(parts, reached)
        rings.release(taken)
        if reached > 0 and not self._next:
            self._next = reached + SECOND
            self.meters.second(reached)
        elif reached >= self._next > 0:
            self._show(self.meters.second(reached))
            self._next = reached + SECOND
        return sum(taken)


class TopRecorder(Recorder):
    """A recorder that drains the rings into meters."""

    idle_seconds = _TICK_SECONDS

    def __init__(self, probes: Probes, stop: Stop, show: Show) -> None:
        self._lines = show
        super().__init__(_OPTIONS, probes, _RING, stop)

    def _open(self, manifest: dict[str, Any]) -> LiveMeters:
        self._meters = LiveMeters(self._lines)
        names = manifest["vm_names"]
        for vm in self.snapshot["vms"]:
            if name := names.get(str(vm["tgid"])):
                self._meters.meters.names[vm["kvm"]] = name
        return self._meters

    def _drain_once(self) -> bool:
        self.drained += self._meters.look(self.rings)
        return self.rings.fill > _CROWDED

    def _finish(self) -> None:
        """Do nothing: what is left belongs to a second that nobody sees."""

    def _store(self, changes: Callable[[], dict[str, Any]]) -> None:
        """Do nothing: `top` has no manifest."""

    def _flush(self) -> None:
        """Do nothing: `top` stores no rows."""

    def _full(self) -> str:
        return ""

    def _stored(self) -> str:
        return ""


class LiveTop:
    """Runs the recorder on a thread of its own, while the screen has the main thread."""

    def __init__(self) -> None:
        """Open a recorder of this host's VMs; raises Problem where this machine cannot be recorded."""
        check(_OPTIONS)
        self._stop = Stop()
        self._probes = Probes(_OPTIONS.kinds | _LIVES, ring_count(os.cpu_count() or 1), _RING)
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self, show: Show) -> None:
        """Begin: `show` is called with each second's lines, from a thread."""
        self._probes.reset()
        recorder = TopRecorder(self._probes, self._stop, show)
        self._thread = threading.Thread(target=self._run, args=(recorder,), name="top", daemon=True)
        self._thread.start()

    def lost(self) -> int:
        """Return how many events the rings refused so far, which no line counts."""
        return int(self._probes.counters()["lost"].sum())

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Detach the probes. Raises what ended the recorder before."""
        self._stop.reason = "closed"
        if self._thread is not None:
            self._thread.join()
        self._probes.close()
        if self._error is not None:
            raise self._error

    def _run(self, recorder: TopRecorder) -> None:
        try:
            recorder.run(Progress("watching"))
        except Exception as error:  # `close` raises it
            self._error = error
