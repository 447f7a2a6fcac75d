# SPDX-License-Identifier: Apache-2.0
"""Quotas: this many an hour and a day, the first and the worst kept, what is refused counted."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tracer.flight.quotas import AUTOMATIC, Account, Quota

HOUR = 3600.0


def give(account: Account, at: float, severity: float, kept: set[Path]) -> bool:
    made, instead = account.ask(at, severity)
    if instead is not None:
        assert instead.path is not None
        kept.remove(instead.path)
    if made is not None:
        made.path = Path(f"{len(account.made)}/{at}/{severity}")
        kept.add(made.path)
    return made is not None


def test_an_hour_and_a_day() -> None:
    account, kept = Account(Quota(hour=2, day=3)), set[Path]()
    assert [give(account, at, 0, kept) for at in (0, 1, 2)] == [True, True, False]
    assert give(account, HOUR + 2, 0, kept)
    assert not give(account, 2 * HOUR + 5, 0, kept), "the day's are used up"
    assert give(account, 24 * HOUR + 5, 0, kept), "and come back"
    assert account.told().count == 2
    assert account.told().count == 0


@given(st.lists(st.tuples(st.floats(0, HOUR), st.floats(0, 1)), min_size=1, max_size=80))
def test_the_first_and_the_worst_of_a_day_are_there(events: list[tuple[float, float]]) -> None:
    quota = Quota(hour=1000, day=3)
    account, kept, now = Account(quota), set[Path](), 0.0
    seen = []
    for gap, severity in events:
        now += gap / 1000  # all within a day
        give(account, now, severity, kept)
        seen.append((severity, now))
        assert len(kept) <= quota.day
    assert Path(f"1/{seen[0][1]}/{seen[0][0]}") in kept
    assert max(severity for severity, _ in seen) == max(float(path.name) for path in kept)


def test_a_storm_of_worse_and_worse_is_bounded_by_the_hour() -> None:
    account, kept = Account(AUTOMATIC), set[Path]()
    made = sum(give(account, number / 100, number, kept) for number in range(10_000))
    assert made <= 2 * AUTOMATIC.hour
    assert account.refused.count == 10_000 - made
    assert account.refused.worst == 9_999
