# SPDX-License-Identifier: Apache-2.0
"""What ^C does: one line and exit code 130, from the first import on.

The command (scripts/kvmtrace) makes Python answer ^C before that, and kvmtrace.py imports this module before all
others. Until the command line is loaded nothing was begun that would have to be cleaned up, so that the process may end
on the spot: a KeyboardInterrupt in the middle of an import does not always come out of it as one (extension modules
make it an ImportError, polars panics). From then on (`unwinding`) it is raised, so that temporary files are removed,
after the import or the callback of a weak reference that is under way, if one is: such a callback would print the
exception and lose it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import Final, NoReturn

unfinished: Final[set[str]] = set()  # paths of files that have not got their names: ^C removes what nobody else did
_RETRY: Final = 0.005  # seconds, while nothing can be raised
CODE: Final = 128 + signal.SIGINT  # what shells say of a process that SIGINT ended
_LINE: Final = b"kvmtrace: interrupted\n"
_UNDISTURBED: Final = {
    ("importlib._bootstrap", "_find_and_load"), ("weakref", "remove"), ("_weakrefset", "_remove"),
}  # fmt: skip

happened = False


def unwinding() -> None:
    """Make ^C raise KeyboardInterrupt from now on, and set `happened`, whatever becomes of the exception."""
    if _heard():
        signal.signal(signal.SIGINT, _raise)
        signal.signal(signal.SIGALRM, _raise)


def ignored() -> None:
    """Make ^C do nothing from now on: the command is done, and the interpreter's own end takes a moment."""
    if signal.getsignal(signal.SIGINT) is _raise:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)


def stop_if_interrupted() -> None:
    """Raise KeyboardInterrupt if the main thread was interrupted: for threads, which no signal reaches."""
    if happened:
        raise KeyboardInterrupt


def end() -> NoReturn:
    """Remove unfinished files, print that the command was interrupted, and end; threads are not waited for."""
    for path in tuple(unfinished):
        with contextlib.suppress(OSError):
            os.unlink(path)  # noqa: PTH108 (pathlib takes a while)
    try:
        os.write(2, _LINE)
    finally:
        os._exit(CODE)


def _end(_number: int, _frame: FrameType | None) -> None:
    end()


def _raise(number: int, frame: FrameType | None) -> None:
    global happened
    waits = _must_wait(frame)
    if waits and happened and number == signal.SIGINT:
        end()  # asked twice
    happened = True
    if not waits:
        raise KeyboardInterrupt
    signal.setitimer(signal.ITIMER_REAL, _RETRY)


def _must_wait(frame: FrameType | None) -> bool:
    """Whether an exception would not come out of what is under way: an import, or the callback of a weak reference."""
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) in _UNDISTURBED:
            return True
        frame = frame.f_back
    return False


def _heard() -> bool:
    """Whether ^C is to be handled here: a shell's `&` has it ignored, and others may have a handler."""
    handler = signal.getsignal(signal.SIGINT)
    ours = getattr(handler, "__module__", "") == "__main__" and getattr(handler, "__name__", "") == "end"
    return ours or handler in (signal.default_int_handler, _end)


if os.path.basename(sys.argv[0]) in ("kvmtrace", "kvmtrace.py") and _heard():  # noqa: PTH119 (pathlib takes a while)
    signal.signal(signal.SIGINT, _end)
