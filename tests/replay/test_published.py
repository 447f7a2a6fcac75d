# SPDX-License-Identifier: Apache-2.0
"""The published experiment (kvm@, 13 April 2023): the MMU context reset on every exit, under either root policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from replay import plan
from replay.decode.capabilities import Capabilities
from replay.run import Outcome, replay
from traces.reader import Trace
from traces.synth import Parameters, synthesize


def outcomes(path: Path, *policies: str) -> dict[tuple[str, str], Outcome]:
    replayed = replay(plan.make(Capabilities(Trace.open(path)), policies))
    return {(outcome.target.name, outcome.run.bound): outcome for outcome in replayed.outcomes}


@pytest.mark.slow
def test_about_fifteen_roots_against_about_a_hundred_thousand(tmp_path: Path) -> None:
    """Resets on every exit but page faults: as published, 15 root creations with the patch, 100,000 without."""
    path = tmp_path / "published.parquet"
    synthesize(path, Parameters(reset_on="non-fault"))
    found = outcomes(path, "preserve", "async")
    assert 10 <= found["preserve", "exact"].counts()["creations"] <= 20
    for bound in ("low", "high"):
        assert 95_000 <= found["async", bound].counts()["creations"] <= 105_000
        assert found["async", bound].stuck == [None]


def test_no_progress_past_the_reset_vector(tmp_path: Path) -> None:
    """Resets on page faults, too: the old policy loses the page with the very exit that brought it."""
    path = tmp_path / "published.parquet"
    synthesize(path, Parameters(reset_on="exit", duration=1))
    found = outcomes(path, "preserve", "async", "sync", "shadow")
    for policy in ("async", "sync"):
        for bound in ("low", "high"):
            outcome = found[policy, bound]
            assert outcome.stuck[0] is not None
            assert outcome.counts()["faults"] <= 2
    assert found["preserve", "exact"].stuck == [None]
    assert found["shadow", "exact"].stuck == [None]
    assert found["preserve", "exact"].counts()["faults"] > 300
