"""`python -m tracer.flight.compaction DIRECTORY OUT`: make a dump's segments a trace, with the lowest priority.

In a process of its own, so that it takes no time from the drain.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from traces.errors import Problem

_LOWEST = 19


def main(directory: Path, out: Path) -> int:
    """Compact; the exit code. What went wrong is one line on standard error."""
    os.setpriority(os.PRIO_PROCESS, 0, _LOWEST)
    from traces.compact import compact

    try:
        compact(directory, out)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return problem.code
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
