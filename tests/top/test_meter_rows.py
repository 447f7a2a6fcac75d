# SPDX-License-Identifier: Apache-2.0
"""The compiled meters against a reference that takes one event at a time, of streams that lie in several rings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.flight.rows import KVM, Rows, row
from tracer.top.meter import Meters
from tracer.top.meter_rows import EXIT_EDGES, METERED, MeterRows
from traces.record import RECORD

MS, SECOND = 10**6, 10**9
HLT = 0x78
RING = np.dtype([("header", "u8"), ("record", RECORD)])


@dataclass
class OneVcpu:
    """What the reference knows of a vCPU."""

    last: int
    state: str = "out"
    left: int | None = None
    counts: Counter[str] = field(default_factory=Counter)
    gfns: dict[int, int] = field(default_factory=dict)  # the second of the last fault on each


def reference(rows: list[Any], seconds: list[int]) -> dict[tuple[int, int], Counter[str]]:
    """What each vCPU has counted by the end of the rows; `seconds` are the second that each row is in."""
    known: dict[tuple[int, int], OneVcpu] = {}

    def take(one: Any, second: int) -> None:
        key, kind, time = (int(one["kvm"]), int(one["vcpu"])), NAMES[int(one["kind"])], int(one["time"])
        vcpu = known.setdefault(key, OneVcpu(time))
        counts = vcpu.counts
        counts["shown"] = time
        if kind == "kvm_page_fault":
            gfn = int(one["w0"]) >> 12
            counts["faults"] += 1
            counts["refaults"] += gfn in vcpu.gfns and second - vcpu.gfns[gfn] < 5
            vcpu.gfns[gfn] = second
            return
        passed = time - vcpu.last
        if vcpu.state != "out":
            counts[vcpu.state] += passed
        elif kind == "sched_in":
            off = min(max(time - int(one["w0"]), 0), passed)
            waited = min(int(one["w1"]), off)
            counts["steal"] += waited
            counts["idle"] += 0 if int(one["w2"]) & 2 else off - waited
        vcpu.last = time
        if kind == "kvm_entry":
            if vcpu.left is not None:
                took = time - vcpu.left
                counts[f"took {np.searchsorted(EXIT_EDGES, took)}"] += 1
                counts["out"] += took
                counts["longest"] = max(counts["longest"], took)
            vcpu.left, vcpu.state = None, "guest"
        elif kind == "kvm_exit":
            halted = int(one["w0"]) == HLT
            vcpu.left, vcpu.state = None if halted else time, "idle" if halted else "out"
        elif kind == "kvm_userspace_exit":
            vcpu.state = "out"
            counts["exits"] += 1

    for one, second in zip(rows, seconds, strict=True):
        take(one, second)
    return {key: vcpu.counts for key, vcpu in known.items()}


NAMES: dict[int, str] = {}
KINDS = ("kvm_entry", "kvm_exit", "kvm_userspace_exit", "sched_in", "kvm_page_fault")
for each in KINDS:
    NAMES[int(row(each, 0)["kind"][0])] = each

events = st.tuples(
    st.integers(0, 3),  # ring
    st.integers(0, 2),  # VM
    st.integers(0, 4),  # vCPU
    st.sampled_from(KINDS),
    st.integers(1, 40 * MS),  # ns since the event before
    st.integers(0, 3),  # what it is about
)


def stream(drawn: list[Any]) -> list[tuple[int, Rows]]:
    """(ring, row) in the order of time."""
    made, at = [], SECOND
    for ring, vm, vcpu, kind, after, what in drawn:
        at += after
        words = {
            "kvm_exit": {"w0": HLT if what == 0 else 0x400},
            "sched_in": {"w0": at - what * 10 * MS, "w1": what * 3 * MS, "w2": what},
            "kvm_page_fault": {"w0": what << 12},
        }.get(kind, {})
        made.append((ring, row(kind, at, kvm=KVM + vm * 4096, vcpu=vcpu, tid=vcpu, tgid=vm, **words)))
    return made


def in_ring(rows: list[Rows]) -> Rows:
    """Rows as a ring has them, each behind a header."""
    slots = np.zeros(len(rows), RING)
    for at, one in enumerate(rows):
        slots[at : at + 1]["record"] = one
    return slots["record"]


@given(st.lists(events, min_size=1, max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_rows_that_lie_in_rings_count_as_one_by_one(drawn: list[Any], cuts: list[int]) -> None:
    made = stream(drawn)
    meters = MeterRows(np.array([HLT], np.uint64))
    rings = [in_ring([one for ring, one in made if ring == number]) for number in range(4)]
    taken = [0] * 4
    for cut in [*sorted(min(cut, len(made) - 1) for cut in cuts), len(made) - 1]:
        until = int(made[cut][1]["time"][0])
        counts = meters.take([ring[at:] for ring, at in zip(rings, taken, strict=True)], until)
        taken = [at + more for at, more in zip(taken, counts, strict=True)]
        assert sum(taken) == cut + 1, "all up to there, and no other"
    expected = reference([one[0] for _, one in made], [0] * len(made))
    vcpus, took = meters.vcpus(), meters.exits_took()
    assert {(int(one["kvm"]), int(one["vcpu"])) for one in vcpus} == expected.keys()
    for place, one in enumerate(vcpus):
        counts = expected[int(one["kvm"]), int(one["vcpu"])]
        names = ("guest", "idle", "steal", "longest", "faults", "refaults", "exits", "out", "shown")
        assert {name: int(one[name]) for name in names} == {name: counts[name] for name in names}
        assert took[place].tolist() == [counts[f"took {edge}"] for edge in range(len(EXIT_EDGES) + 1)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=300), st.data())
def test_a_fault_is_one_again_for_five_seconds_whoever_goes_meanwhile(faults: list[Any], data: st.DataObject) -> None:
    """vCPUs that are forgotten change the others' places, and what is remembered moves with them."""
    meters = MeterRows(np.array([HLT], np.uint64))
    known: dict[tuple[int, int], int] = {}
    again: Counter[int] = Counter()
    second, at = 0, SECOND
    for vcpu, gfn in faults:
        at += 1
        again[vcpu] += second - known.get((vcpu, gfn), -9) < 5
        known[vcpu, gfn] = second
        meters.take([row("kvm_page_fault", at, kvm=KVM, vcpu=vcpu, w0=gfn << 12)], at)
        assert {int(one["vcpu"]): int(one["refaults"]) for one in meters.vcpus()} == dict(again)
        if data.draw(st.integers(0, 9)) == 0:
            gone = data.draw(st.sets(st.integers(0, 3)))
            meters.keep(~np.isin(meters.vcpus()["vcpu"], list(gone)))
            second += 1
            known = {key: when for key, when in known.items() if key[0] not in gone}
            again = Counter({int(one["vcpu"]): 0 for one in meters.vcpus()})


