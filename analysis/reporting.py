# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace report`: opens what belongs to a file, replays and validates it where asked, and makes the report."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from analysis.gates import Gate, check
from analysis.queries.exit_times import halts
from analysis.queries.registry import Query
from analysis.reading.guest_files import GuestFile, use_guest
from analysis.reading.result_source import Result
from analysis.reading.rip_runs import RipQuestion
from analysis.reading.rows import give_memory_back
from analysis.reading.sources import Recording, open_source
from analysis.reading.symbols import NO_NAMING, Naming, load
from analysis.report_model.assemble import asked, assemble
from analysis.report_model.figures import Figures
from analysis.report_model.report import Check, Report
from analysis.report_model.validation import Validated, validated
from traces.errors import BAD_INPUT, Problem
from traces.outputs import Unwritable
from traces.selection import ALL, Selection

UNVALIDATED: Final = "not done: --validate compares the recording with the model (100,000 rows a second)"


@dataclass(frozen=True)
class Wanted:
    """What a report on each file is to have.

    `drawn` are queries of a recording that the format makes besides those of the tables. `parts`: the recorded time in
    parts, which only pictures show.
    """

    policies: tuple[str, ...] = ()
    recorded_policy: str = ""
    replay: bool = True
    validate: bool = False
    gates: tuple[Gate, ...] = ()
    baseline: Figures | None = None
    drawn: tuple[Query[Recording], ...] = ()
    parts: bool = True
    selection: Selection = ALL
    naming: Naming = NO_NAMING
    guest: GuestFile | None = None


@contextmanager
def reported(path: Path, wanted: Wanted, step: Callable[[str], None] = lambda _: None) -> Iterator[Report]:
    """Yield the report of one trace or result, as a context in which its sources can be read.

    A trace's replay is in a temporary file, which is removed afterwards. `step` is called with what is being done.
    """
    with tempfile.TemporaryDirectory(prefix="kvmtrace-") as scratch:
        step(f"reading {path}")
        source = open_source(path, wanted.recorded_policy, wanted.selection)
        remarks: list[str] = [wanted.selection.remark] if wanted.selection else []
        result: Result | None = None
        recording: Recording | None
        if isinstance(source, Result):
            if wanted.policies:
                raise Problem(f"{path}: a result has its policies already: --policy is for traces")
            result, recording = source, recording_of(source, remarks, wanted.selection)
        else:
            recording = source
        if recording is not None:
            remarks += use_symbols(recording, wanted.naming)
            remarks += use_guest(recording, wanted.guest)
        elif wanted.guest is not None:
            raise Problem(f"{path}: --guest: without its recording's rows there is nothing to compare the guest's with")
        if isinstance(source, Recording):
            window = source.window.since is not None
            if window and (wanted.policies or wanted.gates):
                raise Problem(f"{path}: --from: a replay counts from its VMs' begin: give no --policy and no --fail-on")
            if window and wanted.replay:
                remarks.append("not replayed: of a window that begins later, only what was recorded in it is counted")
            result = (
                _replayed(source, wanted, Path(scratch) / "result.parquet", remarks, step)
                if wanted.replay and not window
                else None
            )
        step(f"validating {path}")
        needed = wanted.validate or any(gate.column == "fidelity" for gate in wanted.gates)
        validation = _validated(recording) if needed else UNVALIDATED

        def checks(figures: Figures) -> Iterator[Check]:
            return check(wanted.gates, figures, wanted.baseline)

        yield assemble(
            recording, result, validation, remarks=tuple(remarks), drawn=wanted.drawn, gates=checks,
            step=lambda query: step(f"{path}: query {query}"),
        )  # fmt: skip


def use_symbols(recording: Recording, naming: Naming) -> list[str]:
    """Name the guest's addresses by a file of symbols, where one is given; return remarks on that."""
    if naming.symbols is None:
        return []
    halted = halts(recording) if naming.kaslr is None and "kvm_exit" in recording.kinds else []
    moved = load(naming.symbols).moved(naming.kaslr, halted)
    recording.symbol = moved.named if moved.offset is not None else None
    return [f"symbols of {naming.symbols}: {moved.how}"]


def recording_of(
    result: Result,
    remarks: list[str],
    selection: Selection = ALL,
) -> Recording | None:
    """Return the trace that a result was made of, if it is still there and the same; else None, and a remark."""
    try:
        recording = Recording.open(result.trace_path)
    except (Problem, ValueError) as problem:  # ValueError: a path that no file can have
        remarks.append(f"without the recording's rows: {problem}")
        return None
    meta = recording.metadata
    if (meta.events, meta.kernel) != (result.trace_events, result.kernel):
        remarks.append(f"without the recording's rows: {result.trace_path} is another recording now")
        return None
    return Recording.open(result.trace_path, selection=selection) if selection else recording


def _replayed(
    recording: Recording, wanted: Wanted, path: Path, remarks: list[str], step: Callable[[str], None]
) -> Result | None:
    step(f"replaying {recording.path}")
    try:
        return replayed_under(recording, wanted.policies, path, asked(wanted.drawn), parts=wanted.parts)
    except Problem as problem:
        gated = any(gate.asked for gate in wanted.gates)
        if wanted.policies or gated or problem.code != BAD_INPUT or isinstance(problem, Unwritable):
            raise
        remarks.append(f"not replayed: {str(problem).removeprefix(f'{recording.path}: ')}")
        return None


def replayed_under(
    recording: Recording,
    policies: tuple[str, ...],
    path: Path,
    queries: Iterable[Query[Recording]] = (),
    parts: bool = True,
) -> Result:
    """Replay a recording, with times, into a result at `path`.

    Without `policies` these are the recorded one, preserve and async. The rows are read once, for the replay and for
    the `queries` that are to be made of the recording. `parts`: the recorded time is wanted in parts, which take some
    50 KiB for each vCPU.
    """
    from analysis.reading.recorded_time import PARTS, of_replay
    from replay.decode.capabilities import Capabilities
    from replay.plan import make
    from replay.run import replay_into
    from replay.timing.timed_run import Settings

    plan = make(Capabilities(recording.trace), policies)
    questions = [question for query in queries for question in query.questions(recording)]
    # The runs of exits come with the replay's times.
    asking = recording.asking(*(each for each in questions if not isinstance(each, RipQuestion)))
    replayed = replay_into(plan, path, Settings(parts=PARTS if parts else 0), beside=asking)
    recording.times = of_replay(recording.trace, replayed.times)
    del plan, replayed
    with contextlib.suppress(Problem):  # where the file is damaged, each query reports that itself
        recording.take(asking)
    give_memory_back()
    return Result.open(path)


def _validated(recording: Recording | None) -> Validated | str:
    if recording is None:
        return "not done: the recording is not at hand"
    try:
        return validated(recording.trace, recording.metadata.policy, recording.window.since)
    except Problem as problem:
        return f"not possible: {str(problem).removeprefix(f'{recording.path}: ')}"


def exit_code(reports: Sequence[Report]) -> int:
    """Return 1 where a gate or an invariant failed, else 0."""
    return int(any(report.failed for report in reports))
