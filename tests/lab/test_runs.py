# SPDX-License-Identifier: Apache-2.0
"""The lab records today what it recorded for the corpus that we ship, event for event where the guest is deterministic.

Four scenarios on each of four root policies: SMIs (unloads), CR0.WP toggles (unloads on old kernels only), a deleted
memslot (invalidates under every policy) and the control, which does neither.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer.lab import fetch, lab_kernels, matrix
from traces.errors import Problem

pytestmark = pytest.mark.lab

CORPUS = Path(__file__).resolve().parents[2] / "traces" / "corpus"
KERNELS = ("5.10", "6.1", "6.1-async", "6.12")
SCENARIOS = ("smi-storm", "wp-toggle", "slot-delete", "steady")


@pytest.mark.parametrize("kernel", KERNELS)
def test_same_counts_as_shipped_twice_in_a_row(kernel: str, tmp_path: Path) -> None:
    try:
        fetch.fetch(kernel)
    except Problem as problem:
        if lab_kernels.KERNELS[kernel].variant:
            pytest.skip(str(problem))
        raise
    shipped = {row.file: row for row in matrix.provenance(CORPUS)}
    cells = [matrix.Cell(scenario, (), kernel) for scenario in SCENARIOS]
    for turn in ("first", "second"):
        directory = tmp_path / turn
        directory.mkdir()
        rows, problems = matrix.record(cells, directory)
        assert not problems
        assert len(rows) == len(cells)
        for made in rows:
            was = shipped[made.file]
            assert (made.roots, made.tables, made.faults, made.leaves) == (
                was.roots,
                was.tables,
                was.faults,
                was.leaves,
            )
            assert (made.lost, was.lost) == (0, 0)
            assert made.policy == was.policy == lab_kernels.KERNELS[kernel].policy
