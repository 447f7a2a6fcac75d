# SPDX-License-Identifier: Apache-2.0
"""The core of the flight recorder: rows enter the window in order of time, and leave it when a dump is requested.

All of it happens on the thread that orders the rows. A checkpoint becomes an epoch of the window once the stream has
reached the moment at which it was complete; a dump is cut once the stream has reached the dump's end.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tracer.flight.alarms import Alarm
from tracer.flight.dumps import Dump, Dumps
from tracer.flight.metrics import FlightMetrics
from tracer.flight.quotas import AUTOMATIC, MANUAL, Account, Made
from tracer.flight.state import TRIES, Checkpoint, telling
from tracer.flight.trigger_texts import FlightTriggers
from tracer.flight.window import Epoch, FlightWindow, stored
from tracer.probing.bpf import loss_table
from tracer.probing.program import COUNTERS, KIND_SLOTS
from tracer.recorder import open_gaps
from tracer.upload.uploads import Uploads
from tracer.writer import OrderedThread
from traces.command_line.messages import say
from traces.errors import ENVIRONMENT, Problem
from traces.record import RECORD
from traces.recording.identity import LEFT_OUT
from traces.schema import KINDS

SECOND = 10**9
EPOCHS = 8  # epochs of a window, at least
_MOST_TEXTS = 100  # texts, in a dump's metadata, of requests that share the dump
QUEUE_BYTES = 64 << 20  # bytes of rows on their way into the window

Rows = np.ndarray[Any, Any]


@dataclass
class Request:
    """A request for a dump by a person or a trigger: why, and how severe it is (comparable within a trigger only)."""

    trigger: str
    text: str = ""
    manual: bool = True
    severity: float = 0.0
    at: int = field(default_factory=lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    answer: Future[Path] = field(default_factory=Future)

    def document(self) -> dict[str, Any]:
        return {"trigger": self.trigger, "text": self.text, "manual": self.manual, "severity": self.severity,
                "time": self.at}  # fmt: skip


@dataclass
class _Pending:
    """A dump that waits for its last rows; later requests of the same trigger share it."""

    until: int  # boot ns
    requests: list[Request]
    granted: Made
    instead: Made | None
    refused: dict[str, Any]


@dataclass(frozen=True)
class Bounds:
    """How much is kept: `nanoseconds` back from a dump's moment and `after` it, in `memory` and `disk` bytes."""

    nanoseconds: int
    after: int
    memory: int
    disk: int
    overhead: float = 0  # the share of the host's CPUs that recording may use, 0 to 1; 0: no bound


