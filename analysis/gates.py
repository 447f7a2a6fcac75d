# SPDX-License-Identifier: Apache-2.0
"""Gates: conditions under which a report fails, such as `preserve.refaults > 0` or `roots_created > baseline`.

What a trace does not determine is an interval. A gate on it is decided only if every value of the interval decides
alike, and fails as undecided otherwise. There is no gate on time, which differs from run to run of the same work.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from analysis.queries import replayed
from analysis.report import Check, Status
from analysis.sources import Recording, Result, open_source
from analysis.units import Unit, span
from analysis.validation import Validated
from replay.decode.capabilities import LEFT_OUT
from replay.own_policy import Agreement
from traces.errors import Problem
from traces.text import printable, some

Number = int | float | Fraction
Ends = tuple[Number, Number] | None  # least and greatest value; None: not known

# Figures of the recording or of the whole replay, which belong to no policy.
OWN_POLICY: Final = "own_policy_mismatch"  # VMs whose replay under the recorded policy is not what their rows show
WHOLE: Final = ("fidelity", "lost", "gaps", "missing", "broken", OWN_POLICY)
_TIMES: Final = ("wall", "time", "stalls", "stall_share", "refill_share")  # and all names that end in _ns
_GATE: Final = re.compile(
    r"\s*(?:(?P<policy>[^<>=!]*[^<>=!\s])\s*\.)?\s*(?P<column>[A-Za-z_]\w*)\s*"
    r"(?P<op>[<>]=?|[=!]=)\s*(?P<right>baseline|-?\d+(?:\.\d+)?)\s*",
    re.ASCII,
)
_MAX_JSON: Final = 64 << 20
_MOST_RESPONSES: Final = (
    1 << 50
)  # no recording has more, so one response that differs makes the share at least 2**-50 less than 1


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


@dataclass(frozen=True)
class Figures:
    """All figures that a gate can be on, those of the whole and those of each policy, as intervals."""

    recorded: str  # which policy the recording's is; empty if it was not replayed
    whole: Mapping[str, Ends]
    policies: Mapping[str, Mapping[str, Ends]]
    unvalidated: str = ""  # why `fidelity` is not known, or not of all of the recording
    untrusted: str = ""  # how the replay under the recorded policy and the rows differ, or why that is not known

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON, each a number, [low, high], or null where it is not known."""
        return {
            "recorded": self.recorded,
            "whole": {name: _plain(ends) for name, ends in self.whole.items()},
            "policies": {
                policy: {name: _plain(ends) for name, ends in columns.items()}
                for policy, columns in self.policies.items()
            },
        }


def figures_of(recording: Recording | None, result: Result | None, validation: Validated | str) -> Figures:
    """Return the figures of a report's sources; `validation` is a text where nothing was validated."""
    whole: dict[str, Ends] = dict.fromkeys(WHOLE)
    if recording is not None:
        meta = recording.metadata
        whole |= {"lost": (meta.lost, meta.lost), "gaps": (meta.gap_count, meta.gap_count)}
    policies: dict[str, dict[str, Ends]] = {}
    if result is not None:
        whole |= {name: (len(lines),) * 2 for name, lines in (("missing", result.missing), ("broken", result.broken))}
        for row in replayed.policies(result).collect(engine="streaming").iter_rows(named=True):
            names = [name.removesuffix("_low") for name in row if name.endswith("_low")]
            policies[row["policy"]] = {
                name: _between(row[f"{name}_low"], row[f"{name}_high"]) for name in names if not _is_time(name)
            }
        whole[OWN_POLICY] = _mismatches(result)
    why_open = validation if isinstance(validation, str) else validation.stopped
    if isinstance(validation, Validated):
        whole["fidelity"] = _fidelity(validation)
    recorded = next((p.name for p in result.policies if p.recorded), "") if result is not None else ""
    agreements = result.agreements if result is not None else ()
    texts = [each.text for each in agreements if each.differences]
    if whole[OWN_POLICY] is None:
        texts = [each.text for each in agreements if each.text]
    return Figures(recorded, whole, policies, why_open, some(texts))


def _fidelity(validation: Validated) -> Ends:
    """Return the validated share as an interval: responses that were not compared may all differ."""
    share = Fraction(validation.matched, validation.expected)
    if not validation.stopped:
        return share, share
    return 0, 1 if share == 1 else 1 - Fraction(1, _MOST_RESPONSES)


def _between(low: Number | None, high: Number | None) -> Ends:
    return None if low is None else (low, math.inf if high is None else high)


def _mismatches(result: Result) -> Ends:
    """Return how many VMs differ from their rows, at least and at most; None where that was not compared."""
    differ = sum(each.agreement is Agreement.DIFFERS for each in result.agreements)
    unjudged = any(LEFT_OUT in line for line in result.missing)
    open_ = [each for each in result.agreements if each.agreement is Agreement.OPEN]
    if len([each for each in open_ if not each.differences]) == len(result.agreements):
        return None
    return differ, differ + sum(each.differences > 0 or unjudged for each in open_)


def parse(text: str) -> Gate:
    """Parse a condition as --fail-on takes it. Raises a Problem that says what is wrong with it."""
    match = _matched(
        text,
        "[POLICY.]COLUMN OPERATOR NUMBER-or-baseline, such as 'preserve.refaults > 0' or 'roots_created > baseline'",
    )
    column = "roots_created" if match["column"] == "creations" else match["column"]
    if _is_time(column):
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


def load_baseline(path: Path) -> Figures:
    """Read figures from a result, or from a report's JSON (of one report). Raises Problem for any other file."""
    text = b""
    with contextlib.suppress(OSError):  # `open_source` reports it
        if path.is_file():  # a pipe would keep its reader waiting
            with path.open("rb") as file:
                start = file.read(1)
                text = start + file.read(_MAX_JSON) if start == b"{" else b""
    if not text:
        source = open_source(path)
        if isinstance(source, Recording):
            raise Problem(
                f"{path}: a baseline is a result (kvmtrace replay -o) or a report (--format json), not a trace"
            )
        return figures_of(None, source, "")
    try:
        (report,) = json.loads(text)["reports"]
        found = report["figures"]
        policies = {
            str(policy): {str(name): _ends(value) for name, value in columns.items()}
            for policy, columns in found["policies"].items()
        }
        whole = {str(name): _ends(value) for name, value in found["whole"].items()}
        return Figures(str(found["recorded"]), whole, policies)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Problem(f"{path}: not the JSON of one report (kvmtrace report FILE --format json)") from None


def _is_time(column: str) -> bool:
    return column.endswith("_ns") or column in _TIMES


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


def _plain(ends: Ends) -> Any:
    if ends is None:
        return None
    low, high = (float(end) if isinstance(end, Fraction) else end for end in ends)
    return low if low == high else [low, None if high == math.inf else high]


def _ends(value: Any) -> Ends:
    if value is None:
        return None
    ends = value if isinstance(value, list) else [value, value]
    ends = [*ends[:1], *(math.inf if end is None else end for end in ends[1:])]
    if len(ends) != 2 or not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
        raise TypeError
    return ends[0], ends[1]
