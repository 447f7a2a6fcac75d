# SPDX-License-Identifier: Apache-2.0
"""`python -m tracer.flight.compaction PARENT DIRECTORY OUT`: make a trace of a dump's segments, at lowest priority.

It is a process of its own, so that it takes no time from the thread that drains the rings.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from traces.errors import ENVIRONMENT, Problem

_LOWEST = 19
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def main(parent: int, directory: Path, out: Path) -> int:
    """Compact for the recorder with process id `parent`; return the exit code. An error is a line on standard error."""
    os.setpriority(os.PRIO_PROCESS, 0, _LOWEST)
    # End with the recorder: if it is killed, the next one takes the segments over, and must be alone with them.
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        return ENVIRONMENT
    from traces.recording.compact import compact

    try:
        compact(directory, out)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return problem.code
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *map(Path, sys.argv[2:4])))
