# SPDX-License-Identifier: Apache-2.0
"""What a window begins from: a snapshot, corrected by the rows of the time in which it was taken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.flight.rows import KVM, checkpoint, entries, root, row, vm
from tracer.flight.state import telling
from traces.record import RECORD


def tables(state: list[dict[str, object]], at: int = 0) -> set[int]:
    return {root["table"] for root in state[at]["roots"]}  # type: ignore[attr-defined]


def test_only_rows_that_change_the_state_are_kept() -> None:
    other = row("kvm_mmu_get_page", 5, root=9, w1=10, flags=1)  # a child
    found = row("kvm_mmu_get_page", 6, root=9, w1=9)  # found, not made
    kept = telling(np.concatenate([entries(1, 3), other, found, root(True, 7, 11), root(False, 8, 11)]))
    assert kept["time"].tolist() == [7, 8]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=20),
    st.sets(st.integers(1, 6)),
    st.integers(0, 20),
)
def test_roots_are_those_alive_at_the_end_wherever_the_snapshot_looked(
    changes: list[tuple[bool, int]], before: set[int], looked: int
) -> None:
    """A snapshot that is taken after any of the rows gives the same state."""
    alive, seen = set(before), set(before)
    for number, (made, table) in enumerate(changes):
        alive = alive | {table} if made else alive - {table}
        if number < looked:
            seen = set(alive)
    rows = np.concatenate(
        [np.empty(0, RECORD), *(root(made, 10 + n, table) for n, (made, table) in enumerate(changes))]
    )
    state = checkpoint(9, 100, vm(tables=tuple(seen))).state(rows)
    assert tables(state) == alive


def test_rows_from_before_say_nothing() -> None:
    taken = checkpoint(50, 60, vm(tables=(1,)))
    rows = np.concatenate([root(False, 40, 1), row("vm_destroy", 50, kvm=KVM)])
    assert tables(taken.state(rows)) == {1}
    assert not taken.unsettled(rows)


@pytest.mark.parametrize("kind", ["vm_create", "vm_destroy", "memslot"])
def test_vms_and_slots_that_change_make_it_unsettled(kind: str) -> None:
    assert checkpoint(50, 60, vm()).unsettled(row(kind, 55, kvm=KVM))


def test_a_vm_that_ended_meanwhile_is_not_there() -> None:
    taken = checkpoint(50, 60, vm(), vm(KVM + 0x1000, tables=(4,)))
    (left,) = taken.state(row("vm_destroy", 55, kvm=KVM))
    assert left["kvm"] == KVM + 0x1000
    assert tables([left]) == {4}


def test_a_vm_at_the_address_of_one_that_ended_stays() -> None:
    rows = np.concatenate([row("vm_destroy", 55, kvm=KVM), row("vm_create", 56, kvm=KVM)])
    assert len(checkpoint(50, 60, vm()).state(rows)) == 1
