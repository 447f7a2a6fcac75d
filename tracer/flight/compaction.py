# SPDX-License-Identifier: Apache-2.0
"""`python -m tracer.flight.compaction PARENT DIRECTORY OUT`: make a dump's segments a trace, with the lowest priority.

In a process of its own, so that it takes no time from the drain.
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
    """Compact for the recorder with the number `parent`; the exit code. What went wrong is a line on standard error."""
    os.setpriority(os.PRIO_PROCESS, 0, _LOWEST)
    # Not without the recorder: one that is killed leaves the segments to the next, which must be alone with them.
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        return ENVIRONMENT
    from traces.compact import compact

    try:
        compact(directory, out)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return problem.code
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *map(Path, sys.argv[2:4])))
