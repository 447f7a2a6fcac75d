# SPDX-License-Identifier: Apache-2.0
"""The recorder of a flight: it drains the rings into a window in memory, from which dumps are made."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tracer.flight.governor import LOWEST, GovernorThread, Level, LevelChange, levels
from tracer.flight.keeper import Bounds, FlightThread, Request
from tracer.flight.metrics import FlightMetrics, RecorderFacts, Sample
from tracer.flight.notify import Watchdog, notify
from tracer.flight.state import Checkpoint, Checkpoints
from tracer.flight.trigger_texts import FlightTriggers
from tracer.flight.vcpu_time import idle_codes, thread_time
from tracer.owner_names import OwnerNames
from tracer.probing import host
from tracer.probing.bpf import Probes, kind_mask
from tracer.recorder import Recorder, Stop
from tracer.recording_options import Options
from tracer.upload.uploads import Uploads
from tracer.writer import OrderedThread
from traces.command_line.durations import duration
from traces.command_line.messages import say
from traces.errors import ENVIRONMENT, Problem
from traces.record import RECORD
from traces.recording.identity import LEFT_OUT
from traces.schema import BY_CODE

_TICK_SECONDS = 0.05
_TIDY = 60 * 10**9  # ns between two looks at the probes' tables
_CROWDED = 1 << 14  # threads in the probes' table, above which dead ones are dropped


@dataclass(frozen=True)
class FlightOptions:
    """What to record (`record.out` is the dumps' directory), how much to keep, and what triggers dumps."""

    record: Options
    bounds: Bounds
    triggers: tuple[str, ...] = ()
    group: str = ""
    metrics: str = ""  # the address or file that metrics are published at; empty: none
    upload: str = ""  # the place that dumps are uploaded to; empty: none
    spool: int = 0  # bytes of dumps that may wait for their upload

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels to which recording may fall back within --max-overhead; empty without that bound."""
        return levels(self.record.preset, self.record.kinds) if self.bounds.overhead else ()


class FlightRecorder(Recorder):
    """A recorder that drains the rings into a window in memory."""

    flush_seconds = _TICK_SECONDS
    idle_seconds = _TICK_SECONDS  # in this time 4 million events a second fill half of a ring

    def __init__(
        self, options: FlightOptions, probes: Probes, ring_bytes: int, stop: Stop, uploads: Uploads | None = None
    ) -> None:
        self._uploads = uploads
        self._bounds = options.bounds
        self._triggers = FlightTriggers(options.triggers, options.record.kinds)
        self._looking = threading.Lock()  # a checkpoint and a dump may look at the host at the same time
        self._tidied = 0
        self._levels = options.levels
        self._governor: GovernorThread | None = None
        self._changes: deque[LevelChange] = deque()
        self._facts: RecorderFacts | None = None
        self._watchdog = Watchdog()
        super().__init__(options.record, probes, ring_bytes, stop)
        self.checkpoints = Checkpoints(self._checkpoint, self.flight.offer)
        self.flight.want_checkpoint = self.checkpoints.want
        self.flight.levels = tuple(level.name for level in self._levels)
        if options.metrics:
            self.flight.metrics = FlightMetrics(idle_codes(host.cpu()), options.record.kinds, thread_time)
            self.flight.each_second = self._look_at_itself

    def _open(self, manifest: dict[str, Any]) -> OrderedThread:
        first = self._state(host.clock_sample()["boot"], self.snapshot["vms"])
        progress = self._whole_progress
        self.flight = FlightThread(
            self.options.out, self._bounds, first, manifest, progress, self._triggers, self._uploads
        )
        return self.flight

    def _meet_latecomers(self) -> None:
        super()._meet_latecomers()
        notify(f"READY=1\nSTATUS=Recording {self.options.preset}, dumps in {self.options.out}")
        say(
            f"recording: `kvmtrace dump {self.options.out}` writes the last "
            f"{duration(self._bounds.nanoseconds)}, or what of them fits into {self._bounds.memory >> 20} MiB"
        )
        if not self._levels:
            return
        try:  # begun only now, because attaching takes CPU time, too
            self._governor = GovernorThread(
                self.probes, self._levels, self._bounds.overhead, self._own_cpu, self._changed
            )
        except OSError as error:
            why = f"--max-overhead: this kernel does not measure BPF programs (5.8+): {error.strerror}"
            raise Problem(why, ENVIRONMENT) from None

    @property
    def level_seconds(self) -> dict[str, float]:
        """How many seconds each level was recorded for; empty without --max-overhead."""
        return self._governor.seconds if self._governor else {}

    def samples(self) -> Iterator[Sample]:
        """Yield the samples of all metrics; any thread may call it."""
        if self._facts is not None and self.flight.metrics is not None:
            yield from self.flight.metrics.samples()
            yield from self._facts.samples()

    def _look_at_itself(self) -> None:
        """Take the recorder's own figures, once a second, on the thread that handles the rows."""
        window, lost = self.flight.window, self.probes.counters()["lost"].sum(axis=0)
        events, governor = window.pushed().sum(axis=0), self._governor
        self._facts = RecorderFacts(
            events={BY_CODE[code].name: int(events[code]) for code in np.flatnonzero(events).tolist()},
            lost={BY_CODE[code].name: int(lost[code]) for code in np.flatnonzero(events).tolist()},
            dumps=dict(self.flight.dumped),
            refused=dict(self.flight.refused),
            failed=self.flight.dumps.failed,
            window_bytes=window.held,
            window_seconds=max(0, host.clock_sample()["boot"] - window.begins) / 1e9,
            cpu_seconds=time.process_time(),
            overhead=governor.share if governor is not None else None,
            level=governor.level.name if governor is not None else "",
            levels=self.flight.levels,
            uploads=self._uploads.counts if self._uploads is not None else None,
        )

    def _own_cpu(self) -> float:
        return time.process_time() - self.flight.dumps.cpu_seconds()

    def _changed(self, change: LevelChange) -> None:
        """Queue a change of level for the drain, and print it; called on the governor's thread."""
        self._changes.append(change)
        if not change.left_out:
            say("everything is recorded again")
            return
        blind = self._triggers.needing(change.left_out)
        what = (
            "KVM's own counters and which VMs there are"
            if change.name == LOWEST
            else f"what --events {change.name} has"
        )
        say(
            f"recording used {change.share:.1%} of this host's CPUs, --max-overhead allows "
            f"{self._bounds.overhead:.2%}: now at the level {change.name}; until it costs less only {what} is recorded"
            + (f"; not watched: {', '.join(blind)}" if blind else "")
        )

    def _drain_once(self) -> bool:
        if time.monotonic() - self.flight.passed < self._watchdog.seconds / 2:  # the flight's thread is alive, too
            self._watchdog.beat()
        while self._changes:
            change, record = self._changes.popleft(), np.zeros(1, RECORD)
            record["time"], record["kind"], record["vcpu"] = host.clock_sample()["boot"], LEFT_OUT, -1
            record["w0"], record["w1"], record["w2"] = change.since, kind_mask(change.left_out), change.level
            self.writer.write([record], self.rings.complete_at)
        return super()._drain_once()

    def _checkpoint(self) -> Checkpoint:
        with self._looking:
            began = host.clock_sample()["boot"]
            if began - self._tidied > _TIDY:
                self._tidied = began
                self.probes.forget_dead(_CROWDED)
            self.snapshot = self._look()
            self.owners = OwnerNames()  # anew: a process's number may be another's by now
            return self._state(began, self.snapshot["vms"])

    def _state(self, began: int, vms: list[dict[str, Any]]) -> Checkpoint:
        names = self.owners.of({vm["tgid"] for vm in vms})
        stats, missed, counters = self.counted.look(), self.probes.missed(), self.probes.counters()
        clock = host.clock_sample()
        return Checkpoint(began, clock["boot"], vms, counters, clock, stats, missed, names)

    def _whole_progress(self) -> dict[str, Any]:
        with self._looking:
            return {**self._progress(), "counters": self.probes.counters()}

    def _store(self, changes: Callable[[], dict[str, Any]]) -> None:
        self.flight.update(changes)

    def _flush(self) -> None:
        self.flight.write([], self.rings.complete_at)  # advances the stream even if there are no events
        self.flight.tick()

    def _full(self) -> str:
        if self._governor is not None and self._governor.error:
            return f"what it costs could not be measured: {self._governor.error}"
        return f"the state could not be taken: {self.checkpoints.error}" if self.checkpoints.error else ""

    def _close(self) -> None:
        if self._governor is not None:
            self._governor.close()
        self.checkpoints.close()
        self.flight.close()

    def _stored(self) -> str:
        window, dumps = self.flight.window, self.flight.dumps
        seconds = max(0, host.clock_sample()["boot"] - window.begins) / 1e9
        return f"the last {seconds:.0f} s in {window.held / 1e6:,.0f} MB, {len(dumps.made)} dumps"

    def ask(self, trigger: str, text: str) -> Future[Path]:
        """Ask for a dump and return a future of its path."""
        request = Request(trigger, text)
        self.flight.ask(request)
        return request.answer
