"""Waits for mmu_lock, found in recorded spans."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.timing.lock_waits import Contended, _within
from replay.timing.timeline import Doing, Spans
from traces.schema import BY_NAME

ENTRY, EXIT, FAULT, REQUESTED, SET = (
    BY_NAME[name].code
    for name in ("kvm_entry", "kvm_exit", "kvm_page_fault", "kvm_mmu_spte_requested", "kvm_mmu_set_spte")
)


def faults(*rows: tuple[int, int, int, int, int]) -> Spans:
    """Faults as (vCPU, exit, requested, set, entry): the spans of their rows, by vCPU and in order."""
    spans = []
    for vcpu, out, requested, done, back in sorted(rows):
        moments = [(EXIT, FAULT, out, out), (FAULT, REQUESTED, out, requested), (REQUESTED, SET, requested, done)]
        moments.append((SET, ENTRY, done, back))
        spans += [(vcpu, before, kind, begin, end) for before, kind, begin, end in moments]
    vcpu, before, kind, begin, end = np.array(spans, np.int64).T
    none = np.zeros(len(vcpu), np.int64)
    still = none.astype(np.bool_)
    doing = np.full(len(vcpu), Doing.FAULT, np.uint8)
    return Spans(
        vcpu.astype(np.int32), none, end, end - begin, doing, kind.astype(np.uint8), before.astype(np.uint8), none,
        still, still, still,
    )  # fmt: skip


TWO = faults((0, 0, 10, 40, 50), (1, 5, 45, 70, 80), (0, 100, 110, 130, 140), (1, 135, 150, 160, 170))


def test_a_wait_is_what_another_has_the_lock_for() -> None:
    """vCPU 1 exits at 5 and asks at 45, while vCPU 0 holds from 10 to 40; later they do not meet."""
    found = Contended(2, exclusive=True)
    after = found.purge(TWO)
    assert found.waited.tolist() == [0, 30]
    assert TWO.ns.sum() - after.ns.sum() == 30
    assert (found.held, found.faults) == (30 + 25 + 20 + 10, 4)


@pytest.mark.parametrize(("vcpus", "exclusive"), [(2, False), (1, True)])
def test_faults_that_share_the_lock_do_not_wait(vcpus: int, exclusive: bool) -> None:
    found = Contended(vcpus, exclusive)
    spans = TWO if vcpus == 2 else faults((0, 0, 10, 40, 50))
    assert found.purge(spans) is spans
    assert not found.waited.any()
    assert found.faults == len(spans.ns) // 4


STRETCHES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=10)


@given(gaps=STRETCHES, until=st.integers(0, 500))
def test_what_has_passed_until_a_moment_is_counted_ns_by_ns(gaps: list[tuple[int, int]], until: int) -> None:
    ends, lengths, now, passed = [], [], 0, 0
    for gap, length in gaps:
        passed += max(min(until, now + gap + length) - (now + gap), 0)
        now += gap + length
        ends.append(now)
        lengths.append(length)
    assert _within(np.array(ends), np.array(lengths), np.array([until])).tolist() == [passed]
