# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace top`: what every vCPU does, second by second."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from traces.command_line.documents import print_json
from traces.command_line.extras import how_to_get
from traces.command_line.help_text import examples
from traces.errors import ENVIRONMENT, Problem
from traces.options import Json
from traces.text import events_lost

if TYPE_CHECKING:
    from tracer.top.meter import VcpuSecond

app = typer.Typer()


@app.command(
    short_help="Show what every vCPU does, second by second.",
    epilog=examples(
        "sudo kvmtrace top", "sudo kvmtrace top --once --json", "kvmtrace top traces/corpus/steady-6.1.parquet --once"
    ),
)
def top(
    trace: Annotated[Path | None, typer.Argument(help="Play this recording instead of watching this host.")] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Print one second, or every second of a recording, and exit.")
    ] = False,
    dumps: Annotated[
        Path | None, typer.Option(help="Where a flight recorder keeps its dumps: key d then makes one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what every vCPU does, second by second: guest, idle and steal time, faults, roots, SMIs, zaps, exits."""
    if as_json and not once:
        raise Problem("--json: needs --once; a screen is for people")
    if once:
        _once(trace, as_json)
    else:
        _screen(trace, dumps)


def _once(trace: Path | None, as_json: bool) -> None:
    from tracer.top.top_table import text
    from traces.command_line import screen

    if trace is not None:
        from tracer.top.playback import seconds

        found, lost = list(seconds(trace)), 0
    else:
        lines, lost = _one_second()
        found = [(0, lines)]
    if as_json:
        print_json({
            "seconds": [{"after_ns": after, "vcpus": [line.document() for line in lines]} for after, lines in found],
            **({"lost": lost} if trace is None else {}),
        })  # fmt: skip
        return
    if trace is None and lost:
        print(f"kvmtrace: {events_lost(lost)}: counts are too low", file=sys.stderr)
    for after, lines in found:
        if trace is not None:
            print(f"after {after / 1e9:.0f} s")
        print(text(lines, screen.width()) if lines else "no vCPU shows anything")


def _one_second() -> tuple[list[VcpuSecond], int]:
    """Return the lines of one second, and how many events were lost."""
    from tracer.top.live import LiveTop

    came, shown = threading.Event(), list[list["VcpuSecond"]]()

    def show(lines: list[VcpuSecond]) -> None:
        shown.append(lines)
        came.set()

    live = LiveTop()
    live.start(show)
    try:
        while live.running and not came.wait(0.1):
            pass
        lost = live.lost()
    finally:
        live.close()
    if not shown:
        raise Problem("nothing could be watched: see kvmtrace doctor", ENVIRONMENT)
    return shown[0], lost


def _screen(trace: Path | None, dumps: Path | None) -> None:
    try:
        from tracer.top.top_screen import TopScreen
    except ImportError:
        raise Problem(f"the screen needs textual: {how_to_get('textual')}, or use --once", ENVIRONMENT) from None
    from tracer.top.live import LiveTop
    from tracer.top.playback import Played

    for name in ("COLUMNS", "LINES"):  # where they are exported, textual takes them for the terminal's size for good
        os.environ.pop(name, None)
    source: Played | LiveTop = Played(trace) if trace is not None else LiveTop()
    lost = source.lost if isinstance(source, LiveTop) else None
    screen = TopScreen(str(trace) if trace is not None else "this host", _dump_of(dumps), source.start, lost)
    try:
        screen.run()
    finally:
        source.close()


def _dump_of(dumps: Path | None) -> Callable[[], str] | None:
    """Return what key d does, which is to ask for a dump; None without a directory of dumps."""
    if dumps is None:
        return None

    def dump() -> str:
        from tracer.flight.control import ask

        return f"dumped {ask(dumps, 'asked for in top').name}"

    return dump
