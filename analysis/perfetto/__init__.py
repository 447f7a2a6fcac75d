"""Traces and results as Perfetto files, for ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from analysis.perfetto import recorded
from analysis.perfetto.packets import Writer
from replay.virtual.stalls import Rule
from traces.reader import Trace


def export_trace(trace: Trace, out: Path, progress: Callable[[int], None]) -> recorded.Told:
    """Write a recording's VMs, vCPUs, workers and roots; soft-hangs by the usual rule. `progress` is told of rows."""
    with Writer(out, recorded.NAMES, recorded.NOTES) as writer:
        return recorded.write(trace, writer, Rule(), progress)
