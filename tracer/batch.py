"""Several recordings in one process, for machines on which compiling the probes costs more than the recordings.

`python -m tracer.batch JOBS.json` with {"events": PRESET, "jobs": [{"out": PATH, "command": [WORD, ...]}, ...]}. What a
command prints goes to OUT with the suffix .stdout; the first job that fails ends the batch with its line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tracer.probes import preset_kinds
from tracer.recorder import Options, record
from traces.errors import VERDICT_FAILED, Problem


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Standard output, our own and that of commands we start, goes to a file meanwhile."""
    sys.stdout.flush()
    saved = os.dup(1)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(saved, 1)
            os.close(saved)


def run(specification: Path) -> None:
    """Make the recordings that the specification lists; raises Problem."""
    asked = json.loads(specification.read_text())
    preset = asked["events"]
    kinds = preset_kinds(preset)
    several = [Options(Path(job["out"]), kinds, preset, command=tuple(job["command"])) for job in asked["jobs"]]
    recordings = record(*several)
    for options in several:
        with _output_to(options.out.with_suffix(".stdout")):
            outcome = next(recordings)
        if outcome.status or not outcome.summary.complete:
            why = f"its command ended with {outcome.status}" if outcome.status else outcome.summary.discrepancies[0]
            raise Problem(f"{options.out.name}: {why}", VERDICT_FAILED)


def main() -> None:
    try:
        run(Path(sys.argv[1]))
    except Problem as problem:
        print(f"kvmtrace: {problem}", file=sys.stderr)
        raise SystemExit(problem.code) from None


if __name__ == "__main__":
    main()
