# SPDX-License-Identifier: Apache-2.0
"""Where a command may write: every `-o` goes through here.

A file is written next to its place and takes it when it is whole, so that a failure leaves the old file. It only takes
the place of a file of its own kind: never of an input (under whichever name), never of a recording, and of any other
file only with --force. Devices and pipes are written as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from traces import durable
from traces.errors import Problem

TRACE_KEY: Final = b"kvmtrace"  # the Parquet key of a trace's metadata
RESULT_KEY: Final = b"kvmtrace.result"
FLEET_KEY: Final = b"kvmtrace.fleet"
_HEAD: Final = 1 << 16  # bytes from which a kind is recognized


class Unwritable(Problem):
    """A command may not, or cannot, write where it was told to."""


@dataclass(frozen=True)
class FileKind:
    """A kind of file: `mark` is found in the first bytes of such files; None: nothing there identifies them."""

    name: str
    mark: re.Pattern[bytes] | None = None


RECORDING: Final = FileKind("a recording")
SYNTHETIC: Final = FileKind("a synthetic trace")
IMPORTED: Final = FileKind("an imported trace")
RESULT: Final = FileKind("the result of a replay")
CATALOGUE: Final = FileKind("a catalogue of recordings")
TIMELINE: Final = FileKind("a timeline for Perfetto", re.compile(rb"\A\n.{1,2}P\x01[bh]", re.S))
PAGE: Final = FileKind(
    "a report's page", re.compile(rb'\A<!doctype html>.*<meta name="generator" content="kvmtrace', re.S)
)
DOCUMENT: Final = FileKind("a report in JSON", re.compile(rb'\A\{\s*"schema": \d+,\s*"reports"'))
JUNIT: Final = FileKind("a report for JUnit", re.compile(rb'\A<\?xml [^>]*>\s*<testsuites name="kvmtrace"'))
PROSE: Final = FileKind("a report in text", re.compile(rb"^(of {9}|of: |\| of \| )", re.M))
QUERIES: Final = FileKind("a list of queries", re.compile(rb"\Aqueries of "))
FTRACE_TEXT: Final = FileKind("a text as ftrace prints it", re.compile(rb"\A# tracer: nop\n#\n"))
PERF_TEXT: Final = FileKind("a text as perf prints it", re.compile(rb"\A[^\n]{0,60} \[\d{3,5}\] \d+\.\d{9}: "))
TRACE_DAT: Final = FileKind(
    "a trace.dat of kvmtrace", re.compile(rb"\A\x17\x08Dtracing6\0.{0,900}# written by kvmtrace\n", re.S)
)
MARKED: Final = (TRACE_DAT, FTRACE_TEXT, PERF_TEXT, TIMELINE, PAGE, DOCUMENT, JUNIT, PROSE, QUERIES)
_NOT_OURS: Final = FileKind("a file that kvmtrace did not write")


def check(path: Path, kind: FileKind, inputs: Sequence[Path] = (), *, force: bool = False) -> None:
    """Raise Problem unless a file of this kind may be written to `path`. A command that takes long begins with it."""
    _Place(path, kind, inputs, force).check()


class Output:
    """A file being written, as a binary file object; it appears under its name when its `with` block ends well.

    `written` is its path until then. Every call raises Problem where the file may not or cannot be written.
    """

    closed = False  # Arrow asks for it

    def __init__(self, path: Path, kind: FileKind, inputs: Sequence[Path] = (), *, force: bool = False) -> None:
        self.path = path
        self._place = _Place(path, kind, inputs, force)
        self._place.check(whole=False)
        self._final = self._place.file
        try:
            if self._final is None:
                self.written, self._fd = path, os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            else:
                self.written, self._fd = durable.create_beside(self._final)
        except OSError as error:
            raise _failed(path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`; after the end, ignore what a library's writer still sends when it is collected."""
        try:
            if self._fd >= 0:
                durable.write_all(self._fd, data)
        except OSError as error:
            raise _failed(self.path, error) from None
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Do nothing: no data is held back."""

    def close(self) -> None:
        """Do nothing: a library may take the file for its own, but it ends with `commit` or `discard`."""

    def commit(self) -> None:
        """Give the file its name, durably."""
        if self._final is None or self._fd < 0:
            return
        try:
            durable.sync(self._fd)
            if self._place.kind == RECORDING and _same(self.written, self._final):
                return
            self._place.check()  # again: somebody may have written there meanwhile
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(self._fd, stat.S_IMODE(self._final.stat().st_mode))
            durable.replace(self.written, self._final)
        except OSError as error:
            raise _failed(self.path, error) from None

    def discard(self) -> None:
        """Remove the file if it does not have its name yet; harmless after `commit`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self._final is not None:
                durable.remove(self.written)


