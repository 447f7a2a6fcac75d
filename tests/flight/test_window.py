# SPDX-License-Identifier: Apache-2.0
"""The window keeps what it is asked to, bytes first, and gives out whole epochs that become traces."""

from __future__ import annotations

import numpy as np
import pytest

from tests.flight.rows import CPUS, checkpoint, entries, vm
from tracer.flight.window import Epoch, FlightWindow, stored
from tracer.probing.program import KIND_SLOTS
from traces.record import RECORD

NOTHING = np.zeros((CPUS, KIND_SLOTS), np.int64)
NONE = np.empty(0, RECORD)
SECOND = 10**9


def epoch(began: int) -> Epoch:
    return Epoch(began, [vm()], checkpoint(began, began), NOTHING, NOTHING)


def window(seconds: float = 5, memory: int = 64 << 20) -> FlightWindow:
    return FlightWindow(epoch(0), CPUS, int(seconds * SECOND), memory)


def rows_of(epochs: list[Epoch]) -> int:
    return sum(piece.rows for each in epochs for piece in each.pieces)


def test_whole_epochs_go_by_time() -> None:
    kept = window(seconds=5)
    for second in range(1, 12):
        kept.push(entries(second * SECOND, 100))
        kept.begin(epoch(second * SECOND + SECOND // 2))
        kept.trim(second * SECOND + SECOND // 2)
    epochs = kept.cut(NONE, NONE)
    begins = [each.began for each in epochs]
    assert begins[0] <= 11.5 * SECOND - 5 * SECOND, "the last five seconds are all there"
    assert begins[1] > 11.5 * SECOND - 5 * SECOND, "and no epoch that is not needed for them"


@pytest.mark.slow
@pytest.mark.parametrize("dump_waits", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_bound_in_bytes_holds_a_thousand_times_over(dump_waits: bool) -> None:
    kept = window(seconds=1e6, memory=16 << 20)
    wraps = 300
    epochs: list[Epoch] = []
    for number in range(wraps):
        kept.push(entries(number * SECOND, 20_000))
        kept.begin(epoch(number * SECOND))
        kept.trim(number * SECOND)
        assert kept.held <= 16 << 20
        if number == wraps // 2 and dump_waits:
            epochs = kept.cut(NONE, NONE)
    if dump_waits:
        assert rows_of(epochs) > 20_000
        for each in epochs:
            for piece in each.pieces:
                kept.give_back(piece)
        kept.push(entries(wraps * SECOND, 100_000))
    assert rows_of(kept.cut(NONE, NONE)) > 20_000


def test_an_epoch_too_large_alone_loses_its_first_rows_and_says_so() -> None:
    kept = window(seconds=1e6, memory=16 << 20)
    for number in range(20):
        kept.push(entries(number * SECOND, 1 << 17))
        kept.trim(number * SECOND)
    (only,) = kept.cut(NONE, NONE)
    assert kept.held <= 16 << 20
    assert 0 < only.pieces[0].first - only.dropped_until <= 1000
    assert kept.begins == only.dropped_until


def test_what_is_given_back_is_free() -> None:
    kept = window(seconds=1)
    before = kept.held
    kept.push(entries(0, 1000))
    kept.begin(epoch(SECOND))
    (one, _) = kept.cut(NONE, NONE)
    (same, _) = kept.cut(NONE, NONE)
    kept.begin(epoch(3 * SECOND))
    kept.trim(10 * SECOND)
    assert kept.held > before, "two dumps have still to write it"
    kept.give_back(one.pieces[0])
    assert kept.held > before
    kept.give_back(same.pieces[0])
    assert kept.held == before


def test_counts_are_by_cpu_and_kind() -> None:
    kept = window()
    kept.push(np.concatenate([entries(0, 7), entries(10_000, 5, cpu=1)]))
    counted = kept.pushed()
    assert counted[:, 20].tolist() == [7, 5]
    assert counted.sum() == 12
    (only,) = kept.cut(NONE, NONE)
    assert (stored([piece.counts for piece in only.pieces], CPUS) == counted).all()
