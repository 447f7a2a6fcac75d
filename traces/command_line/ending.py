# SPDX-License-Identifier: Apache-2.0
"""How a command ends, whatever happens: its exit code, and at most one line on standard error.

0 fine, 1 a verdict or a gate failed, 2 bad input, bad usage or nowhere to write, 3 the environment lacks something, 130
^C. What happens to standard output does not change a verdict: if its reader has gone (`| head`), the rest is dropped.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final, NoReturn

import typer

from traces.command_line import interrupts
from traces.command_line.extras import missing
from traces.errors import BAD_INPUT, ENVIRONMENT, Problem
from traces.text import printable

_USAGE: Final[Any] = typer.BadParameter.__base__  # UsageError of click, or of typer's own copy of it


class _Standard(io.FileIO):
    """Standard output or error; once its reader has gone, what is written is dropped."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self.gone = False

    def write(self, data: Any) -> int:
        if not self.gone:
            try:
                return super().write(data) or 0
            except OSError as error:
                self.gone = True
                if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                    raise Problem(f"standard output: cannot be written: {error.strerror or error}") from None
        return memoryview(data).nbytes


def run(app: typer.Typer) -> NoReturn:
    """Run the command line and leave with its exit code."""
    interrupts.unwinding()
    _open_standard_streams()
    code = _code_of(lambda: _invoke(app))
    code = max(code, _code_of(sys.stdout.flush))
    interrupts.ignored()
    raise SystemExit(code)


def _invoke(app: typer.Typer) -> int:
    for word in sys.argv[1:]:
        if word == "--":
            break
        try:
            word.encode()
        except UnicodeEncodeError:
            raise Problem(
                f"{printable(word)}: not UTF-8, which the libraries that read and write files need: rename it"
            ) from None
    return app(standalone_mode=False) or 0


def _code_of(work: Callable[[], int | None]) -> int:
    """Return the exit code of some work; what it raised is printed as one line."""
    try:
        code = work() or 0
    except KeyboardInterrupt:
        interrupts.end()
    except BaseException as error:
        if interrupts.happened:
            interrupts.end()
        code = _told(error)
    if interrupts.happened and code == interrupts.CODE:  # typer caught it
        interrupts.end()
    return code


def _told(error: BaseException) -> int:
    """Print what happened, and return the exit code."""
    if isinstance(error, SystemExit):  # from shell completion, whose 1 is no verdict
        return BAD_INPUT if error.code else 0
    if isinstance(error, BrokenPipeError):
        return 0
    code = BAD_INPUT
    if isinstance(error, Problem):
        code, line = error.code, str(error)
    elif isinstance(error, _USAGE):
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return BAD_INPUT
        line = error.format_message()
        if error.ctx is not None:
            line = f"{line.rstrip('.')}: see {error.ctx.command_path} --help"
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        line = f"{where}{error.strerror or error}"
    elif isinstance(error, ImportError) and (lacking := missing(error)) is not None:
        code, line = ENVIRONMENT, lacking
    elif isinstance(error, UnicodeEncodeError):
        line = f"{printable(error.object)}: not UTF-8, which the libraries that read and write files need"
    else:  # a bug: it is reported with its traceback
        traceback.print_exception(error)
        return BAD_INPUT
    print(f"kvmtrace: {line}", file=sys.stderr)
    return code


def _open_standard_streams() -> None:
    """Replace standard streams, so that none fails with a traceback, on a character, or if it was closed.

    A closed one is opened, lest the next file that is opened takes its place: output for reading, so that writing to it
    fails with EBADF as if it were closed.
    """
    for fd, stream in ((0, sys.stdin), (1, sys.stdout), (2, sys.stderr)):
        if stream is None:
            null = os.open(os.devnull, os.O_WRONLY if fd == 2 else os.O_RDONLY)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        terminal = os.isatty(fd)
        with contextlib.suppress(OSError):
            new = io.TextIOWrapper(
                io.BufferedWriter(_Standard(fd)),
                encoding=old.encoding if old is not None else "utf-8",
                errors="backslashreplace",
                line_buffering=terminal or fd == 2,
            )
            setattr(sys, name, new)
