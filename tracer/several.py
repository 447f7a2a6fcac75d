# SPDX-License-Identifier: Apache-2.0
"""Several recordings in one process, for machines on which compiling the probes costs more than the recordings.

`python -m tracer.several JOBS.json` with {"events": PRESET, "jobs": [{"out": PATH, "command": [WORD, ...]}, ...]}. What
a command prints goes to OUT with the suffix .stdout, unless "shown" is true; the first job that fails ends the batch
with its line, unless "whatever_happens" is true. With "segments": true the recordings are left as segments in OUT with
the suffix .kvmt, for another machine to compact.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

from tracer.probing.probes import preset_kinds
from tracer.recorder import record, take
from tracer.recording_options import Options
from traces.errors import VERDICT_FAILED, Problem


def run(specification: Path) -> None:
    """Make the recordings that the specification lists; raises Problem."""
    asked = json.loads(specification.read_text())
    preset = asked["events"]
    kinds = preset_kinds(preset)
    with ExitStack() as files:
        several = []
        for job in asked["jobs"]:
            out = Path(job["out"])
            to = None if asked.get("shown") else files.enter_context(out.with_suffix(".stdout").open("wb")).fileno()
            several.append(Options(out, kinds, preset, command=tuple(job["command"]), command_stdout=to))
        if asked.get("segments"):
            for taken in take(*several):
                if taken.status and not asked.get("whatever_happens"):
                    raise Problem(f"{taken.options.out.name}: its command ended with {taken.status}", VERDICT_FAILED)
            return
        for options, outcome in zip(several, record(*several), strict=True):
            if not asked.get("whatever_happens") and (outcome.status or not outcome.summary.complete):
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
