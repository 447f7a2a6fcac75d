"""What ^C does: one line and exit code 130, from the first import on.

kvmtrace.py imports this module before all others. Until the command line is loaded nothing was begun that would have to
be put away, so that the process may end on the spot: a KeyboardInterrupt in the middle of an import is not always one
when it comes out of it (extension modules make it an ImportError). From then on (`unwinding`) it is raised, so that
temporary files go.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Final, NoReturn

CODE: Final = 128 + signal.SIGINT  # what shells say of a process that SIGINT ended
_LINE: Final = b"kvmtrace: interrupted\n"

happened = False


def unwinding() -> None:
    """From now on ^C raises KeyboardInterrupt, and `happened` tells, whatever becomes of that."""
    if _heard():
        signal.signal(signal.SIGINT, _raise)


def stop_if_interrupted() -> None:
    """For threads, which no signal reaches: raise KeyboardInterrupt where the main thread was interrupted."""
    if happened:
        raise KeyboardInterrupt


def end() -> NoReturn:
    """Say that it was interrupted, and end; threads are not waited for."""
    try:
        os.write(2, _LINE)
    finally:
        os._exit(CODE)


def _end(_number: int, _frame: FrameType | None) -> None:
    end()


def _raise(_number: int, _frame: FrameType | None) -> None:
    global happened
    happened = True
    raise KeyboardInterrupt


def _heard() -> bool:
    """Whether ^C is for us: it is ignored by what runs behind a shell's `&`, and others may have a handler."""
    return signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _end)


if os.path.basename(sys.argv[0]) in ("kvmtrace", "kvmtrace.py") and _heard():  # noqa: PTH119 (pathlib takes a while)
    signal.signal(signal.SIGINT, _end)
