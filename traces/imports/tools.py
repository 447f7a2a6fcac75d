"""The data of trace-cmd and perf, printed by trace-cmd and perf: their formats are theirs to read.

Nothing of the file is run: no plugins, no scripts, no shell.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from traces.errors import ENVIRONMENT, Problem

_PIECE: Final = 1 << 20
_SECONDS: Final = 60  # for a heading


@dataclass(frozen=True)
class Tool:
    """Who prints files that begin so: commands, less the file's name, for its events and for the kernel's release."""

    what: str
    magic: tuple[bytes, ...]
    events: tuple[str, ...]
    heading: tuple[str, ...]
    release: re.Pattern[bytes]
    install: str


TOOLS: Final = (
    Tool(
        "trace.dat",
        (b"\x17\x08D",),
        ("trace-cmd", "report", "-R", "-N", "-t", "-i"),
        ("trace-cmd", "report", "--uname", "-i"),
        re.compile(rb"^uname: \S+ \S+ (\d+\.\d+\S*)", re.M),
        "sudo apt-get install trace-cmd",
    ),
    Tool(
        "perf.data",
        (b"PERFILE2", b"2ELIFREP", b"PERFFILE"),
        ("perf", "script", "-f", "--ns", "--show-lost-events", "-F", "comm,pid,tid,cpu,time,event,trace", "-i"),
        ("perf", "script", "-f", "--header-only", "-i"),
        re.compile(rb"^# os release : (\d+\.\d+\S*)", re.M),
        "sudo apt-get install linux-perf",
    ),
)


def tool_of(head: bytes) -> Tool | None:
    """Who prints a file that begins so; None: nobody needs to."""
    return next((tool for tool in TOOLS if head.startswith(tool.magic)), None)


class Printed:
    """A file as its tool prints it: iterate `pieces` once. `cut` says afterwards why it is not all, if so."""

    def __init__(self, tool: Tool, path: Path) -> None:
        self.cut = ""
        self._tool, self._name = tool, os.path.abspath(path)  # noqa: PTH100 (a name that begins with - is none any more)
        if shutil.which(tool.events[0]) is None:
            raise Problem(f"{path}: {tool.what} is read by {tool.events[0]}: {tool.install}", ENVIRONMENT)
        self._process: subprocess.Popen[bytes] | None = None

    def release(self) -> str:
        """The recorded kernel's release; empty where the file does not say."""
        try:
            done = subprocess.run([*self._tool.heading, self._name], capture_output=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        match = self._tool.release.search(done.stdout)
        return match[1].decode(errors="replace") if match else ""

    def pieces(self) -> Iterator[bytes]:
        """What the tool prints."""
        words = [*self._tool.events, self._name]
        self._process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        out: IO[bytes] | None = self._process.stdout
        assert out is not None
        while piece := out.read(_PIECE):
            yield piece
        if code := self._process.wait():
            self.cut = f"{words[0]} did not print it to the end (status {code})"

    def close(self) -> None:
        """End the tool, if it goes on."""
        if self._process is not None:
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process.kill()
            self._process.wait()
