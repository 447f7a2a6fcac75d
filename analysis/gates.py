# SPDX-License-Identifier: Apache-2.0
"""Gates: conditions under which a report fails, such as `preserve.refaults > 0` or `roots_created > baseline`.

What a trace does not determine is an interval. A gate on it is decided only if every value of the interval decides
alike, and fails as undecided otherwise. There is no gate on time, which differs from run to run of the same work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import Final

from analysis.report_model.figures import OWN_POLICY, WHOLE, Ends, Figures, Number, is_time
from analysis.report_model.report import Check, Status
from analysis.report_model.units import Unit, span
from traces.errors import Problem
from traces.text import printable

_GATE: Final = re.compile(
    r"\s*(?:(?P<policy>[^<>=!]*[^<>=!\s])\s*\.)?\s*(?P<column>[A-Za-z_]\w*)\s*"
    r"(?P<op>[<>]=?|[=!]=)\s*(?P<right>baseline|-?\d+(?:\.\d+)?)\s*",
    re.ASCII,
)


@dataclass(frozen=True)
class Gate:
    """A condition under which a report fails: `column` stands in the relation `op` to a number.

    The number is that of the baseline where `number` is None. A gate that nobody `asked` for is skipped, not failed,
    where it cannot be decided.
    """

    policy: str  # empty: the recorded policy
    column: str
    op: str
    number: Decimal | None
    asked: bool = True

    def __str__(self) -> str:
        policy = f"{self.policy}." if self.policy else ""
        return f"{policy}{self.column} {self.op} {'baseline' if self.number is None else format(self.number, 'f')}"


BY_DEFAULT: Final = (Gate("", OWN_POLICY, ">", Decimal(0), asked=False),)
"""The gates that JUnit output has even if no --fail-on was given."""


def parse(text: str) -> Gate:
    """Parse a condition as --fail-on takes it. Raises a Problem that says what is wrong with it."""
    match = _matched(
        text,
        "[POLICY.]COLUMN OPERATOR NUMBER-or-baseline, such as 'preserve.refaults > 0' or 'roots_created > baseline'",
    )
    column = "roots_created" if match["column"] == "creations" else match["column"]
    if is_time(column):
        raise Problem(
            f"--fail-on {printable(text)!r}: there is no gate on time: {column} differs from run to run of the same "
            "work; gate the counts that make it, such as refaults, faults or roots_created"
        )
    policy = (match["policy"] or "").strip()
    if policy and column in WHOLE:
        raise Problem(f"--fail-on {printable(text)!r}: {column} is of the whole replay, under no policy")
    return Gate(policy, column, match["op"], None if match["right"] == "baseline" else Decimal(match["right"]))


def parse_whole(text: str, names: Sequence[str]) -> Gate:
    """Parse a condition on one of the figures `names`, none of which has a policy or a baseline.

    Raises a Problem that says what is wrong with it.
    """
    match = _matched(text, f"FIGURE OPERATOR NUMBER, such as '{names[0]} > 0'")
    if match["policy"] or match["column"] not in names or match["right"] == "baseline":
        raise Problem(f"--fail-on {printable(text)!r}: give one of {', '.join(names)}, an operator and a number")
    return Gate("", match["column"], match["op"], Decimal(match["right"]))


def _matched(text: str, how: str) -> re.Match[str]:
    match = _GATE.fullmatch(text)
    if match is None or not text.isprintable():
        raise Problem(f"--fail-on {printable(text)!r}: write {how}")
    return match


def check(
    gates: Sequence[Gate], figures: Figures, baseline: Figures | None, whole: Sequence[str] = WHOLE
) -> Iterator[Check]:
    """Yield the outcome of each gate, under each policy that it is on.

    `whole` names the figures that belong to no policy. Raises Problem for columns and policies that do not exist.
    """
    for gate in gates:
        if gate.number is None and baseline is None:
            raise Problem(f"--fail-on '{gate}': give the --baseline that it is compared with")
        if gate.column in whole:
            other = _other(gate, baseline.whole if baseline else {}, "")
            unknown = figures.unvalidated if gate.column == "fidelity" else ""
            if gate.column == OWN_POLICY:
                unknown = "" if figures.whole[OWN_POLICY] is not None else figures.untrusted
            found = _checked(gate, figures.whole[gate.column], other, "", unknown)
            if gate.column == OWN_POLICY and figures.untrusted and not unknown:
                found = replace(found, why=printable(f"{found.why}: {figures.untrusted}"))
            if found.status is Status.UNDECIDED and not gate.asked:
                found = replace(found, status=Status.SKIPPED)
            yield found
            continue
        for policy in _chosen(gate, figures):
            columns = figures.policies[policy]
            if gate.column not in columns:
                known = ", ".join(sorted({*WHOLE, *columns}))
                raise Problem(f"--fail-on '{gate}': no column {gate.column}; there are {known}")
            theirs = policy
            if baseline is not None and not gate.policy and policy == figures.recorded:
                theirs = baseline.recorded  # the recorded policies are compared, even if they differ
            other = _other(gate, baseline.policies.get(theirs, {}) if baseline else {}, theirs)
            yield _checked(gate, columns[gate.column], other, policy, "")


def _chosen(gate: Gate, figures: Figures) -> list[str]:
    """Return the policies that a gate is on: the one it names, else the recorded one, else every one."""
    if not figures.policies:
        raise Problem(f"--fail-on '{gate}': nothing was replayed, so that no policy has a {gate.column}")
    name = gate.policy or figures.recorded
    if not name:
        return list(figures.policies)
    if name not in figures.policies:
        known = printable(", ".join(figures.policies))
        raise Problem(f"--fail-on '{gate}': no policy {name}; there are {known}")
    return [name]


def _other(gate: Gate, columns: Mapping[str, Ends], policy: str) -> tuple[Number, Number]:
    if gate.number is not None:
        number = Fraction(gate.number)
        return number, number
    ends = columns.get(gate.column)
    if ends is None:
        under = f" under {printable(policy)}" if policy else ""
        raise Problem(f"--fail-on '{gate}': the baseline has no {gate.column}{under}")
    return ends


def _checked(gate: Gate, mine: Ends, other: tuple[Number, Number], policy: str, unknown: str) -> Check:
    under = f" under {printable(policy)}" if policy else ""
    name = str(gate) if gate.policy or not policy else f"{printable(policy)}.{gate}"
    if mine is None:
        return Check(
            "gate", name, Status.UNDECIDED, f"{gate.column} is not known{under}" + (unknown and f": {unknown}")
        )
    why = f"{gate.column} is {_shown(mine)}{under}"
    why += f"; the baseline's {_shown(other)}" if gate.number is None else ""
    holds = decided(gate.op, mine, other)
    if holds is None:
        return Check(
            "gate",
            name,
            Status.UNDECIDED,
            f"{why}: cannot be decided, {unknown or 'the trace leaves it open (replay --refault assumes)'}",
        )
    return Check("gate", name, Status.FAILED if holds else Status.PASSED, why)


def decided(op: str, left: tuple[Number, Number], right: tuple[Number, Number]) -> bool | None:
    """Return True if `op` holds between all values of two intervals, False if between none, else None."""
    (low, high), (least, most) = left, right
    match op:
        case ">":
            always, never = low > most, high <= least
        case ">=":
            always, never = low >= most, high < least
        case "<":
            always, never = high < least, low >= most
        case "<=":
            always, never = high <= least, low > most
        case _:
            same, apart = low == high == least == most, high < least or low > most
            always, never = (same, apart) if op == "==" else (apart, same)
    return True if always else False if never else None


def _shown(ends: tuple[Number, Number]) -> str:
    low, high = ends
    if high == math.inf:
        return span(low, None, Unit.COUNT)
    if all(isinstance(end, int) for end in ends):
        return span(low, high, Unit.COUNT)
    # What is just below 1 must not read as 1.
    texts = [text if (float(text := f"{float(end):.6g}") == 1) == (end == 1) else repr(float(end)) for end in ends]
    return texts[0] if texts[0] == texts[1] else " .. ".join(texts)
