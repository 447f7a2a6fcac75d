# SPDX-License-Identifier: Apache-2.0
"""Dumps of the tests' own keepers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer.flight.dumps import Dumps
from traces.recording.compact import compact


@pytest.fixture(autouse=True)
def _compacting_in_this_process(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A process of its own takes a second of CPU to begin; one test is about that."""
    if "own_process" in request.fixturenames:
        return

    def compacted(_: Dumps, directory: Path) -> Path:
        compact(directory, directory.with_suffix(".parquet"))
        return directory.with_suffix(".parquet")

    monkeypatch.setattr(Dumps, "_compact", compacted)


@pytest.fixture
def own_process() -> None:
    """Dumps are compacted as they are in a flight."""
