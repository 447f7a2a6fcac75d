# SPDX-License-Identifier: Apache-2.0
"""Which pictures a report has: Vega-Lite charts over frames of a few thousand rows at most.

A chart's `width` is "container": the page that embeds it puts a number there. The page also sets the colours of text
and lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from analysis.report_model.picture import Picture
from analysis.report_model.recorded_charts import every_vcpu, heat, lives, timeline
from analysis.report_model.replayed_charts import fills, refills, shares
from analysis.report_model.report import Report
from traces.errors import Problem

VMS: Final = 8  # VMs that have pictures, at most


def pictures(report: Report) -> tuple[list[Picture], list[str]]:
    """Return the pictures that can be drawn of a report's sources, and the reasons why others cannot be."""
    drawn_: list[Picture] = list(report.drawn)
    lacking: list[str] = []
    for make in _makers(report):
        try:
            picture = make()
        except Problem as problem:
            if str(problem) not in lacking:
                lacking.append(str(problem))
            continue
        if picture is not None:
            drawn_.append(picture)
    return drawn_, lacking


def _makers(report: Report) -> Iterator[Callable[[], Picture | None]]:
    recording, result = report.recording, report.result
    vms = drawn_vms(report)
    if recording is not None:
        for vm in vms:
            yield partial(timeline, recording, vm)
            yield partial(every_vcpu, recording, vm)
            yield partial(lives, recording, vm)
    if result is not None and result.timed:
        yield from (partial(shares, result, vm) for vm in vms or (None,))
    if result is not None:
        yield lambda: refills(result)
    elif recording is not None:
        yield lambda: fills(recording)
    if recording is not None:
        for vm in vms:
            yield partial(heat, recording, vm)


def drawn_vms(report: Report) -> list[int]:
    """The VMs that pictures are made of: the worst ones, in the order of the report's table of VMs."""
    if report.recording is None:
        return []
    order = next((table.frame["vm"].to_list() for table in report.tables if table.query == "overview"), None)
    if order is None:
        order = [int(vm["id"]) for vm in report.recording.metadata.vms]
    return [vm for vm in order if vm in report.recording.spans][:VMS]
