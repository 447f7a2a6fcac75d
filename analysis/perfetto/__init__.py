"""Traces and results as Perfetto files, for ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

from analysis.perfetto import predicted, recording
from analysis.perfetto.packets import PacketWriter
from analysis.sources import Recording, Result
from replay.timing.stalls import Rule


def export(source: Recording | Result, out: Path) -> list[str]:
    """Write what was recorded, or what a replay predicted; gives remarks, one line each."""
    if isinstance(source, Result):
        with PacketWriter(out, (), ()) as writer:
            predicted.write(source, writer)
        return []
    with PacketWriter(out, recording.NAMES, recording.NOTES) as writer:
        told = recording.write(source.trace, writer, Rule())
    remarks = [f"soft-hangs are not known: {why}" for why in told.unjudged]
    if told.clipped:
        remarks.append(f"{told.clipped:,} ns are left out: clocks of two CPUs differ, and spans would cross")
    return remarks
