# SPDX-License-Identifier: Apache-2.0
"""Dumps on their way to the disk: first as segments, then as a trace, one at a time, while recording continues."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tracer.flight.window import Epoch, FlightWindow
from tracer.upload.uploads import Uploads
from traces.command_line.messages import say
from traces.errors import ENVIRONMENT, Problem
from traces.recording.segment_writer import SegmentWriter

SEGMENTS: Final = ".kvmt"
TRACE: Final = ".parquet"
_OLD: Final = 600  # seconds after which a temporary file is taken for abandoned


@dataclass
class Dump:
    """A dump that is to become the trace `name`; `done` receives its path, or the Problem."""

    name: str
    epochs: list[Epoch]
    manifest: Mapping[str, Any]
    automatic: bool
    done: Future[Path] = field(default_factory=Future)


class Dumps:
    """Writes dumps into a directory, and makes traces of what an earlier recorder left in it."""

    def __init__(
        self, directory: Path, window: FlightWindow, most: int, kept: Callable[[], set[Path]],
        uploads: Uploads | None = None,
    ) -> None:  # fmt: skip
        """Start the thread that writes.

        While all dumps together have more than `most` bytes, the oldest automatic ones are deleted, except those
        `kept`. `uploads` takes every trace that is made.
        """
        self.directory, self._window, self._most, self._kept = directory, window, most, kept
        self._uploads = uploads
        self.made: list[Path] = []
        self.failed = 0
        self._automatic: list[Path] = []
        self._named: set[str] = set()  # names given out, some to dumps that have no file yet
        self._queue: queue.SimpleQueue[Dump | Path | None] = queue.SimpleQueue()
        self._child: subprocess.Popen[str] | None = None
        self._hard = False
        for left in directory.glob(".kvmtrace-*.tmp"):  # left by a compaction that was killed
            if left.stat().st_mtime < time.time() - _OLD:
                left.unlink(missing_ok=True)
        for left in sorted(directory.glob(f"*{SEGMENTS}")):
            self._queue.put(left)
        self._thread = threading.Thread(target=self._run, name="dumps", daemon=True)
        self._thread.start()

    def know(self, automatic: list[Path]) -> None:
        """Take over automatic dumps of earlier runs, the oldest first."""
        self._automatic += automatic

    def cpu_seconds(self) -> float:
        """Return the CPU time (s) that writing dumps took so far, without the processes that compact them."""
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident or 0)) if self._thread.is_alive() else 0

    def add(self, dump: Dump) -> None:
        self._queue.put(dump)

    def name(self, wanted: str) -> str:
        """Return a name that no file and no waiting dump has yet."""
        names = (wanted, *(f"{wanted}-{number}" for number in range(2, 1 << 20)))
        found = next(
            name
            for name in names
            if name not in self._named
            and not any((self.directory / f"{name}{end}").exists() for end in (SEGMENTS, TRACE))
        )
        self._named.add(found)
        return found

    def close(self) -> None:
        """Wait until every dump is a trace."""
        self._queue.put(None)
        self._thread.join()

    def abandon(self) -> None:
        """End as soon as memory is on disk; making traces of it is left to the next run, or to `recover`."""
        self._hard = True
        if (child := self._child) is not None:
            child.terminate()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            if isinstance(work, Path):
                self._take_over(work)
                continue
            try:
                path = self._made(self._write(work))
            except Problem as problem:
                say(str(problem))
                self.failed += 1
                work.done.set_exception(problem)
                continue
            self.made.append(path)
            if work.automatic:
                self._automatic.append(path)
            work.done.set_result(path)
            self._make_room()

    def _take_over(self, left: Path) -> None:
        """Make a trace of the segments that an earlier recorder left, and print a line about it."""
        try:
            said = f"made a trace of it: {self._made(left).name}"
        except Problem as problem:
            said = f"no trace of it: {problem}"
        if not self._hard:
            say(f"{left.name}: left by a recorder that was ended: {said}")

    def _write(self, dump: Dump) -> Path:
        directory = self.directory / f"{dump.name}{SEGMENTS}"
        if self._uploads is not None:
            self._uploads.announce(directory.with_suffix(TRACE))
        pieces = [piece for epoch in dump.epochs for piece in epoch.pieces]
        dump.epochs.clear()
        pieces.reverse()
        try:
            writer = SegmentWriter(directory, dump.manifest)
            while pieces:
                writer.write_encoded(pieces[-1].message, pieces[-1].rows)
                self._window.give_back(pieces.pop())
            writer.close({})
        except Problem as problem:
            shutil.rmtree(directory, ignore_errors=True)  # its rows are still in the window, for another try
            reason = problem.__cause__.strerror if isinstance(problem.__cause__, OSError) else problem
            raise Problem(f"{directory.with_suffix(TRACE)}: no dump: {reason}: make room", ENVIRONMENT) from None
        finally:
            for piece in pieces:
                self._window.give_back(piece)
        return directory

    def _compact(self, directory: Path) -> Path:
        out = directory.with_suffix(TRACE)
        if self._hard:
            raise Problem(f"stopped before compaction: run `kvmtrace recover {directory}`", ENVIRONMENT)
        command = [sys.executable, "-m", "tracer.flight.compaction", str(os.getpid()), str(directory), str(out)]
        # In a session of its own: ^C on the terminal is for the recorder, which waits for its dumps.
        self._child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        said = self._child.communicate()[1].strip()
        code, self._child = self._child.returncode, None
        if code:
            raise Problem(
                (said.splitlines() or [f"compaction ended with {code}: run `kvmtrace recover {directory}`"])[-1],
                ENVIRONMENT,
            )
        shutil.rmtree(directory, ignore_errors=True)
        return out

    def _made(self, directory: Path) -> Path:
        """Make a trace of a directory's segments, have it uploaded where that is wanted, and return its path."""
        path = self._compact(directory)
        if self._uploads is not None:
            self._uploads.add(path)
        return path

    def _make_room(self) -> None:
        sizes = {path: path.stat().st_size for path in self.directory.glob(f"*{TRACE}")}
        kept = self._kept()
        for path in [path for path in self._automatic if path not in kept]:
            if sum(sizes.values()) <= self._most:
                return
            path.unlink(missing_ok=True)
            sizes.pop(path, None)
            self._automatic.remove(path)
