# SPDX-License-Identifier: Apache-2.0
"""Traces and results as Perfetto files, for ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

from analysis.perfetto import predicted, recording
from analysis.perfetto.packets import PacketWriter
from analysis.reading.result_source import Result
from analysis.reading.sources import Recording
from replay.timing.stalls import Rule
from traces.outputs import TIMELINE, Output
from traces.vm_names import VmNames


def export(source: Recording | Result, out: Path, *, force: bool = False) -> list[str]:
    """Write what was recorded, or what a replay predicted, and return remarks, one line each.

    The file appears under its name when all of it is written. Raises Problem where it cannot be. For `force` see
    `traces.outputs`.
    """
    with Output(out, TIMELINE, [source.path], force=force) as output:
        if isinstance(source, Result):
            writer = PacketWriter(output, (), ())
            predicted.write(source, writer)
            writer.flush()
            return []
        writer = PacketWriter(output, recording.NAMES, recording.NOTES)
        told = recording.write(source.trace, writer, Rule(), source.guest)
        writer.flush()
    names = VmNames(source.metadata)
    remarks = [f"{names.vms(ids)}: soft-hangs are not known: {why}" for why, ids in told.unjudged.items()]
    if told.clipped:
        remarks.append(f"{told.clipped:,} ns are left out: clocks of two CPUs differ, and spans would cross")
    return remarks
