"""A page of text for a terminal, or plain for a file: made in memory, so that what prints it decides where it goes."""

from __future__ import annotations

import io
import sys
from typing import Final

from rich.console import Console

WIDE: Final = 220  # where there is no terminal: nothing is wrapped
VMS_SHOWN: Final = 8  # of a trace; --json has the others


def page(width: int = WIDE) -> Console:
    """A console in memory: in colour and as wide as the terminal if standard output is one, else plain and `width`."""
    terminal = sys.stdout.isatty()
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        no_color=not terminal,
        width=None if terminal else width,
        highlight=False,
    )


def text_of(console: Console) -> str:
    """What was printed on a `page`, no line with blanks at its end."""
    output = console.file
    assert isinstance(output, io.StringIO)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"
