# SPDX-License-Identifier: Apache-2.0
"""The exact figures of a report that gates can be on, and those of an earlier report or result, a baseline.

What a trace does not determine is an interval. No figure is a time, which differs from run to run of the same work.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from analysis.queries import replayed
from analysis.reading.result_source import Result
from analysis.reading.sources import Recording, open_source
from analysis.report_model.validation import Validated
from replay.decode.capabilities import LEFT_OUT
from replay.own_policy import Agreement
from traces.errors import Problem
from traces.text import some

Number = int | float | Fraction
Ends = tuple[Number, Number] | None  # least and greatest value; None: not known

# Figures of the recording or of the whole replay, which belong to no policy.
OWN_POLICY: Final = "own_policy_mismatch"  # VMs whose replay under the recorded policy is not what their rows show
WHOLE: Final = ("fidelity", "lost", "gaps", "missing", "broken", OWN_POLICY)
_TIMES: Final = ("wall", "time", "stalls", "stall_share", "refill_share")  # and all names that end in _ns
_MAX_JSON: Final = 64 << 20
# No recording has more responses: one that differs makes the share at least 2**-50 less than 1.
_MOST_RESPONSES: Final = 1 << 50


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
                name: _between(row[f"{name}_low"], row[f"{name}_high"]) for name in names if not is_time(name)
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


def is_time(column: str) -> bool:
    """Whether a column of a result is a time, or follows from times."""
    return column.endswith("_ns") or column in _TIMES


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
