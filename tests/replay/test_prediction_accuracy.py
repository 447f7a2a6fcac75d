# SPDX-License-Identifier: Apache-2.0
"""What replay predicts of other policies and kernels is what their recordings show; its table is current."""

from __future__ import annotations

import pytest

from benchmarks import accuracy
from benchmarks.accuracy import Cell, Direction
from tracer.lab.matrix import KINDS

# The tables are made once in each process: one worker does all of it.
pytestmark = [pytest.mark.corpus, pytest.mark.xdist_group("prediction_accuracy")]
DIRECTIONS = list(accuracy.directions())
table = accuracy.table
# What does not follow from the source recording, so that an interval is all there can be.
OPEN = {
    ("6.1", "6.1-async"), ("6.1-ept", "6.1-async-ept"), ("6.1-ept", "5.10-ept"),
    ("6.1-shadow", "6.1-async"), ("6.1-shadow", "6.1"), ("6.12-shadow", "6.12"),
    ("7.x-shadow", "7.x"), ("5.10-shadow", "5.10"), ("5.10", "6.1-async"), ("6.1", "5.10"), ("6.1-async", "5.10"),
}  # fmt: skip


def cells(direction: Direction) -> list[tuple[str, str, Cell]]:
    return [(scenario, name, cell) for scenario, row in table(direction).items() for name, cell in row.items()]


def test_the_table_is_current() -> None:
    assert accuracy.document() == accuracy.DOCUMENT.read_text(), "python -m benchmarks.accuracy"


def test_every_scenario_is_in_it() -> None:
    for direction in DIRECTIONS:
        rows = table(direction)
        assert set(rows) == set(accuracy.scenarios(direction))
        both = {direction.source, direction.target}
        kinds = {kind for kind, kernels in KINDS.items() if both <= set(kernels)}
        if len(both) == 2:  # how much these remove is decided by the host
            kinds -= {"ksm", "notifier-storm", "nx-recovery", "slot-storm"}
        assert kinds <= set(rows)
        # Variations are of TDP MMUs, on Intel on two kernels; on a variant only those in which roots are given up.
        plain = any(kernel.endswith("-shadow") or kernel in ("6.12-ept", "7.x-ept") for kernel in both)
        assert len(set(rows) - kinds) == (12 if "6.1-async-ept" in both else 18 if plain else 21)


@pytest.mark.parametrize("direction", DIRECTIONS, ids=lambda d: f"{d.source}-{d.target}-{d.options.replace(' ', '')}")
def test_what_is_off_has_its_reason_and_the_rest_is_exact(direction: Direction) -> None:
    for scenario, name, cell in cells(direction):
        if cell.verdict == "off":
            assert accuracy.reason(direction, scenario, name), (scenario, name, cell)
        elif (direction.source, direction.target) not in OPEN:
            assert cell.verdict in ("exact", "unseen"), (scenario, name, cell)


def test_every_reason_is_needed() -> None:
    given = {
        accuracy.reason(direction, scenario, name)
        for direction in DIRECTIONS
        for scenario, name, cell in cells(direction)
        if cell.verdict == "off"
    }
    assert given == set(accuracy.REASONS)


def test_the_promised_numbers() -> None:
    old, new = Direction("6.1-async", "6.1", "preserve"), Direction("6.1", "6.1-async", "async")
    whole = Direction("6.1", "6.1-async", "async", refault="all")
    assert [cell.predicted.text for cell in table(old)["smi-storm"].values()] == ["2", "7", "514", "514", "514"]
    assert table(new)["smi-storm"]["installs"].predicted.text == "514 .. 2,569"
    assert [cell.recorded for cell in table(new)["smi-storm"].values()] == [9, 32, 2569, 514, 2569]
    # Where each pass accesses everything, the assumption that each root is needed whole is exact.
    for scenario in ("smi-storm", "smi-one", "smi-both", "smi-grow", "huge", "two-vms"):
        assert {cell.verdict for cell in table(whole)[scenario].values()} == {"exact"}, scenario


def test_a_recording_is_counted_without_the_model() -> None:
    assert accuracy.recorded("smi-storm-6.1") == {
        "roots": 2, "tables": 7, "installs": 514, "first accesses": 514, "zaps": 514
    }  # fmt: skip
    assert accuracy.recorded("smi-storm-5.10")["zaps"] is None
