# SPDX-License-Identifier: Apache-2.0
"""What others take of a vCPU's CPU, read off a recording: none of it lost, and none twice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.decode.spans.timeline import MOMENT
from replay.decode.spans.vcpu_states import NO_SPAN, VcpuState
from replay.timing.measuring.steal import Steal
from replay.timing.measuring.steal_curve import StealCurve, steal_curve
from tests.profiles import examples
from traces.schema import BY_NAME

MS = 1_000_000
NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.int64))


def moments(*rows: tuple[int, ...]) -> Any:
    """(time, idle, away, stolen) each, in ms."""
    made = np.zeros(len(rows), np.dtype(MOMENT))
    for name, column in zip(("time", "idle", "away", "stolen"), zip(*rows, strict=True), strict=True):
        made[name] = np.array(column) * MS
    return made


def test_what_was_taken_early_is_taken_early() -> None:
    curve = steal_curve(moments((10, 0, 8, 8), (20, 0, 8, 8), (100, 0, 10, 10)), 0, NOTHING, 10 * MS)
    assert [curve.at(own * MS) // MS for own in (0, 2, 90, 180)] == [0, 8, 10, 20]
    assert [curve.even(own * MS) // MS for own in (0, 9, 90, 180)] == [0, 1, 10, 20]


def test_neither_halts_nor_pauses_nor_a_zap_workers_time_count() -> None:
    """Of 100 ms it halted for 40, was held back for 10, waited for 20, of which a worker had 5."""
    taken = (np.array([50 * MS]), np.array([5 * MS]))
    curve = steal_curve(moments((100, 40, 30, 20)), 0, taken, 15 * MS)
    assert int(curve.stolen[-1]) == 15 * MS
    assert int(curve.own[-1]) == (100 - 40 - 10 - 15) * MS


@examples(100)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=20), st.integers(0, 3000))
def test_a_curve_never_falls_and_ends_as_recorded(steps: list[tuple[int, int]], own: int) -> None:
    """By moments of this many ms with a CPU and this many without."""
    had, stolen = np.cumsum([[0, 0], *steps], axis=0).T
    rows = [(int(a + b), 0, int(b), int(b)) for a, b in zip(had[1:], stolen[1:], strict=True)]
    curve = steal_curve(moments(*rows), 0, NOTHING, int(stolen[-1]) * MS)
    assert curve.at(int(had[-1]) * MS) == int(stolen[-1]) * MS
    assert 0 <= curve.at(own * MS) <= curve.at((own + 1) * MS)


def test_a_vcpu_without_time_of_its_own_is_stolen_nothing() -> None:
    assert StealCurve(np.zeros(1, np.int64), np.zeros(1, np.int64)).at(5 * MS) == 0


WORKER, VCPU, MAIN = 9, 5, 3


class StealRows(SimpleNamespace):
    """A batch, as far as `Steal` looks at it."""

    def __len__(self) -> int:
        return len(self.time)


def fed(rows: list[tuple[int, str, int]], states: dict[int, tuple[int, int]], *, known: bool = True) -> Steal:
    """Rows of (us, kind, tid); the spans that end with some of them, (VcpuState, us) by place."""
    steal = Steal(1, True, [WORKER], known)
    count = len(rows)
    batch = StealRows(
        time=np.array([at * 1000 for at, _, _ in rows]),
        kind=np.array([BY_NAME[kind].code for _, kind, _ in rows], np.uint8),
        tid=np.array([tid for _, _, tid in rows], np.int32),
        vcpu=np.array([0 if tid == VCPU else -1 for _, _, tid in rows], np.int32),
    )
    state, ns = np.full(count, NO_SPAN, np.uint8), np.zeros(count, np.int64)
    for place, (what, us) in states.items():
        state[place], ns[place] = what, us * 1000
    nothing = np.zeros(count, np.uint8)
    steal.feed(batch, state, ns, nothing, nothing)
    return steal


@pytest.mark.parametrize(("known", "lost"), [(True, 20 * 1000), (False, 19 * 1000 + 9000)])
def test_a_zap_worker_that_was_preempted_did_not_work_longer(known: bool, lost: int) -> None:
    """Twenty zaps of 1 ms, during one of which others had the CPU for 8 ms."""
    rows: list[tuple[int, str, int]] = [(0, "kvm_exit", VCPU)]
    at = 0
    for zap in range(20):
        rows.append((at, "zap_root_begin", WORKER))
        at += 9000 if zap == 7 else 1000
        rows.append((at, "zap_root_end", WORKER))
    rows.append((at, "kvm_entry", VCPU))
    steal = fed(rows, {len(rows) - 1: (VcpuState.OTHER, at)}, known=known)
    assert steal.lost.tolist() == [lost * 1000]


def test_a_memslots_change_waits_for_the_worker_beyond_its_zaps() -> None:
    """60 ms until the worker begins, 2 ms of zaps; the vCPU is in userspace meanwhile."""
    rows = [
        (0, "kvm_userspace_exit", VCPU), (100, "zap_invalidated_begin", MAIN), (60_100, "zap_root_begin", WORKER),
        (62_100, "zap_root_end", WORKER), (62_200, "zap_invalidated_end", MAIN), (63_000, "kvm_entry", VCPU),
    ]  # fmt: skip
    steal = fed(rows, {5: (VcpuState.USER, 63_000)})
    assert steal.awaited.tolist() == [60_100 * 1000]
    assert steal.lost.tolist() == [0]
