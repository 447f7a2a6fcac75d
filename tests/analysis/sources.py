# SPDX-License-Identifier: Apache-2.0
"""Recordings and results that tests of analysis ask things of."""

from __future__ import annotations

from pathlib import Path

from analysis.reading.result_source import Result
from analysis.reading.sources import Recording
from analysis.reporting import replayed_under

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "traces" / "corpus"
TIMING = ROOT / "traces" / "timing"
STORM = CORPUS / "smi-storm-6.1.parquet"  # keeps roots: what async would do is an interval
OLD_STORM = CORPUS / "smi-storm-6.1-async.parquet"


def result_of(path: Path, scratch: Path, *policies: str) -> Result:
    """A recording's replay, in a file of its own."""
    return replayed_under(Recording.open(path), policies, scratch / f"{path.stem}-result.parquet")
