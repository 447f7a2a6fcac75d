# SPDX-License-Identifier: Apache-2.0
"""The progress line: on a terminal, of what takes a while, gone at the end; never in what a command answers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from traces.command_line import progress
from traces.command_line.progress import Progress

# A job that goes on when it is told to, and answers on standard output while its line is shown.
CHILD = """
import sys
from traces.command_line import progress
progress.DELAY = float(sys.argv[1])
with progress.Progress("replaying \\x1b[31m[red]", 8) as outer:
    outer.at(4)
    input()
    print("an answer", flush=True)
    with progress.Progress("rows") as inner:
        inner.at(1234)
        input()
    outer.at(6)
    input()
"""


class Terminal:
    """The child with a pseudo-terminal as its standard error."""

    def __init__(self, delay: float) -> None:
        self.master, slave = os.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(delay)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=slave, env=environment, text=True,
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def read(self) -> bool:
        """More text; False at the end."""
        try:
            part = os.read(self.master, 1 << 16).decode(errors="replace")
        except OSError:  # EIO: the other end is closed
            return False
        self.text += part
        return bool(part)

    def until(self, text: str) -> None:
        """Wait for a text; the child waits as well."""
        while text not in self.text:
            assert self.read(), self.text

    def go(self) -> None:
        """Have the child go on."""
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()

    def close(self) -> None:
        while self.read():
            pass
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.close()
        assert self.child.stdout.read() == "an answer\n"
        assert self.child.wait() == 0
        os.close(self.master)


def test_on_a_terminal_the_innermost_job_is_shown_and_taken_away() -> None:
    terminal = Terminal(delay=0)
    terminal.until("50%")
    terminal.go()
    terminal.until("rows: 1,234")
    terminal.go()
    terminal.until("75%")
    terminal.go()
    terminal.close()
    assert "replaying ?[31m[red]" in terminal.text  # what a file is called steers no terminal
    assert terminal.text.rstrip().endswith("\x1b[2K")
    assert "an answer" not in terminal.text


def test_what_is_done_at_once_is_not_shown() -> None:
    terminal = Terminal(delay=3600)
    for _ in range(3):
        terminal.go()
    terminal.close()
    assert terminal.text == ""


def test_nothing_is_shown_elsewhere(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "DELAY", 0)
    with Progress("replaying", 2) as job:
        job.at(1)
        assert progress._LINE._timer is None
        assert not job.shown
    assert capfd.readouterr() == ("", "")


def test_a_job_that_fails_takes_its_line_away() -> None:
    with pytest.raises(ValueError, match="mine"), Progress("outer"), Progress("inner"):
        raise ValueError("mine")
    assert not progress._LINE._jobs
