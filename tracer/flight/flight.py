# SPDX-License-Identifier: Apache-2.0
"""One flight: a recorder that keeps the last seconds, until a signal or the end of its command ends it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tracer.flight.control import Control
from tracer.flight.dumps import TRACE
from tracer.flight.flight_recorder import FlightOptions, FlightRecorder
from tracer.flight.keeper import FlightThread
from tracer.flight.notify import Watchdog, notify
from tracer.flight.quotas import AUTOMATIC, MANUAL, Account, Made
from tracer.flight.trigger_texts import FlightTriggers
from tracer.probing.bpf import Probes
from tracer.recorder import Stop
from tracer.recording_options import check
from tracer.ring import default_ring_bytes, ring_count
from tracer.upload.uploads import UploadOutcome, Uploads
from traces.command_line import interrupts
from traces.command_line.messages import say
from traces.command_line.progress import Progress
from traces.errors import ENVIRONMENT, Problem

_TICK_SECONDS = 0.05
_MOST_EARLIER = 1000  # dumps of earlier runs that are taken into account


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