class FlightThread(OrderedThread):
    """Keeps the window of the last seconds, and cuts dumps out of it."""

    def __init__(
        self, directory: Path, bounds: Bounds, first: Checkpoint, manifest: dict[str, Any],
        progress: Callable[[], dict[str, Any]],
        triggers: FlightTriggers, uploads: Uploads | None = None,
    ) -> None:  # fmt: skip
        """`first` is the state before the first row; `progress` returns what changes in the `manifest`.

        Alarms of `triggers` request dumps as users do.
        """
        self.bounds, self._manifest, self._progress, self._triggers = bounds, manifest, progress, triggers
        self._cpus = len(first.counters)
        nothing = np.zeros((self._cpus, KIND_SLOTS), np.int64)
        epoch = Epoch(first.ended, first.vms, first, lost=nothing, missing=nothing)
        self.window = FlightWindow(epoch, self._cpus, bounds.nanoseconds, bounds.memory)
        self.accounts: dict[str, Account] = {}
        self.dumps = Dumps(directory, self.window, bounds.disk, self._kept, uploads)
        self.levels: tuple[str, ...] = ()  # names of the levels that recording may fall back to
        self.want_checkpoint: Callable[[], None] = lambda: None
        self.metrics: FlightMetrics | None = None
        self.each_second: Callable[[], None] = lambda: None  # called on this thread, where there are metrics
        self.dumped: Counter[str] = Counter()  # by trigger
        self.refused: Counter[str] = Counter()
        self.passed = time.monotonic()  # when the thread last made progress
        self._telling: list[Rows] = []  # rows that changed the VMs' state since a checkpoint was wanted
        self._offered: Checkpoint | None = None
        self._wanted = False
        self._tries = 0
        self._asking, self._over = threading.Lock(), False
        self._asked: deque[Request] = deque()
        self._pending: list[_Pending] = []
        self._pushed_until = first.ended
        self._left_out: list[Rows] = []  # `left_out` rows of the window, and the last one before it
        super().__init__("flight", QUEUE_BYTES)

    # From other threads

    def ask(self, request: Request) -> None:
        """Ask for a dump; the request's answer becomes the trace's path, or a Problem."""
        with self._asking:
            if self._over:
                request.answer.set_exception(Problem("no dump: the recorder is ending", ENVIRONMENT))
            else:
                self._asked.append(request)

    def offer(self, checkpoint: Checkpoint) -> None:
        """Hand over the checkpoint that was wanted."""
        self._then(partial(self._take_offer, checkpoint))

    def update(self, changes: Callable[[], dict[str, Any]]) -> None:
        """Queue changes of the manifest, for dumps to come."""
        self._then(lambda: self._manifest.update(changes()))

    def tick(self) -> None:
        """Advance although there are no rows."""
        self._then(lambda: self._pass(np.empty(0, RECORD)))

    def close(self) -> None:
        """End: requested dumps are cut now. Raises what the thread failed with."""
        with self._asking:
            self._over = True
        self._end()
        self._receive()
        for pending in self._pending:
            self._cut(pending)
        self._pending = []

    # On the thread

    def _take_offer(self, checkpoint: Checkpoint) -> None:
        self._offered = checkpoint

    def _store(self, parts: Sequence[Rows]) -> None:
        records = np.concatenate(parts)  # a moment at which something is due may be between any two rows
        if self._wanted and len(found := telling(records)):
            self._telling.append(found)
        self._pass(records)

    def _pass(self, records: Rows) -> None:
        """Take rows, and do what is due at the moments that the stream reaches with them."""
        self.passed = time.monotonic()
        self._receive()
        reached = self._order.given_until
        for at, work in sorted(self._due(reached), key=lambda each: each[0]):
            split = int(np.searchsorted(records["time"], np.uint64(at), side="right"))
            self._push(records[:split])
            records = records[split:]
            self._pushed_until = max(self._pushed_until, at)
            self.window.trim(self._pushed_until)
            work()
        self._push(records)
        self._hear(self._triggers.now(reached))
        if self.metrics is not None and self.metrics.now(reached):
            self.metrics.names = self.window.last.checkpoint.names
            self.each_second()
        self._receive()
        self._want_checkpoint()
        self.window.trim(max(self._order.given_until, self._pushed_until))

    def _push(self, records: Rows) -> None:
        if len(records):
            self._pushed_until = max(self._pushed_until, int(records["time"][-1]))
            self.window.push(records)
            at = 0
            for change in np.flatnonzero(records["kind"] == LEFT_OUT).tolist():
                self._see(records[at:change])
                self._left_out.append(records[change : change + 1].copy())
                kinds = _kinds_of(self._left_out[-1])
                self._triggers.leave_out(kinds)
                if self.metrics is not None:
                    self.metrics.leave_out(kinds)
                self._left_out_of(self.window.begins)  # drops the older rows of `_left_out`
                at = change
            self._see(records[at:])

    def _see(self, records: Rows) -> None:
        self._hear(self._triggers.see(records))
        if self.metrics is not None:
            self.metrics.see(records)

    def _hear(self, alarms: list[Alarm]) -> None:
        for alarm in alarms:
            at, severity = self._pushed_until, alarm.severity
            self._asked.append(Request(alarm.trigger, alarm.text, manual=False, severity=severity, at=at))

    def _due(self, reached: int) -> list[tuple[int, Callable[[], None]]]:
        due: list[tuple[int, Callable[[], None]]] = []
        if self._offered is not None and self._offered.ended <= reached:
            due.append((self._offered.ended, self._begin_epoch))
        for pending in [each for each in self._pending if each.until <= reached]:
            self._pending.remove(pending)
            due.append((pending.until, partial(self._cut, pending)))
        return due

    def _want_checkpoint(self) -> None:
        epoch = self.window.last
        old = self._order.given_until - epoch.began >= self.bounds.nanoseconds // EPOCHS
        if not self._wanted and (old or self._tries or epoch.size >= self.bounds.memory // EPOCHS):
            self._wanted = True
            self._telling = []  # rows younger than this are still to come, as rows are held back for a while
            self.want_checkpoint()

    def _begin_epoch(self) -> None:
        checkpoint, self._offered, self._wanted = self._offered, None, False
        assert checkpoint is not None
        rows = np.concatenate([np.empty(0, RECORD), *self._telling])
        rows = rows[rows["time"] <= np.uint64(self._pushed_until)]
        unsettled = checkpoint.unsettled(rows)
        if unsettled and self._tries < TRIES:
            self._tries += 1
            return
        self._tries = 0
        before = self.window.last
        # Where events are lost and no row has reported them yet, the next row covers the time before as well.
        told = checkpoint.counters["gap_count"] == 0
        lost = np.where(told[:, None], checkpoint.counters["lost"].astype(np.int64), before.lost)
        self.window.begin(
            Epoch(self._pushed_until, checkpoint.state(rows), checkpoint, lost, before.missing, unsettled)
        )
        self.window.last.missing = np.maximum(before.missing, self._missing(checkpoint.counters))

    def _missing(self, counters: Rows) -> Rows:
        """Return how many events the probes had put into a ring that are not among the rows pushed: 0, always."""
        put = counters["emitted"].astype(np.int64) - counters["lost"].astype(np.int64)
        return put - self.window.pushed()

    def _receive(self) -> None:
        while self._asked:
            request = self._asked.popleft()
            until = max(request.at + self.bounds.after, self._pushed_until)
            for pending in self._pending:
                if pending.requests[0].trigger == request.trigger:
                    pending.requests.append(request)
                    break
            else:
                self._grant(request, until)

    def _grant(self, request: Request, until: int) -> None:
        account = self.accounts.setdefault(request.trigger, Account(MANUAL if request.manual else AUTOMATIC))
        granted, instead = account.ask(time.clock_gettime(time.CLOCK_BOOTTIME), request.severity)
        if granted is None:
            quota = account.quota
            self.refused[request.trigger] += 1
            if account.refused.count == 1:  # of those that are counted until the next dump
                say(f"{request.trigger}: no dump, for it has made its {quota.hour} an hour or {quota.day} a day: the "
                     f"next ones are only counted ({request.text or 'no reason given'})")  # fmt: skip
            request.answer.set_exception(Problem(
                f"no dump: {request.trigger} has made all that it may: {quota.hour} an hour, {quota.day} a day",
                ENVIRONMENT,
            ))  # fmt: skip
            return
        refused = {name: each.told().document() for name, each in self.accounts.items() if each.refused.count}
        self._pending.append(_Pending(until, [request], granted, instead, refused))

    def _cut(self, pending: _Pending) -> None:
        request = pending.requests[0]
        progress = self._progress()
        counters = progress.pop("counters")
        before, always = self._left_out_of(self.window.begins)
        epochs = self.window.cut(before, open_gaps(counters))
        first = epochs[0]
        manifest = self._manifest | progress
        manifest |= {
            "probes": [_not_in(probe, always) for probe in manifest.get("probes", ())],
            "snapshot": {"vms": first.vms},
            "clock": {"name": "boottime", "samples": [first.checkpoint.clock, *manifest["clock"]["samples"][-1:]]},
            "stats": {"start": first.checkpoint.stats["end"], "end": manifest["stats"]["end"]},
            "missed": _rises(first.checkpoint.missed, manifest["missed"]),
            "vm_names": _merged(*(epoch.checkpoint.names for epoch in epochs), manifest["vm_names"]),
            "loss": loss_table(self._books(epochs, counters), {}),
            "flight": {
                **request.document(),
                "also": dict(Counter(each.text for each in pending.requests[1:]).most_common(_MOST_TEXTS)),
                "triggers": list(self._triggers.expressions),
                "seconds": self.bounds.nanoseconds / SECOND,
                "after_seconds": self.bounds.after / SECOND,
                "memory": self.bounds.memory,
                "state_at": first.began,
                "state_settled": not first.unsettled,
                "begins": max(first.began, first.dropped_until),
                "ends": self._pushed_until,
                "refused": pending.refused,
                **({"levels": list(self.levels), "max_overhead": self.bounds.overhead} if self.bounds.overhead else {}),
            },
        }
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        dump = Dump(self.dumps.name(f"{stamp}-{request.trigger}"), epochs, manifest, automatic=not request.manual)
        dump.done.add_done_callback(partial(self._made, pending))
        self.dumps.add(dump)

    def _left_out_of(self, begins: int) -> tuple[Rows, frozenset[str]]:
        """Return a row on what is left out as the window begins (empty: nothing), and what is left out all the time."""
        known = self._left_out
        while len(known) > 1 and known[1]["time"][0] <= begins:
            known.pop(0)
        before = known[0].copy() if known and known[0]["time"][0] <= begins else np.empty(0, RECORD)
        if not len(before):
            return before, frozenset()
        before["time"] = begins
        always = frozenset.intersection(*map(_kinds_of, known))
        return before if before["w1"][0] else before[:0], always

    def _books(self, epochs: list[Epoch], counters: Rows) -> Rows:
        """Return the window's counts in the form of the probes' counters: stored, lost since, and missing."""
        first, last = epochs[0], epochs[-1]
        counts = [piece.counts for epoch in epochs for piece in epoch.pieces]
        lost = counters["lost"].astype(np.int64) - first.lost
        made = np.zeros(self._cpus, COUNTERS)
        made["lost"] = lost
        made["emitted"] = lost + stored(counts, self._cpus) + last.missing - first.missing
        return made

    def _made(self, pending: _Pending, done: Future[Path]) -> None:
        """Answer the requests of a dump that was written or failed; called on the dumps' thread."""
        error = done.exception()
        first = pending.requests[0]
        if error is None:  # for the journal: a trigger's dump has no other reader
            say(f"{done.result()}: dumped: {first.trigger}" + (f": {first.text}" if first.text else ""))
        pending.granted.failed = error is not None and first.manual
        for request in pending.requests:
            if error is None:
                request.answer.set_result(done.result())
            else:
                request.answer.set_exception(error)
        if error is None:
            self.dumped[first.trigger] += 1
            pending.granted.path = done.result()
            if pending.instead is not None and pending.instead.path is not None:
                pending.instead.path.unlink(missing_ok=True)

    def _kept(self) -> set[Path]:
        return {path for account in list(self.accounts.values()) for path in account.keeps()}


def _kinds_of(left_out: Rows) -> frozenset[str]:
    """Return the kinds of event that a `left_out` row says are not recorded from then on."""
    mask = int(left_out["w1"][0])
    return frozenset(kind.name for kind in KINDS if mask >> kind.code & 1)


def _not_in(probe: dict[str, str], left_out: frozenset[str]) -> dict[str, str]:
    """Return a probe's entry in the metadata of a dump that has none of the kinds `left_out`."""
    if probe["kind"] not in left_out or probe["how"] == "none":
        return probe
    return {**probe, "how": "none", "why": "left out all the time, so that recording cost less"}


def _merged(*several: dict[str, str]) -> dict[str, str]:
    return {key: value for each in several for key, value in each.items()}


def _rises(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    return {name: more for name, count in now.items() if (more := count - before.get(name, 0))}
