# SPDX-License-Identifier: Apache-2.0
"""Gates: what they accept, how they come out, and that nothing open is ever taken for green."""

from __future__ import annotations

import itertools
import json
import operator
import string
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.gates import Gate, check, decided, parse
from analysis.reading.sources import Recording
from analysis.report_model.figures import WHOLE, Figures, figures_of, load_baseline
from analysis.report_model.report import Check, Status
from analysis.report_model.validation import Validated
from tests.analysis.sources import CORPUS, OLD_STORM, STORM, result_of
from traces.errors import Problem

OPERATORS = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip

columns = st.text(string.ascii_lowercase + "_", min_size=1).filter(
    lambda name: (
        not name.endswith("_ns")
        and name not in (*WHOLE, "wall", "time", "stalls", "stall_share", "refill_share", "creations")
    )
)
names = st.text(st.characters(exclude_characters="<>=!", exclude_categories=("C", "Z")), min_size=1)
numbers = st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12)
gates = st.builds(
    Gate, st.just("") | names, columns, st.sampled_from(list(OPERATORS)),
    st.none() | numbers.map(abs) | st.integers(0, 1 << 64).map(Decimal),
)  # fmt: skip
ends = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda pair: (min(pair), max(pair)))


@given(gates)
def test_what_is_printed_is_read_back(gate: Gate) -> None:
    assert parse(str(gate)) == gate
    assert str(parse(str(gate))) == str(gate)


@given(st.text())
def test_any_text_is_a_gate_or_one_line(text: str) -> None:
    problem = None
    try:
        gate = parse(text)
    except Problem as raised:
        problem = raised
    if problem is None:
        assert parse(str(gate)) == gate
    else:
        assert (problem.code, str(problem).isprintable()) == (2, True)


@given(st.sampled_from(list(OPERATORS)), ends, ends)
def test_an_interval_is_decided_only_if_all_of_it_agrees(
    op: str, left: tuple[int, int], right: tuple[int, int]
) -> None:
    each = {
        OPERATORS[op](a, b)
        for a, b in itertools.product(range(left[0], left[1] + 1), range(right[0], right[1] + 1))
    }  # fmt: skip
    assert decided(op, left, right) == (each.pop() if len(each) == 1 else None)


@pytest.mark.parametrize("column", ["wall_ns", "fault_ns", "longest_stall_ns", "stalls", "stall_share", "x_ns"])
def test_time_has_no_gate(column: str) -> None:
    with pytest.raises(Problem, match="no gate on time") as refused:
        parse(f"preserve.{column} > 0")
    assert refused.value.code == 2


@pytest.mark.parametrize("text", ["", "refaults", "> 0", "refaults > ", "refaults = 0", "a.b", "refaults > x", "1 > 0"])
def test_what_is_no_gate_is_told(text: str) -> None:
    with pytest.raises(Problem, match="COLUMN OPERATOR"):
        parse(text)


def test_the_whole_is_under_no_policy() -> None:
    with pytest.raises(Problem, match="under no policy"):
        parse("preserve.fidelity < 1")


def figures(recorded: str = "async", whole: Any = None, **policies: Any) -> Figures:
    return Figures(recorded, {**dict.fromkeys(WHOLE), **(whole or {})}, policies, "not done")


def outcome(text: str, mine: Figures, baseline: Figures | None = None) -> list[Check]:
    return list(check([parse(text)], mine, baseline))


def test_a_gate_is_on_the_policy_it_names_or_the_recorded_one_or_all() -> None:
    mine = figures(**{"async": {"refaults": (9, 9)}, "preserve": {"refaults": (0, 0)}})
    assert [(one.name, one.status) for one in outcome("refaults > 0", mine)] == [
        ("async.refaults > 0", Status.FAILED)
    ]  # fmt: skip
    assert [one.status for one in outcome("preserve.refaults > 0", mine)] == [Status.PASSED]
    assert [one.status for one in outcome("refaults > 0", Figures("", mine.whole, mine.policies))] == [
        Status.FAILED, Status.PASSED,
    ]  # fmt: skip
    with pytest.raises(Problem, match="no policy sync; there are async, preserve"):
        outcome("sync.refaults > 0", mine)
    with pytest.raises(Problem, match="no column refault; there are"):
        outcome("refault > 0", mine)


def test_what_is_open_or_not_known_fails() -> None:
    mine = figures(**{"async": {"refaults": (0, 9), "error": None}})
    (opened,) = outcome("refaults > 0", mine)
    assert opened.status is Status.UNDECIDED
    assert opened.fails
    assert "0 .. 9 under async: cannot be decided" in opened.why
    assert outcome("refaults > 9", mine)[0].status is Status.PASSED
    assert outcome("error > 0.5", mine)[0].status is Status.UNDECIDED
    (share,) = outcome("fidelity < 1", mine)
    assert share.status is Status.UNDECIDED
    assert "not known: not done" in share.why
    assert outcome("lost > 0", mine)[0].why == "lost is not known"


def test_a_share_just_below_one_is_below_one() -> None:
    mine = figures(whole={"fidelity": (Fraction(10**9 - 1, 10**9),) * 2}, **{"async": {}})
    (found,) = outcome("fidelity < 1", mine)
    assert found.status is Status.FAILED
    assert "is 1 " not in f"{found.why} "


def test_a_baseline_is_held_against_as_recorded_or_by_name() -> None:
    old = figures("async", **{"async": {"roots_created": (39, 39)}, "preserve": {"roots_created": (2, 2)}})
    new = figures("preserve", **{"preserve": {"roots_created": (3, 3)}, "async": {"roots_created": (3, 40)}})
    (recorded,) = outcome("roots_created > baseline", new, old)
    assert recorded.status is Status.PASSED
    assert "the baseline's 39" in recorded.why
    assert outcome("preserve.roots_created > baseline", new, old)[0].status is Status.FAILED
    assert outcome("async.roots_created > baseline", new, old)[0].status is Status.UNDECIDED
    with pytest.raises(Problem, match="give the --baseline"):
        outcome("roots_created > baseline", new)
    with pytest.raises(Problem, match="the baseline has no faults"):
        outcome("faults > baseline", figures("preserve", preserve={"faults": (1, 1)}), old)


def test_figures_survive_a_reports_json(tmp_path: Path) -> None:
    result = result_of(STORM, tmp_path)
    mine = figures_of(Recording.open(STORM), result, Validated(3, 4, 0, False))
    document = {"reports": [{"figures": json.loads(json.dumps(mine.to_dict()))}]}
    (tmp_path / "old.json").write_text(json.dumps(document))
    read = load_baseline(tmp_path / "old.json")
    assert read.to_dict() == mine.to_dict()
    assert load_baseline(result.path).policies == mine.policies
    assert read.whole["fidelity"] == (0.75, 0.75)
    assert mine.policies["async"]["faults"] == (514, 2569)
    assert mine.policies["preserve"]["refaults"] == (0, 0)
    assert not [name for columns in mine.policies.values() for name in columns if name.endswith("_ns")]


@pytest.mark.parametrize("text", ["{", "{}", '{"reports": []}', '{"reports": [{"figures": {"policies": 1}}]}', "x"])
def test_what_is_no_baseline_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(Problem):
        load_baseline(tmp_path / "b.json")


def test_a_trace_is_no_baseline() -> None:
    with pytest.raises(Problem, match="not a trace"):
        load_baseline(OLD_STORM)
    with pytest.raises(Problem):
        load_baseline(CORPUS / "nothing.parquet")
