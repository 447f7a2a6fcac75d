# SPDX-License-Identifier: Apache-2.0
"""A page of text for a terminal, or plain for a file, made in memory: the caller decides where it goes.

It is as wide as the terminal, within bounds, and 80 columns where there is none.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.text import Text

from traces.command_line.layout import GAP, TextColumn, fitted, whole_width, wrapped
from traces.text import printable

WIDTH: Final = 80
WIDEST: Final = 120
NARROWEST: Final = 40
VMS_SHOWN: Final = 8  # VMs of a trace; --json has the others


def width() -> int:
    """Return how many columns of text there are."""
    if not sys.stdout.isatty():
        return WIDTH
    return min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)


class Page:
    """Lines of text, in colour if standard output is a terminal."""

    def __init__(self) -> None:
        self.width = width()
        terminal = sys.stdout.isatty()
        self._file = io.StringIO()
        self._console = Console(
            file=self._file, force_terminal=terminal, no_color=not terminal, width=self.width, highlight=False
        )

    def say(self, text: str, style: str = "", indent: str = "  ") -> None:
        """Add a paragraph, all lines but the first indented; what could steer a terminal is replaced."""
        for line in wrapped(printable(text), self.width, indent):
            self._line(line, style)

    def command(self, text: str, at: int) -> None:
        """Add a command that somebody may copy: an arrow and the text, in one line whatever its length."""
        self._line(f"{'':<{at if 2 * at <= self.width else 0}}-> {printable(text)}")

    def blank(self) -> None:
        """Add an empty line."""
        self._line("")

    def facts(self, pairs: Sequence[tuple[str, str]], style: str = "", at: int = 0) -> None:
        """Add names with texts next to them, which begin in column `at`, by default two after the longest name."""
        at = at or max((len(name) for name, _ in pairs), default=0) + GAP
        if 2 * at > self.width:  # no room next to the labels
            at = 2 * GAP
        for name, text in pairs:
            self.say(f"{name:<{at - 1}} {text}", style, " " * at)

    def table(self, columns: Sequence[TextColumn], rows: Sequence[Sequence[str]]) -> None:
        """Add a table that fits: see `traces.command_line.layout`."""
        head, *lines = fitted(columns, [[printable(cell) for cell in row] for row in rows], self.width)
        self._line(head, "bold")
        for line in lines:
            self._line(line)

    def has_room_for(self, columns: Sequence[TextColumn], rows: Sequence[Sequence[str]]) -> bool:
        """Whether a table with all of its columns fits."""
        return whole_width(columns, rows) <= self.width

    def more(self, number: int, what: str) -> None:
        """Add a line on how much is left out, if anything."""
        if number > 0:
            self.say(f"... {number:,} more {what}: --json has them")

    @property
    def text(self) -> str:
        """All that was added, without blanks at the ends of lines."""
        return "".join(f"{line.rstrip()}\n" for line in self._file.getvalue().splitlines())

    def _line(self, line: str, style: str = "") -> None:
        self._console.print(Text(line, style), soft_wrap=True)
