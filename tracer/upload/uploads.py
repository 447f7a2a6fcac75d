# SPDX-License-Identifier: Apache-2.0
"""Uploads while a recorder runs: fills the spool, keeps the uploading process alive, collects its outcome."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from tracer.upload.upload_spool import UploadSpool, Waiting
from traces.errors import Problem
from traces.stores.location import location
from traces.text import count, printable

PATIENCE: Final = 60.0  # seconds that the end of a recorder waits for a store
_RESTARTS: Final = (1.0, 60.0)  # seconds before a process that ended is begun again: the first time, and at most


@dataclass(frozen=True)
class UploadOutcome:
    """The outcome of all uploads.

    `waits` and `waiting_bytes` are what the next start will try; `why` is the last failure.
    """

    place: str
    uploaded: tuple[str, ...]  # keys
    waits: int
    waiting_bytes: int
    dropped: int
    odd: int
    why: str

    @property
    def text(self) -> str:
        """The outcome in words."""
        said = [f"{count(len(self.uploaded), 'recording')} uploaded to {self.place}"]
        if self.waits:
            said.append(f"waiting for the next start {self.waits:,} ({self.waiting_bytes:,} bytes)")
        said.append(f"{self.dropped:,} dropped")
        if self.odd:
            said.append(f"{self.odd:,} that no store takes")
        return ", ".join(said) + (f": {self.why}" if self.waits and self.why else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome for JSON."""
        return {
            "place": self.place, "uploaded": list(self.uploaded), "waits": self.waits,
            "waiting_bytes": self.waiting_bytes, "dropped": self.dropped, "odd": self.odd, "why": self.why,
        }  # fmt: skip


@dataclass
class _Told:
    """What the upload process has reported so far."""

    uploaded: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    odd: set[str] = field(default_factory=set)
    why: str = ""


class Uploads:
    """Uploads recordings to a place, from a spool in a directory, until it is closed."""

    def __init__(
        self, place: str, spool: Path, recordings: Path, most: int, say: Callable[[str], None] = lambda _: None
    ) -> None:
        """`recordings` is the directory that recordings are made in, `most` the bytes that may wait.

        `say` is called with lines to print. Raises Problem for what is no place, or where the spool cannot be made.
        """
        target = location(place)
        if target.folder is not None and not target.folder.is_dir():
            raise Problem(f"--upload {printable(place)}: no such folder")
        self.place, self._say = target.text, say
        self._spool = UploadSpool(spool, most)
        self._told, self._dropped = _Told(), 0
        self._gone: set[str] = set()
        self._ending, self._changed = threading.Event(), threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        left = self._spool.left(recordings)
        size = sum(each.size for each in left)
        earlier = f", {count(len(left), 'recording')} of an earlier start first ({size:,} bytes)" if left else ""
        say(f"uploading to {self.place}{earlier}; {most / 1e9:,.2f} GB may wait in {spool}, beyond that the oldest go")
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._thread.start()

    def announce(self, recording: Path) -> None:
        """Announce a recording that is about to be made."""
        self._spool.announce(recording)

    def add(self, recording: Path) -> None:
        """Have a recording uploaded; if it cannot wait in the spool, a line is printed."""
        try:
            gone = self._spool.add(recording)
        except Problem as problem:
            self._dropped += 1
            self._say(str(problem))
            return
        if gone:
            self._drop(gone)
        self._wake()

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many recordings were uploaded and dropped so far, and how many wait."""
        return len(self._told.uploaded), self._dropped, sum(1 for _ in self._spool.waiting())

    def close(self, patience: float = PATIENCE) -> UploadOutcome:
        """Try once more to upload what waits, for at most `patience` seconds; return the outcome of all."""
        self._ending.set()
        with self._changed:
            child = self._child
            if child is not None and child.stdin is not None:
                child.stdin.close()
        self._thread.join(patience)
        while self._thread.is_alive():
            self.abandon()
            self._thread.join(1)
        waits = [each for each in self._spool.waiting() if each.path.name not in self._told.odd]
        told = self._told
        return UploadOutcome(
            self.place, tuple(told.uploaded), len(waits), sum(each.size for each in waits), self._dropped,
            len(told.odd), told.why,
        )  # fmt: skip

    def abandon(self) -> None:
        """End at once; what waits is left to the next start."""
        self._ending.set()
        with self._changed:
            if self._child is not None:
                self._child.kill()

    def _drop(self, gone: list[Waiting]) -> None:
        new = [each for each in gone if each.path.name not in self._told.names]
        self._dropped += len(new)
        self._gone.update(each.path.name for each in new)
        if new:
            size = sum(each.size for each in new)
            why = f" ({self._told.why})" if self._told.why else ""
            self._say(
                f"{count(len(new), 'recording')} ({size:,} bytes) dropped, not uploaded: the spool is full; "
                f"{self._dropped:,} so far{why}"
            )

    def _wake(self) -> None:
        with self._changed:
            child = self._child
            if child is None or child.stdin is None or self._ending.is_set():
                return
            try:
                child.stdin.write("\n")
                child.stdin.flush()
            except (BrokenPipeError, ValueError):
                pass  # the process has ended, and is started again

    def _run(self) -> None:
        delay = _RESTARTS[0]
        while True:
            with self._changed:
                child = self._child = self._begun()
                if self._ending.is_set() and child.stdin is not None:
                    child.stdin.close()
            assert child.stdout is not None
            told = self._listen(child.stdout)
            code = child.wait()
            if self._ending.is_set():
                return
            self._say(f"the process that uploads has ended ({code}): it is begun again")
            delay = _RESTARTS[0] if told else min(delay * 2, _RESTARTS[1])
            self._ending.wait(delay * (0.5 + random.random() / 2))
            if self._ending.is_set():
                return

    def _begun(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tracer.upload.upload_process", str(os.getpid())]
        # In a session of its own: ^C on the terminal is for the recorder.
        return subprocess.Popen(
            [*command, str(self._spool.directory), self.place], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip

    def _listen(self, lines: IO[str]) -> bool:
        """Read the process's events until it ends; return whether it uploaded something."""
        before = len(self._told.uploaded)
        for line in lines:
            event = json.loads(line)
            if "uploaded" in event:
                self._told.uploaded.append(event["key"])
                self._told.names.add(event["uploaded"])
                self._told.why = ""
                if event["uploaded"] in self._gone:  # it was dropped from the spool while it was uploaded
                    self._gone.discard(event["uploaded"])
                    self._dropped -= 1
                continue
            why = printable(event["why"])
            if "odd" in event:
                self._told.odd.add(event["odd"])
                self._say(f"not uploaded: {why}")
            elif why != self._told.why:
                self._told.why = why
                waits = sum(1 for _ in self._spool.waiting())
                self._say(f"not uploaded yet, and tried again: {why}; waiting: {count(waits, 'recording')}")
        return len(self._told.uploaded) > before