class _Place:
    """Where a file is to go, and what must not be lost there."""

    def __init__(self, path: Path, kind: FileKind, inputs: Sequence[Path], force: bool) -> None:
        self._path, self.kind, self._inputs, self._force = path, kind, inputs, force
        try:
            there = _status(path)
        except OSError as error:
            raise _failed(path, error) from None
        device = there is not None and not stat.S_ISREG(there.st_mode) and not stat.S_ISDIR(there.st_mode)
        # Through a link: the rename would replace the link, not the file.
        self.file = None if device else Path(os.path.realpath(path)) if path.is_symlink() else path

    def check(self, *, whole: bool = True) -> None:
        """Raise Problem where a file may not, or cannot, be written there.

        Until the new recording is `whole`, another may be there: the two may turn out to be the same.
        """
        path, choose = self._path, "choose another name"
        try:
            there = _status(path)
            if there is not None and stat.S_ISDIR(there.st_mode):
                raise Unwritable(f"{path}: cannot be written: it is a directory")
            if self.file is not None:
                parent = self.file.parent
                if not parent.is_dir():
                    raise Unwritable(f"{path}: cannot be written: {parent}: no such directory")
                if not os.access(parent, os.W_OK | os.X_OK):
                    raise Unwritable(f"{path}: cannot be written: no permission to make a file in {parent}")
                if _of_directory(self.file):
                    raise Unwritable(f"{path}: would go into what a recorder left, which is never changed: {choose}")
            if there is None:
                return
            for given in self._inputs:
                status = _status(given)
                if status is not None and os.path.samestat(status, there):
                    raise Unwritable(f"{path}: is what is read ({given}): {choose}")
            found = None if self.file is None else _kind_of(self.file, self.kind)
        except OSError as error:
            raise _failed(path, error) from None
        if self.kind == RECORDING:
            if found == RECORDING and not whole:
                return
            raise Unwritable(f"{path}: exists; a recording is never overwritten, nor overwrites: {choose} with -o")
        if found == RECORDING:
            raise Unwritable(f"{path}: is a recording, or was one, and is never overwritten: {choose}")
        if found not in (None, self.kind) and not self._force:
            assert found is not None
            raise Unwritable(f"{path}: is {found.name}, not {self.kind.name}: {choose}, or give --force to replace it")


def _failed(path: Path, error: OSError) -> Unwritable:
    return Unwritable(f"{path}: cannot be written: {error.strerror or error}")


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _of_directory(file: Path) -> bool:
    """Whether a file is, or would be, one of a recording under way, or of one that was cut short."""
    return file.resolve().parent.suffix == ".kvmt" or re.fullmatch(r"seg-\d{5,}\.arrows", file.name) is not None


def _kind_of(file: Path, wanted: FileKind) -> FileKind | None:
    """Return which kind a file is of; None for an empty one."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    if not head:
        return None
    if head.startswith(b"PAR1"):
        return kind_of_parquet(file)
    return next((kind for kind in (wanted, *MARKED) if kind.mark and kind.mark.search(head)), _NOT_OURS)


def kind_of_parquet(file: Path) -> FileKind:
    """Return which kind a Parquet file is of; a recording where that cannot be found out any more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pairs = pq.read_metadata(file).metadata or {}
        if RESULT_KEY in pairs and TRACE_KEY not in pairs:
            return RESULT
        if TRACE_KEY not in pairs:
            return CATALOGUE if b'"catalogue"' in pairs.get(FLEET_KEY, b"") else _NOT_OURS
        document = json.loads(pairs[TRACE_KEY])
    except (pa.ArrowException, OSError, ValueError, RecursionError, MemoryError):
        return RECORDING
    origin = document.get("origin") if isinstance(document, dict) else None
    return SYNTHETIC if origin == "synthetic" else IMPORTED if origin == "imported" else RECORDING


def _same(one: Path, other: Path) -> bool:
    """Whether two files have the same bytes; False where the second is missing."""
    import filecmp

    try:
        return filecmp.cmp(one, other, shallow=False)
    except FileNotFoundError:
        return False
