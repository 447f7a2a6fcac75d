# SPDX-License-Identifier: Apache-2.0
"""FlightTriggers against event-at-a-time references: the same alarms, however the rows are cut into batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.flight.rows import KVM, row
from tests.profiles import examples
from tracer.flight import counting
from tracer.flight.alarms import Alarm, Detector
from tracer.flight.guest_share import GuestShare
from tracer.flight.trigger_texts import TRIGGERS, FlightTriggers
from traces.errors import Problem
from traces.record import RECORD
from traces.schema import BY_NAME

HLT = 0x78
MS = 10**6
ALL = frozenset(BY_NAME)

Rows = np.ndarray[Any, Any]


def stream(rows: Iterable[Rows]) -> Rows:
    return np.concatenate([np.empty(0, RECORD), *rows])


def in_batches(detector: Detector, rows: Rows, cuts: Iterable[int]) -> list[Alarm]:
    """All alarms, with the rows given in parts that end at these places."""
    found, first = [], 0
    for cut in [*sorted(min(cut, len(rows)) for cut in cuts), len(rows)]:
        if cut > first:
            found += detector.see(rows[first:cut])
            found += detector.now(int(rows["time"][cut - 1]))
            first = cut
    return found


def on_vcpu(kind: str, time: int, vcpu: int = 0, **fields: int) -> Rows:
    return row(kind, time, kvm=KVM, vcpu=vcpu, tid=100 + vcpu, tgid=7, **fields)


def running(begin: int, end: int, period: int, guest: float, vcpu: int = 0) -> list[Rows]:
    """A vCPU that enters each `period` ns and stays for a part of it."""
    made = []
    for at in range(begin, end, period):
        made += [on_vcpu("kvm_entry", at, vcpu), on_vcpu("kvm_exit", at + int(period * guest), vcpu, w0=0x400)]
    return made


def halted(begin: int, end: int, vcpu: int = 0) -> list[Rows]:
    return [on_vcpu("kvm_exit", begin, vcpu, w0=HLT), on_vcpu("kvm_entry", end, vcpu)]


def off(begin: int, end: int, state: int, waited: int = 0, vcpu: int = 0) -> list[Rows]:
    """A thread that had no CPU."""
    return [on_vcpu("sched_in", end, vcpu, w0=begin, w1=waited, w2=state)]


def share(**more: Any) -> GuestShare:
    return GuestShare(0.1, 100 * MS, (HLT,), **{"time_of": lambda *_: (0, False), **more})


HANGS = {
    "faults all the time": running(0, 400 * MS, MS, 0.9) + running(400 * MS, 900 * MS, MS, 0.02),
    "comes back to its VMM all the time": [
        each
        for at in range(0, 500 * MS, MS)
        for each in (
            on_vcpu("kvm_entry", at),
            on_vcpu("kvm_exit", at + 9000, w0=0x400),
            on_vcpu("kvm_userspace_exit", at + MS // 2),
        )
    ],
    "held up by the host's disk": running(0, 200 * MS, MS, 0.9)
    + [
        each
        for at in range(200 * MS, 600 * MS, 10 * MS)
        for each in (*running(at, at + MS // 2, MS, 0.2), *off(at + MS, at + 9 * MS, state=2))
    ],
}
HEALTHY = {
    "in the guest": running(0, 900 * MS, MS, 0.9),
    "idle": [each for at in range(0, 900 * MS, 10 * MS) for each in halted(at, at + 10 * MS - 1)],
    "idle but for work that is all the host's": [
        each for at in range(0, 900 * MS, 10 * MS)
        for each in (*halted(at, at + 8 * MS), on_vcpu("kvm_exit", at + 8 * MS + 10, w0=0x400),
                     on_vcpu("kvm_entry", at + 9 * MS))
    ],
    "asleep in its VMM": running(0, 50 * MS, MS, 0.9) + [
        each for at in range(50 * MS, 900 * MS, 20 * MS)
        for each in (on_vcpu("kvm_userspace_exit", at), *off(at + 1000, at + 19 * MS, state=1),
                     on_vcpu("kvm_entry", at + 19 * MS + 500),
                     on_vcpu("kvm_exit", at + 19 * MS + 9000, w0=0x400))
    ],
    "starved by others": [
        each for at in range(0, 900 * MS, 20 * MS)
        for each in (on_vcpu("kvm_entry", at), on_vcpu("kvm_exit", at + MS, w0=0x60),
                     *off(at + MS, at + 20 * MS - 1, state=0, waited=19 * MS))
    ],
    "on a kernel that shows no entries": [
        each for at in range(0, 900 * MS, MS)
        for each in (on_vcpu("kvm_userspace_exit", at), *off(at + 1000, at + 5000, state=1))
    ],
    "paused for long": [
        *running(0, 50 * MS, MS, 0.9), *off(51 * MS, 5000 * MS, state=1), *running(5001 * MS, 5300 * MS, MS, 0.9),
    ],
}  # fmt: skip


@pytest.mark.parametrize("what", HANGS)
@examples(10)
@given(cuts=st.lists(st.integers(0, 3000), max_size=6))
def test_a_hang_is_found_within_twice_its_time_however_the_rows_come(what: str, cuts: list[int]) -> None:
    rows = stream(HANGS[what])
    began = {"comes back to its VMM all the time": 0, "held up by the host's disk": 200 * MS}.get(what, 400 * MS)
    (alarm,) = in_batches(share(), rows, cuts)
    assert "vCPU 0 of process 7" in alarm.text
    until = rows[rows["time"] <= began + 200 * MS]
    assert in_batches(share(), until, []), "within 2 x T"
    assert not in_batches(share(), rows[rows["time"] < began + 50 * MS], []), "and not at once"


@pytest.mark.parametrize("what", HEALTHY)
@examples(10)
@given(cuts=st.lists(st.integers(0, 3000), max_size=6))
def test_a_healthy_vcpu_triggers_nothing(what: str, cuts: list[int]) -> None:
    assert in_batches(share(), stream(HEALTHY[what]), cuts) == []


def test_a_hang_is_told_again_after_it_was_over() -> None:
    rows = running(0, 300 * MS, MS, 0.02) + running(300 * MS, 600 * MS, MS, 0.9) + running(600 * MS, 900 * MS, MS, 0.02)
    assert len(in_batches(share(), stream(rows), range(0, 2000, 100))) == 2


def test_one_vcpus_hang_is_not_another_ones() -> None:
    rows = stream(running(0, 300 * MS, MS, 0.9, vcpu=0) + running(0, 300 * MS, MS, 0.02, vcpu=1))
    rows = rows[np.argsort(rows["time"], kind="stable")]
    (alarm,) = in_batches(share(), rows, range(0, 1200, 7))
    assert alarm.text.startswith("vCPU 1 of process 7: in the guest for 2.0% of 100 ms")
    assert alarm.severity == pytest.approx(0.98)


@pytest.mark.parametrize(
    ("works", "held_up", "alarms"), [(1.0, False, 1), (0.0, True, 1), (0.0, False, 0)], ids=["runs", "disk", "sleeps"]
)
def test_a_vcpu_that_shows_nothing_is_looked_up(works: float, held_up: bool, alarms: int) -> None:
    """A thread that works in the kernel for ever has no row; one that sleeps there is none of ours."""
    clock, looks = [0], []

    def time_of(tgid: int, tid: int) -> tuple[int, bool]:
        looks.append((tgid, tid))
        return int(clock[0] * works), held_up

    detector = share(time_of=time_of)
    detector.see(stream(running(0, 200 * MS, MS, 0.9)))
    found: list[Alarm] = []
    for at in range(200 * MS, 3000 * MS, 5 * MS):
        clock[0] = at
        found += detector.now(at)
        assert bool(found) == bool(alarms and at >= 299 * MS + 13 * MS) or at < 320 * MS
    assert len(found) == alarms
    assert set(looks) == {(7, 100)}
    assert len(looks) <= 10, "not over and over"


def test_a_vcpu_in_its_guest_is_left_alone() -> None:
    def time_of(*_: int) -> tuple[int, bool]:
        raise AssertionError("nothing to look up")

    detector = share(time_of=time_of)
    detector.see(stream([on_vcpu("kvm_exit", 1, w0=0x400), on_vcpu("kvm_entry", 2)]))
    detector.see(stream(halted(5, 6, vcpu=1)[:1]))
    assert all(not detector.now(at) for at in range(0, 3000 * MS, 5 * MS))


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0, 1])), max_size=60),
    st.lists(st.integers(0, 60), max_size=6),
    st.integers(0, 8),
)
def test_rates_are_those_of_counting_one_by_one(gaps: list[tuple[int, int]], cuts: list[int], limit: int) -> None:
    """Over the eight parts of the time that end with the row's own."""
    time, parts, alarmed, expected = 0, {0: list[int](), 1: list[int]()}, set[int](), 0
    rows = []
    for gap, vm in gaps:
        time += gap
        rows.append(row("kvm_page_fault", time, kvm=KVM + vm, vcpu=0, tgid=7))
        parts[vm].append(time // 10)
        many = sum(part > time // 10 - 8 for part in parts[vm]) > limit
        expected += many and vm not in alarmed
        (alarmed.add if many else alarmed.discard)(vm)
    detector = counting.RowRate("faults", "page faults", counting.faults, limit, 80)
    found = [each for at in range(len(rows)) for each in detector.see(rows[at])]
    assert len(found) == expected
    whole = counting.RowRate("faults", "page faults", counting.faults, limit, 80)
    batched = []
    first = 0
    for cut in [*sorted(cuts), len(rows)]:
        batched += whole.see(stream(rows[first : max(cut, first)]))
        first = max(cut, first)
    assert bool(batched) == bool(found)


@given(
    st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([5, 6])), max_size=60),
    st.lists(st.integers(0, 60), max_size=6),
    st.integers(1, 5),
)
def test_runs_of_the_same_are_those_of_counting_one_by_one(
    faults: list[tuple[int, int]], cuts: list[int], limit: int
) -> None:
    runs: dict[int, tuple[int, int]] = {}
    expected = set()
    rows = []
    for time, (vcpu, gfn) in enumerate(faults):
        rows.append(on_vcpu("kvm_page_fault", time, vcpu, w0=gfn << 12))
        before, count = runs.get(vcpu, (0, 0))
        runs[vcpu] = (gfn, count + 1 if before == gfn else 1)
        if runs[vcpu][1] > limit:
            expected.add((vcpu, gfn))
    detector = counting.SameFault("same-gfn", lambda rows: rows["w0"] >> np.uint64(12), limit)
    found = in_batches(detector, stream(rows), cuts)
    assert {int(alarm.text.split()[1]) for alarm in found} == {vcpu for vcpu, _ in expected}
    assert all(alarm.severity > limit for alarm in found)


