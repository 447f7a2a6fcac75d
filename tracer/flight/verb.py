# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace record --flight`: checks its options, runs the flight, and prints its outcome."""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import typer

from tracer.flight.flight import FlightOutcome, fly
from tracer.flight.flight_recorder import FlightOptions
from tracer.flight.keeper import Bounds
from tracer.recording_options import Options
from traces.command_line.documents import print_json
from traces.errors import VERDICT_FAILED, Problem
from traces.wall_clock import span_ns

_LEAST_MEMORY = 16 << 20
_MOST_PERCENT = 100


def fly_and_tell(
    options: Options, out: Path | None, kept: tuple[str, str, int, int], overhead: str, triggers: tuple[str, ...],
    group: str, metrics: str, upload: tuple[str, int], *, strict: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run a flight and print its outcome; exit with 1 where events are missing, or lost though `strict` is set.

    A command that failed exits with 1 as well. `kept` are --flight and --after as given, and the bytes of --memory and
    --disk; `overhead` is --max-overhead; `upload` is --upload and the bytes of --spool.
    """
    flight, after, memory, disk = kept
    if out is None:
        raise Problem("--flight: say which directory takes the dumps, with -o")
    if options.max_events is not None or options.max_size is not None:
        raise Problem("--flight: goes on until it is ended; --max-events and --max-size are for recordings")
    if memory < _LEAST_MEMORY:
        raise Problem("--memory: a flight needs 16M at least")
    bounds = Bounds(_span(flight, "--flight", 1), _span(after, "--after", 0), memory, disk, _share(overhead))
    outcome = fly(FlightOptions(replace(options, out=out.absolute()), bounds, triggers, group, metrics, *upload))
    if as_json:
        print_json({
            "directory": str(out), "dumps": [str(path) for path in outcome.dumps], "refused": outcome.refused,
            "events": outcome.events, "lost": outcome.lost, "missing": outcome.missing, "stopped": outcome.stopped,
            "seconds": outcome.seconds, "level_seconds": outcome.level_seconds,
            "recorder_cpu_seconds": outcome.cpu_seconds, "command_status": outcome.status,
            "upload": outcome.upload.to_dict() if outcome.upload else None,
        })  # fmt: skip
    else:
        _tell(outcome, out)
    if outcome.missing or outcome.status or (strict and outcome.lost):
        raise typer.Exit(VERDICT_FAILED)


def _share(text: str) -> float:
    """Return --max-overhead as a share of all CPUs, 0 where there is no bound."""
    if not text:
        return 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", text.strip())
    if match is None or not 0 < float(match[1]) <= _MOST_PERCENT:
        raise Problem(f"--max-overhead {text}: not a share of the host's CPUs; write it like 1% or 0.5%")
    return float(match[1]) / 100


def _span(text: str, option: str, least: int) -> int:
    ns = span_ns(text)
    if ns is None or ns < least:
        raise Problem(f"{option} {text}: not a time; write it like 30s, 500ms or 2m")
    return ns


def _tell(outcome: FlightOutcome, out: Path) -> None:
    many = "1 dump" if len(outcome.dumps) == 1 else f"{len(outcome.dumps)} dumps"
    lines = [
        f"{out}: {many}; {outcome.events:,} events seen, {outcome.lost:,} lost; {outcome.stopped}; recorder used "
        f"{outcome.cpu_seconds:.1f} s CPU in {outcome.seconds:.1f} s"
    ]
    if sum(seconds > 0 for seconds in outcome.level_seconds.values()) > 1:
        spent = ", ".join(f"{name} for {seconds:.0f} s" for name, seconds in outcome.level_seconds.items() if seconds)
        lines.append(f"kvmtrace: so that it cost no more than it may, recorded were {spent}")
    for trigger, refused in outcome.refused.items():
        lines.append(f"kvmtrace: {trigger}: {refused['count']:,} more times no dump: its quota was used up")
    if outcome.upload is not None:
        lines.append(f"kvmtrace: {outcome.upload.text}")
    if outcome.missing:
        lines.append(f"kvmtrace: {outcome.missing:,} events were put into a ring and not read from it: report this")
    if outcome.status:
        lines.append(f"kvmtrace: the command ended with status {outcome.status}")
    with contextlib.suppress(OSError):  # the terminal may be gone
        for line in lines:
            print(line, file=sys.stderr)
