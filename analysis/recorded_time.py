"""A recording's time: what each vCPU did in each part of it, and where it hardly ran its guest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from analysis.units import duration
from replay.decode.capabilities import Evidence
from replay.decode.lookback import Ints, Rows
from replay.run import has_ad_disabled
from replay.timing.stalls import Rule, Stall, stalls
from replay.timing.timed_run import Measured
from replay.timing.timeline import Doing, Spans, Timeline
from traces.errors import Problem
from traces.reader import Trace

_COLUMNS: Final = ("seq", "time", "vcpu", "tid", "kind", "root", "role", "code", "rip", "flags")
_IDS: Final = 1 << 15  # vCPU ids are int16 in a trace
_STEP: Final = 1_000_000  # ns between two moments of a vCPU's progress


def ids_of(vm: Mapping[str, Any]) -> list[int]:
    """A VM's vCPUs by their recorded ids; a place in it is a vCPU's dense number."""
    return sorted({int(vcpu["id"]) for vcpu in vm["vcpus"]})


def rows_of(trace: Trace, vm: Mapping[str, Any]) -> Iterator[Rows]:
    """One VM's rows, batch by batch. Raises Problem where a row's time or vCPU cannot be."""
    ids = ids_of(vm)
    if ids and ids[-1] >= _IDS:
        raise Problem(f"{trace.path}: VM {vm['id']} has a vCPU {ids[-1]}, which no row can name")
    numbers = np.full(_IDS + 1, -1, np.int32)
    numbers[ids] = np.arange(len(ids))
    for batch in trace.batches(_COLUMNS, vm=int(vm["id"])):
        rows = Rows(batch, numbers)
        if len(rows) and int(rows.time.min()) < 0:
            raise Problem(f"{trace.path}: damaged: VM {vm['id']} has rows before the clock began")
        yield rows


@dataclass(frozen=True)
class Switch:
    """ns of an exit and entry, which a recording shows as guest time; `least`: what it may be, `ns` being the most."""

    ns: int
    least: int

    @property
    def text(self) -> str:
        return duration(self.ns) + (
            f" (the most that it can be; the least is {duration(self.least)})" if self.open else ""
        )

    @property
    def open(self) -> bool:
        return self.least < self.ns


def switch_of(trace: Trace, vm: Mapping[str, Any]) -> Switch:
    """The switch as a replay takes it; Problem if it cannot."""
    evidence = Evidence(trace)
    measured = Measured(evidence, vm, has_ad_disabled(evidence))
    if measured.refused:
        raise Problem(measured.refused)
    ns = measured.fitted.costs.switch
    return Switch(ns, ns - measured.fitted.open)


class Progress:
    """One vCPU's progress at moments a ms or more apart: boot ns, and ns in the guest until then."""

    def __init__(self, switch: Switch) -> None:
        self._switch = switch.ns
        self._guest = 0
        self._times: list[Ints] = []
        self._ran: list[Ints] = []

    def note(self, end: Ints, ns: Ints, guest: NDArray[np.bool_]) -> None:
        """Spans in order: when they end, how long they are, which are the guest's."""
        ran = self._guest + np.cumsum(np.where(guest, np.maximum(ns - self._switch, 0), 0))
        self._guest = int(ran[-1])
        last = np.append(np.diff(end // _STEP) != 0, True)
        self._times.append(end[last])
        self._ran.append(ran[last])

    def stalls(self, rule: Rule) -> list[Stall]:
        """The soft-hangs in it."""
        if not self._times:
            return []
        return stalls(np.concatenate(self._times), np.concatenate(self._ran), rule)


def spans_of(trace: Trace, vm: Mapping[str, Any]) -> Iterator[Spans]:
    """What a VM's vCPUs did, as a replay splits it: up to the VM's end."""
    timeline = Timeline(len(ids_of(vm)))
    for rows in rows_of(trace, vm):
        ends = rows.of("vm_destroy")
        yield timeline.feed(rows.cut(int(ends[0]) + 1) if len(ends) else rows)
        if len(ends):
            return


def split(trace: Trace, vm: Mapping[str, Any], first: int, width: int, count: int) -> NDArray[np.int64]:
    """ns by vCPU (dense), part of the time (`count` of `width` ns each, from `first`), and Doing."""
    found = np.zeros((len(ids_of(vm)), count + 1, len(Doing)), np.int64)
    whole = np.zeros_like(found)  # in parts that a span fills: +1 where they begin, -1 behind them
    for spans in spans_of(trace, vm):
        end = np.clip(spans.time - first, 0, width * count)
        begin = np.clip(spans.time - spans.ns - first, 0, width * count)
        vcpu, doing = spans.vcpu, spans.doing
        one, other = begin // width, end // width
        same = one == other
        np.add.at(found, (vcpu[same], one[same], doing[same]), (end - begin)[same])
        far = ~same
        vcpu, doing, one, other = vcpu[far], doing[far], one[far], other[far]
        np.add.at(found, (vcpu, one, doing), (one + 1) * width - begin[far])
        np.add.at(found, (vcpu, other, doing), end[far] - other * width)
        np.add.at(whole, (vcpu, one + 1, doing), 1)
        np.add.at(whole, (vcpu, other, doing), -1)
    found += np.cumsum(whole, axis=1) * width
    return found[:, :count]
