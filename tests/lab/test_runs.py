"""The lab records today what it recorded for the corpus that we ship, event for event where the guest is deterministic.

Four scenarios on each of four root policies: SMIs (unloads), CR0.WP toggles (unloads on old kernels only), a deleted
memslot (invalidates under every policy) and the control, which does neither.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer.lab import fetch, kernels, matrix
from traces.errors import Problem

pytestmark = pytest.mark.lab

CORPUS = Path(__file__).resolve().parents[2] / "traces" / "corpus"
KERNELS = ("5.10", "6.1", "6.1-async", "6.12")
SCENARIOS = ("smi-storm", "wp-toggle", "slot-delete", "steady")


@pytest.fixture(scope="module")
def shipped() -> dict[str, matrix.Row]:
    return {row.file: row for row in matrix.provenance(CORPUS)}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_same_counts_as_shipped(kernel: str, scenario: str, shipped: dict[str, matrix.Row], tmp_path: Path) -> None:
    try:
        fetch.fetch(kernel)
    except Problem as problem:
        if kernels.KERNELS[kernel].variant:
            pytest.skip(str(problem))
        raise
    cell = matrix.Cell(scenario, (), kernel)
    made = matrix.record(cell, tmp_path)
    was = shipped[f"{cell.name}.parquet"]
    assert (made.roots, made.tables, made.faults, made.leaves) == (was.roots, was.tables, was.faults, was.leaves)
    assert (made.lost, was.lost) == (0, 0)
    assert made.policy == was.policy == kernels.KERNELS[kernel].policy
