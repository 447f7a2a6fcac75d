"""A replay into a result file: the counts and root lives of every policy, and, where asked, the times."""

from __future__ import annotations

from pathlib import Path

from replay.plan import Plan
from replay.result import Writer
from replay.run import Replayed, document, replay
from replay.timing import time_rows, time_text
from replay.timing.timed_run import Settings, VmTime, replay_timed


def keep(
    plan: Plan, path: Path, settings: Settings | None = None, *, timed: bool = True
) -> tuple[Replayed, list[VmTime]]:
    """Run a plan and write its result; what was replayed, and its times (none unless `timed`)."""
    settings = settings or Settings()
    times = replay_timed(plan, settings) if timed else []
    names = [target.name for target in plan.targets]
    with Writer(path, names) as writer:
        time_rows.write(writer, times, names)
        replayed = replay(plan, writer)
        writer.close({**document(replayed), "time": time_text.facts(times, settings) if timed else None})
    return replayed, times