@given(
    st.lists(st.tuples(st.integers(1, 2), st.integers(1, 30)), max_size=20), st.lists(st.integers(0, 60), max_size=6)
)
def test_zaps_that_take_too_long_are_told_once_each(zaps: list[tuple[int, int]], cuts: list[int]) -> None:
    rows, time = [], {1: 0, 2: 0}
    for tid, took in zaps:
        rows.append(row("zap_root_begin", time[tid] + 1, tid=tid, tgid=7, kvm=KVM))
        rows.append(row("zap_root_end", time[tid] + 1 + took, tid=tid, tgid=7, kvm=KVM))
        time[tid] += took + 5
    given = stream(rows)
    given = given[np.argsort(given["time"], kind="stable")]
    found = in_batches(counting.LongZap(10), given, cuts)
    assert len(found) == sum(took > 10 for _, took in zaps)


def test_a_zap_that_does_not_end_is_told_while_it_lasts() -> None:
    detector = counting.LongZap(10 * MS)
    assert detector.see(row("zap_root_begin", MS, tid=1, tgid=7)) == []
    assert detector.now(5 * MS) == []
    (alarm,) = detector.now(12 * MS)
    assert alarm.text == "process 7: a zap of roots takes 11.0 ms"
    assert detector.now(13 * MS) == []
    assert detector.see(row("zap_root_end", 20 * MS, tid=1, tgid=7)) == []


