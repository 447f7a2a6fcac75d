# SPDX-License-Identifier: Apache-2.0
"""When the host slept while it was recorded: boot time that passed for nobody.

CLOCK_BOOTTIME goes on while a host is suspended, CLOCK_MONOTONIC does not. `host_suspend` rows say between which times
that was; before format 1.2 the first and the last sample of the clocks say how much of it there was. A recording
without samples may show it all the same: no row of any VM for longer than a host's own watchdog lets a CPU stand still.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from traces.metadata import Metadata
from traces.reader import Trace, kind_codes
from traces.schema import BY_NAME

_LEAST: Final = 1_000_000  # ns: samples of two clocks lie as far apart as that where nothing slept
_WATCHDOG: Final = 20 * 10**9  # ns; Linux: twice watchdog_thresh (10 s)
_ROW: Final = BY_NAME["host_suspend"].code
_NEVER: Final = 1 << 62

Gap = tuple[int, int]


@dataclass(frozen=True)
class Suspend:
    """The host slept `slept` ns, in one piece, between two rows at `begin` and `end` (boot ns).

    `assumed`: nothing but the rows' silence says so. A guest may well run, or halt, that long without an exit; a vCPU
    that KVM handles an exit of may not.
    """

    begin: int
    end: int
    slept: int
    assumed: bool = False


def suspends(trace: Trace) -> tuple[Suspend, ...]:
    """In order of time. Rows are read only where there may have been one."""
    meta = trace.metadata
    told = bool(meta.kinds.get("host_suspend"))
    slept = _by_samples(meta)
    first, last = meta.span
    if not told and (slept == 0 or (slept is None and last - first < _WATCHDOG)):
        return ()
    rows, gaps = _read(trace, _LEAST if told or slept else _WATCHDOG)
    if told:
        found = [_placed(gaps, begin, end, ns) for begin, end, ns in rows]
        return tuple(sorted((each for each in found if each), key=lambda each: each.begin))
    if slept is None:
        return tuple(Suspend(begin, end, end - begin, assumed=True) for begin, end in gaps)
    one = _placed(gaps, first, last, slept)
    return (one,) if one is not None else ()


def _by_samples(meta: Metadata) -> int | None:
    """ns that the clocks' first and last sample say that the host slept; None: there are no two samples."""
    clock = meta.raw.get("clock")
    samples = clock.get("samples") if isinstance(clock, dict) else None
    ahead = [ns for sample in samples if (ns := _ahead(sample)) is not None] if isinstance(samples, list) else []
    if len(ahead) < 2:
        return None
    slept = ahead[-1] - ahead[0]
    return slept if slept >= _LEAST else 0


def _ahead(sample: Any) -> int | None:
    if not isinstance(sample, dict):
        return None
    boot, mono = sample.get("boot"), sample.get("mono")
    return boot - mono if isinstance(boot, int) and isinstance(mono, int) else None


def _placed(gaps: list[Gap], begin: int, end: int, slept: int) -> Suspend | None:
    """The longest time without a row between two times, where it is long enough for all of the sleep."""
    within = [(first, last) for first, last in gaps if last > begin and first < end and last - first >= slept]
    if not within or slept < _LEAST:
        return None
    first, last = max(within, key=lambda gap: gap[1] - gap[0])
    return Suspend(first, last, slept)


def _read(trace: Trace, least: int) -> tuple[list[tuple[int, int, int]], list[Gap]]:
    """`host_suspend` rows (addr, time, value), and the times of at least this many ns without a row of any VM."""
    rows: list[tuple[int, int, int]] = []
    gaps: list[Gap] | None = None
    told = bool(trace.metadata.kinds.get("host_suspend"))
    columns = ["time", "kind", "addr", "value"] if told else ["time"]
    for vm in trace.metadata.vms:
        mine = _gaps(_times(trace, int(vm["id"]), least), least)
        gaps = mine if gaps is None else _common(gaps, mine, least)
    if told:
        for batch in trace.batches(columns):
            at = np.flatnonzero(kind_codes(batch) == _ROW)
            for i in at.tolist():
                addr, time, value = (int(batch.column(name)[i].as_py()) for name in ("addr", "time", "value"))
                rows.append((addr, time, value))
    return rows, [(begin, end) for begin, end in gaps or [] if begin > -_NEVER and end < _NEVER]


def _times(trace: Trace, vm: int, least: int) -> Iterator[NDArray[np.int64]]:
    """The times of a VM's rows in order, part by part: only the first and last of what has no room for a gap."""
    for group in trace.groups(vm):
        if not trace.partial and group.last_time - group.first_time < least:
            yield np.array([group.first_time, group.last_time])
            continue
        for batch in trace.batches(["time"], vm=vm, seqs=(group.first_seq, group.last_seq)):
            yield batch.column("time").to_numpy()


def _gaps(parts: Iterator[NDArray[np.int64]], least: int) -> list[Gap]:
    """The times of a VM without a row, the time before its first and after its last among them."""
    found: list[Gap] = []
    last = -_NEVER
    for part in parts:
        if not len(part):
            continue
        times: NDArray[np.int64] = np.concatenate([[last], part])
        long = np.flatnonzero(np.diff(times) >= least)
        found += [(int(times[i]), int(times[i + 1])) for i in long]
        last = int(times[-1])
    return [*found, (last, _NEVER)]


def _common(ours: list[Gap], theirs: list[Gap], least: int) -> list[Gap]:
    """The parts that are in a gap of either list."""
    found: list[Gap] = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        begin, end = max(ours[i][0], theirs[j][0]), min(ours[i][1], theirs[j][1])
        if end - begin >= least:
            found.append((begin, end))
        if ours[i][1] < theirs[j][1]:
            i += 1
        else:
            j += 1
    return found
