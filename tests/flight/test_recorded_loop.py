# SPDX-License-Identifier: Apache-2.0
"""The trigger `guest-share` over recordings of real kernels: a vCPU that loops on a fault.

This machine's own KVM shows neither entries nor faults. In the lab's recording the vCPU goes round in the kernel: an
exit for a fault in the nested page tables, an entry at the same instruction, and no other row between them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from operator import itemgetter
from pathlib import Path

import polars as pl
import pytest

from tests.flight.test_triggers import MS, in_batches
from tracer.flight.guest_share import GuestShare
from tracer.flight.vcpu_time import ENTRY, EXIT, KINDS, SCHED, Rows, idle_codes
from tracer.top.playback import to_records
from traces.reader import Trace

RECORDINGS = Path(__file__).parents[1] / "recordings"
T = 200 * MS
FAULT = 0x400  # SVM_EXIT_NPF


def recorded(name: str) -> Rows:
    frame = Trace.open(RECORDINGS / name).scan().filter(pl.col("kind").cast(pl.String).is_in(KINDS))
    return to_records(frame.sort("time").collect())


def documented(vendor: str) -> GuestShare:
    """`guest-share < 10% for 200ms`."""
    return GuestShare(0.1, T, idle_codes({"vendor": vendor}), time_of=lambda *_: (0, False))


def within(spans: list[tuple[int, int]], first: int, last: int) -> int:
    """The part of these spans, which are in order, that is between two moments."""
    begun = bisect_left(spans, last, key=itemgetter(0))
    over = bisect_right(spans, first, key=itemgetter(1))
    return sum(min(end, last) - max(begin, first) for begin, end in spans[over:begun])


def first_hang(rows: Rows) -> int:
    """When the vCPU had been in its guest for less than 9 % of what was busy of the T before, at each ms for T / 8."""
    stays, off, since = [], [], 0
    for kind, time, gone in rows[["kind", "time", "w0"]].tolist():
        if kind == ENTRY:
            since = time
        elif kind == EXIT and since:
            stays.append((since, time))
            since = 0
        elif kind == SCHED and not since:
            off.append((gone, time))
    lasting = 0
    for at in range(int(rows["time"][0]) + T, int(rows["time"][-1]), MS):
        busy = T - within(off, at - T, at)
        low = busy > 0.6 * T and within(stays, at - T, at) < 0.09 * busy
        lasting = lasting + 1 if low else 0
        if lasting * MS > T // 8:  # it is judged at each eighth of T
            return at
    raise AssertionError("it never hangs")


@pytest.mark.slow
def test_a_vcpu_that_loops_on_a_fault_triggers_within_twice_its_time() -> None:
    rows = recorded("lost-idt-livelock-7.x.parquet")
    exits = rows[rows["kind"] == EXIT]
    assert (exits["w0"] == FAULT).mean() > 0.9, "that is what it does"
    rows = rows[rows["time"] <= exits["time"][0] + 5000 * MS]  # the plain reference looks at each ms
    hangs = first_hang(rows)
    for step in (1, 7, 100):
        found = in_batches(documented("AuthenticAMD"), rows[rows["time"] <= hangs + T], range(0, len(rows), step))
        assert found, "T after the time T in which it hung"
        assert "in the guest for" in found[0].text


def test_the_time_before_it_loops_so_triggers_nothing() -> None:
    """Until then the guest's own part is more."""
    rows = recorded("lost-idt-livelock-7.x.parquet")
    rows = rows[rows["time"] <= rows["time"][0] + 5000 * MS]
    hangs = first_hang(rows)
    before = rows[rows["time"] < hangs - T]
    assert before["time"][-1] - before["time"][0] > 4 * T
    assert in_batches(documented("AuthenticAMD"), before, range(0, len(before), 50)) == []