def test_failures_of_kvm_run_and_not_interruptions() -> None:
    rows = stream([
        row("kvm_userspace_exit", 1, kvm=KVM, n=-4, w0=17), row("kvm_userspace_exit", 2, kvm=KVM, n=0, w0=6),
        row("kvm_userspace_exit", 3, kvm=KVM, n=-14, w0=0), row("kvm_userspace_exit", 4, kvm=KVM, n=0, w0=17),
    ])  # fmt: skip
    assert counting.errors(rows).tolist() == [False, False, True, True]


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: trigger.name)
def test_each_is_understood_as_its_example_is_written(trigger: Any) -> None:
    FlightTriggers([trigger.example], ALL)
    with pytest.raises(Problem, match=f"looks at {trigger.kinds[0]}, which these --events do not have"):
        FlightTriggers([trigger.example], frozenset())


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "not a trigger; they are 'guest-share < 10% for 200ms'"),
        ("hang", "not a trigger"),
        ("hang > 3", "not a trigger"),
        ("guest-share > 10%", "write it like 'guest-share < 10% for 200ms'"),
        ("guest-share < 10", "write it like"),
        ("roots > 10%", "write it like"),
        ("roots > 1.2.3/s", "write it like"),
        ("zap > 5", "write it like"),
        ("zap > 50ms for 1s", "write it like"),
        ("roots > 10/s for ever", "ever is not a time"),
        ("guest-share < 10% for 1ms", "1ms is not a time of 10 ms or more"),
    ],
)
def test_what_is_no_trigger_is_one_line(expression: str, said: str) -> None:
    with pytest.raises(Problem) as caught:
        FlightTriggers([expression], ALL)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
