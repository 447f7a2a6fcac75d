# SPDX-License-Identifier: Apache-2.0
"""Waits for mmu_lock, found in recorded spans."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.decode.spans.vcpu_states import VcpuState
from replay.timing.measuring.lock_waits import LockWaits
from traces.schema import BY_NAME

EXIT, FAULT, REQUESTED, SET, ENTRY = (
    BY_NAME[name].code
    for name in ("kvm_exit", "kvm_page_fault", "kvm_mmu_spte_requested", "kvm_mmu_set_spte", "kvm_entry")
)


class Rows:
    """Faults as (vCPU, exit, requested, set, entry): their rows in order of time, and the spans that end with them."""

    def __init__(self, *faults: tuple[int, int, int, int, int]) -> None:
        rows = []
        for vcpu, out, requested, done, back in faults:
            rows += [
                (out, vcpu, FAULT, EXIT, 0),
                (requested, vcpu, REQUESTED, FAULT, requested - out),
                (done, vcpu, SET, REQUESTED, done - requested),
                (back, vcpu, ENTRY, SET, back - done),
            ]
        time, vcpu_, kind, before, ns = np.array(sorted(rows), np.int64).T.copy()
        self.batch = SimpleNamespace(time=time, vcpu=vcpu_.astype(np.int32), kind=kind.astype(np.uint8))
        self.state = np.full(len(time), VcpuState.FAULT, np.uint8)
        self.before, self.ns = before.astype(np.uint8), ns.copy()

    def without_waits(self, found: LockWaits) -> Any:
        found.feed(self.batch, self.state, self.ns, self.before)
        return self.ns


MEETING = ((0, 0, 10, 40, 50), (1, 5, 45, 70, 80), (0, 100, 110, 130, 140), (1, 135, 150, 160, 170))


def test_a_wait_is_what_another_has_the_lock_for() -> None:
    """vCPU 1 exits at 5 and asks at 45, while vCPU 0 holds from 10 to 40; later they do not meet."""
    found, rows = LockWaits(2, exclusive=True), Rows(*MEETING)
    before = rows.ns.sum()
    after = rows.without_waits(found)
    assert found.waited.tolist() == [0, 30]
    assert before - after.sum() == 30
    assert (found.held, found.faults) == (30 + 25 + 20 + 10, 4)


@pytest.mark.parametrize(("vcpus", "exclusive"), [(2, False), (1, True)])
def test_faults_that_share_the_lock_do_not_wait(vcpus: int, exclusive: bool) -> None:
    found = LockWaits(vcpus, exclusive)
    rows = Rows(*MEETING) if vcpus == 2 else Rows((0, 0, 10, 40, 50))
    before = rows.ns.copy()
    assert (rows.without_waits(found) == before).all()
    assert not found.waited.any()
    assert found.faults == len(before) // 4


HOLDS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=10)


@given(holds=HOLDS, begin=st.integers(0, 300), length=st.integers(0, 100))
def test_a_wait_is_counted_ns_by_ns(holds: list[tuple[int, int]], begin: int, length: int) -> None:
    """vCPU 0 has the lock again and again; vCPU 1 faults at some moment, and asks at another."""
    now, faults, held = 0, [], set[int]()
    for gap, hold in holds:
        begins = now + gap
        faults.append((0, now, begins, begins + hold, begins + hold))
        held |= set(range(begins, begins + hold))
        now = begins + hold
    end = max(begin + length, now)  # it asks when the lock is free
    found = LockWaits(2, exclusive=True)
    Rows(*faults, (1, begin, end, end + 1, end + 2)).without_waits(found)
    assert found.waited[1] == sum(begin <= at < end for at in held)