@pytest.mark.parametrize("vcpus", [1, 64, 65, 1000])
def test_as_many_vcpus_as_there_are(vcpus: int) -> None:
    meters = MeterRows(np.array([HLT], np.uint64))
    rows = np.concatenate([row("kvm_page_fault", number, kvm=KVM, vcpu=number % vcpus, w0=number << 12)
                           for number in range(3 * vcpus)])  # fmt: skip
    assert meters.take([rows], SECOND) == [len(rows)]
    assert meters.vcpus()["faults"].tolist() == [3] * vcpus
    assert meters.vcpus().dtype == METERED
    meters.keep(np.ones(vcpus, np.bool_))
    assert not meters.vcpus()["faults"].any()


def test_many_faults_on_other_pages_are_remembered() -> None:
    meters = MeterRows(np.array([HLT], np.uint64))
    rows = np.repeat(row("kvm_page_fault", 5, kvm=KVM, vcpu=0), 5000)
    rows["w0"] = np.arange(5000) << 12
    for again in (0, 5000):
        meters.take([rows], SECOND)
        assert meters.vcpus()["refaults"].tolist() == [again]


def test_a_stream_and_its_seconds_end_without_rows() -> None:
    meters = Meters((HLT,))
    meters.see(np.empty(0, RECORD))
    assert meters.second(SECOND) == []
    assert meters.second(2 * SECOND) == []
