# SPDX-License-Identifier: Apache-2.0
"""When the host was suspended while it was recorded: boot time in which no vCPU ran.

CLOCK_BOOTTIME advances while a host is suspended, CLOCK_MONOTONIC does not. `host_suspend` rows give the times; before
format 1.2 only the first and the last sample of both clocks give the total. A recording without samples may still show
a suspend: no VM has a row for longer than the host's own watchdog would let a CPU stand still.
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

_LEAST: Final = 1_000_000  # ns; samples of two clocks may differ by this much without a suspend
_WATCHDOG: Final = 20 * 10**9  # ns; Linux: twice watchdog_thresh (10 s)
_ROW: Final = BY_NAME["host_suspend"].code
_NEVER: Final = 1 << 62

Gap = tuple[int, int]


@dataclass(frozen=True)
class Suspend:
    """The host was suspended for `slept` ns, in one piece, between two rows at `begin` and `end` (boot clock, ns).

    `assumed` means that only the absence of rows says so. A guest may run, or halt, for that long without an exit; a
    vCPU whose exit KVM is handling may not.
    """

    begin: int
    end: int
    slept: int
    assumed: bool = False


def suspends(trace: Trace) -> tuple[Suspend, ...]:
    """Return the suspends in order of time. Rows are read only if there may have been one."""
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
    """Return the ns of suspend according to the first and last clock sample, or None if there are not two samples."""
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
    """Return a suspend in the longest gap between two times; None if no gap there is as long as the suspend."""
    within = [(first, last) for first, last in gaps if last > begin and first < end and last - first >= slept]
    if not within or slept < _LEAST:
        return None
    first, last = max(within, key=lambda gap: gap[1] - gap[0])
    return Suspend(first, last, slept)


def _read(trace: Trace, least: int) -> tuple[list[tuple[int, int, int]], list[Gap]]:
    """Return the `host_suspend` rows as (addr, time, value), and the gaps of at least `least` ns without a row."""
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
    """Yield the times of a VM's rows in order, in parts.

    A row group too short for a gap gives its first and last time only.
    """
    for group in trace.groups(vm):
        if not trace.partial and group.last_time - group.first_time < least:
            yield np.array([group.first_time, group.last_time])
            continue
        for batch in trace.batches(["time"], vm=vm, seqs=(group.first_seq, group.last_seq)):
            yield batch.column("time").to_numpy()


def _gaps(parts: Iterator[NDArray[np.int64]], least: int) -> list[Gap]:
    """Return the gaps between a VM's rows, including the time before its first and after its last row."""
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
    """Return the parts of gaps that are in both lists."""
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
