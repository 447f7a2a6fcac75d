# SPDX-License-Identifier: Apache-2.0
"""One flight: a recorder that keeps the last seconds, until a signal or the end of its command ends it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tracer import host
from tracer.bpf import Probes, kind_mask
from tracer.flight.control import Control
from tracer.flight.dumps import TRACE
from tracer.flight.governor import LOWEST, GovernorThread, Level, LevelChange, levels
from tracer.flight.keeper import Bounds, FlightThread, Request
from tracer.flight.metrics import FlightMetrics, RecorderFacts, Sample
from tracer.flight.notify import Watchdog, notify
from tracer.flight.quotas import AUTOMATIC, MANUAL, Account, Made
from tracer.flight.state import Checkpoint, Checkpoints
from tracer.flight.trigger_texts import FlightTriggers
from tracer.flight.vcpu_time import idle_codes, thread_time
from tracer.owner_names import OwnerNames
from tracer.recorder import Recorder, Stop
from tracer.recording_options import Options, check
from tracer.ring import default_ring_bytes, ring_count
from tracer.upload.uploads import UploadOutcome, Uploads
from tracer.writer import OrderedThread
from traces import interrupts
from traces.durations import duration
from traces.errors import ENVIRONMENT, Problem
from traces.identity import LEFT_OUT
from traces.messages import say
from traces.progress import Progress
from traces.record import RECORD
from traces.schema import BY_CODE

_TICK_SECONDS = 0.05
_TIDY = 60 * 10**9  # ns between two looks at the probes' tables
_CROWDED = 1 << 14  # threads in the probes' table, above which dead ones are dropped
_MOST_EARLIER = 1000  # dumps of earlier runs that are taken into account


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


@dataclass(frozen=True)
class FlightOutcome:
    """How a flight ended: its dumps, events that it saw, lost and missed, and what it cost."""

    dumps: tuple[Path, ...]
    refused: dict[str, dict[str, float]]
    events: int
    lost: int
    missing: int  # events that the probes put into a ring and that were not read from it
    stopped: str
    status: int | None
    cpu_seconds: float
    seconds: float
    level_seconds: dict[str, float]  # by level, with --max-overhead
    upload: UploadOutcome | None = None  # None where dumps are not uploaded


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


def _check(options: FlightOptions) -> None:
    check(options.record)
    directory = options.record.out
    if directory.exists() and not directory.is_dir():
        raise Problem(f"{directory}: not a directory: a flight recorder writes its dumps into one")
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise Problem(f"{directory}: cannot create it: {error.strerror}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise Problem(f"{directory}: cannot be written: no permission to make a file in it")


def fly(options: FlightOptions) -> FlightOutcome:
    """Record until something ends it. Raises Problem; dumps that are not finished are then left to the next flight."""
    FlightTriggers(options.triggers, options.record.kinds)  # before anything is loaded
    _check(options)
    if options.metrics:
        from tracer.flight import exporter

        exporter.place(options.metrics)
    started, cpu = time.monotonic(), time.process_time()
    stop, cpus, record = Stop(), os.cpu_count() or 1, options.record
    ring_bytes = record.ring_bytes or default_ring_bytes(cpus)
    flights: list[FlightRecorder] = []
    ready = threading.Event()

    def dump(reason: str) -> Future[Path]:
        ready.wait()
        if not flights:
            raise Problem(f"{record.out}: its recorder did not start", ENVIRONMENT)
        return flights[0].ask("manual", reason)

    uploads = _uploads(options)
    upload: UploadOutcome | None = None
    control = Control(record.out, options.group, dump)
    try:
        with stop.listening():
            probes = Probes(record.kinds, ring_count(cpus), ring_bytes, record.vm)
            try:
                probes.reset()
                flight = FlightRecorder(options, probes, ring_bytes, stop, uploads)
                _remember(flight.flight, record.out)
                flights.append(flight)
                ready.set()
                with _exporting(options.metrics, flight), _asked_by_signal(flight), Progress("recording") as progress:
                    stopped, status = flight.run(progress)
                notify("STOPPING=1")
                counters = probes.counters()
            finally:
                probes.close()
            dumps = flight.flight.dumps
            with Progress("making traces of the last dumps"):
                _wait_for(dumps.close, dumps.abandon, stop)
                if stop.hard:
                    raise Problem(
                        "stopped before the last dumps were traces: the next flight makes them", interrupts.CODE
                    )
            if uploads is not None:
                with Progress("uploading the last dumps"):
                    ended: list[UploadOutcome] = []
                    _wait_for(lambda: ended.append(uploads.close()), uploads.abandon, stop)
                    (upload,) = ended
    finally:
        ready.set()
        control.close()
        if uploads is not None:
            uploads.abandon()
    put = counters["emitted"].astype(np.int64) - counters["lost"].astype(np.int64)
    return FlightOutcome(
        dumps=tuple(dumps.made),
        refused={name: each.refused.document() for name, each in flight.flight.accounts.items() if each.refused.count},
        events=int(flight.flight.window.pushed().sum()),
        lost=int(counters["lost"].sum()),
        missing=int((put - flight.flight.window.pushed()).sum()),
        stopped=stopped,
        status=status,
        cpu_seconds=time.process_time() - cpu,
        seconds=time.monotonic() - started,
        level_seconds=flight.level_seconds,
        upload=upload,
    )


def _uploads(options: FlightOptions) -> Uploads | None:
    if not options.upload:
        return None
    directory = options.record.out
    return Uploads(options.upload, directory / "upload", directory, options.spool, say)


def _wait_for(close: Callable[[], None], abandon: Callable[[], None], stop: Stop) -> None:
    """Wait until `close` returns; at a second signal `abandon` leaves the rest to the next run."""
    closing = threading.Thread(target=close)
    closing.start()
    watchdog = Watchdog()
    while closing.is_alive():
        watchdog.beat()
        closing.join(_TICK_SECONDS)
        if stop.hard:
            abandon()
            closing.join()


@contextlib.contextmanager
def _exporting(to: str, flight: FlightRecorder) -> Iterator[None]:
    if not to:
        yield
        return
    from tracer.flight import exporter

    exported = exporter.Exporter(exporter.place(to), flight.samples)
    try:
        yield
    finally:
        exported.close()


@contextlib.contextmanager
def _asked_by_signal(flight: FlightRecorder) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR2, lambda *_: _ignore(flight.ask("signal", "SIGUSR2")))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, before)


def _remember(flight: FlightThread, directory: Path) -> None:
    """Count dumps of earlier flights, so that quotas do not start again and old dumps may be deleted."""
    paths = sorted(directory.glob(f"*{TRACE}"), key=lambda path: path.stat().st_mtime)[-_MOST_EARLIER:]
    if not paths:
        return
    automatic = []
    boot, wall = time.clock_gettime(time.CLOCK_BOOTTIME), time.time()
    for path in paths:
        facts = _flight_facts(path)
        if facts is None:
            continue
        name, manual, severity = facts
        account = flight.accounts.setdefault(name, Account(MANUAL if manual else AUTOMATIC))
        account.made.append(Made(boot - (wall - path.stat().st_mtime), severity, path, first=not account.made))
        if not manual:
            automatic.append(path)
    flight.dumps.know(automatic)


def _flight_facts(path: Path) -> tuple[str, bool, float] | None:
    """Return (trigger, whether asked for by hand, severity) of a dump; None of another file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from traces.metadata import KEY

    with contextlib.suppress(pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError):
        facts = json.loads((pq.read_metadata(path).metadata or {})[KEY])["flight"]
        return str(facts["trigger"]), bool(facts["manual"]), float(facts["severity"])
    return None


def _ignore(_answer: object) -> None:
    """Do nothing with the answer: the dump appears, or a printed line says why not."""
