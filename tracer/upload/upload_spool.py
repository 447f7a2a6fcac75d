# SPDX-License-Identifier: Apache-2.0
"""A directory in which recordings wait for their upload: bounded in bytes, and intact after a crash.

A recording that waits is a hard link, so that it takes no more room while its original exists, and stays when that is
deleted. Its name has the boot it was recorded in and the recording's own name. A recording that is being made is
announced by an empty file; if its recorder dies before it could be linked, the next recorder finds it by that.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from traces import durable
from traces.errors import Problem

_ANNOUNCED: Final = ".coming"
_TRACE: Final = ".parquet"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_BOOT_DIGITS: Final = 12


@dataclass(frozen=True)
class Waiting:
    """A recording that waits; `boot` has digits of the id of the boot that it was recorded in."""

    path: Path
    boot: str
    size: int


class UploadSpool:
    """The recordings that wait in a directory: its owner adds them, any process may read and remove them."""

    def __init__(self, directory: Path, most: int) -> None:
        """`most` is how many bytes they may take. Raises Problem where the directory cannot be made."""
        self.directory, self._most = directory, most
        try:
            directory.mkdir(exist_ok=True)
        except OSError as error:
            raise Problem(f"{directory}: cannot be made: {error.strerror}") from None

    def announce(self, recording: Path) -> None:
        """Announce a recording that is about to be made, so that it is found even if `add` is never called."""
        with suppress(OSError):  # unannounced, its upload is lost only if this process crashes
            self._place(recording).with_suffix(_ANNOUNCED).touch()

    def add(self, recording: Path) -> list[Waiting]:
        """Let a recording wait; return those dropped for it, the oldest first, and itself if it is too large.

        Raises Problem where it cannot be put into the directory.
        """
        place = self._place(recording)
        try:
            with suppress(FileExistsError):
                try:
                    os.link(recording, place)
                except PermissionError:  # a file system without links
                    temporary, fd = durable.create_beside(place)
                    os.close(fd)
                    shutil.copyfile(recording, temporary)
                    durable.replace(temporary, place)
            durable.sync_directory(self.directory)
        except OSError as error:
            raise Problem(f"{place}: cannot be made: {error.strerror}: {recording} is not uploaded") from None
        place.with_suffix(_ANNOUNCED).unlink(missing_ok=True)
        return self._make_room()

    def left(self, recordings: Path) -> list[Waiting]:
        """Return what earlier recorders left here, with those of `recordings` that they had only announced."""
        for announced in sorted(self.directory.glob(f"*{_ANNOUNCED}")):
            name = announced.stem.partition("~")[2]
            recording = recordings / f"{name}{_TRACE}"
            if recording.is_file():
                with suppress(OSError, FileExistsError):
                    os.link(recording, announced.with_suffix(_TRACE))
            if recording.is_file() or not recording.with_suffix(".kvmt").exists():
                announced.unlink(missing_ok=True)  # else a trace would be made of its segments later on
        for partial in self.directory.glob(".kvmtrace-*.tmp"):
            partial.unlink(missing_ok=True)
        return list(self.waiting())

    def waiting(self) -> Iterator[Waiting]:
        """Yield the recordings that wait, the oldest first."""
        found = []
        for path in self.directory.glob(f"*{_TRACE}"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, Waiting(path, path.name.partition("~")[0], status.st_size)))
        yield from (each for _, each in sorted(found, key=lambda pair: (pair[0], pair[1].path.name)))

    def _make_room(self) -> list[Waiting]:
        every = list(self.waiting())
        total, gone = sum(each.size for each in every), []
        for each in every:
            if total <= self._most:
                break
            each.path.unlink(missing_ok=True)
            total -= each.size
            gone.append(each)
        return gone

    def _place(self, recording: Path) -> Path:
        earlier = next(self.directory.glob(f"*~{_quoted(recording.stem)}{_ANNOUNCED}"), None)
        boot = earlier.name.partition("~")[0] if earlier else boot_id()
        return self.directory / f"{boot}~{recording.stem}{_TRACE}"


def boot_id() -> str:
    """Return twelve digits of the kernel's id of this boot."""
    return _BOOT_ID.read_text().strip().replace("-", "")[:_BOOT_DIGITS]


def _quoted(name: str) -> str:
    import glob

    return glob.escape(name)
