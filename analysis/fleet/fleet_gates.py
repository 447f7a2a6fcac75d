# SPDX-License-Identifier: Apache-2.0
"""Gates on a fleet, as `--fail-on 'soft_hang > 0'`, with the same operators and intervals as gates on one report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from analysis.fleet.outcome import FleetOutcome
from analysis.fleet.outliers import outliers
from analysis.gates import Gate, check, parse_whole
from analysis.report_model.figures import OWN_POLICY, Ends, Figures
from analysis.report_model.report import Check

# Figures of the whole fleet, which analysis/REPORT.md explains.
FIGURES: Final = ("soft_hang", "failed", OWN_POLICY, "undecided", "lost", "out_of_line", "vms", "hosts")


def parse(text: str) -> Gate:
    """Parse a condition as --fail-on takes it. Raises a Problem that says what is wrong with it."""
    return parse_whole(text, FIGURES)


def figures(found: FleetOutcome) -> Figures:
    """Return all figures that a gate can be on, as intervals."""
    (whole,) = found.recorded().to_dicts()
    by = {row["own_policy"]: row["vms"] for row in found.recorded("own_policy").to_dicts()}
    hung = (whole["hung_low"], whole["hung_high"] + whole["vms"] - whole["timed"])  # an untimed VM may have one
    far = len(outliers(found.recorded("host", "kernel", "vendor", frame=found.hosts)))
    hosts = found.hosts.filter("own")["host"].n_unique()
    exact = {
        "failed": found.failed, OWN_POLICY: by.get("differs", 0), "undecided": by.get("open", 0), "lost": found.lost,
        "out_of_line": far, "vms": whole["vms"], "hosts": hosts,
    }  # fmt: skip
    values: dict[str, Ends] = {"soft_hang": hung, **{name: (value, value) for name, value in exact.items()}}
    policies: dict[str, dict[str, Ends]] = {}
    for name in found.policies:
        (row,) = found.under(name).to_dicts()
        policies[name] = {
            "vms": (row["others"],) * 2,
            "gain": (row["gain"], row["gain"] + row["undecided"]),
            "lose": (row["lose"], row["lose"] + row["undecided"]),
            "saved_ns": _ends(row["saved_low_ns"], row["saved_high_ns"]),
            "spared": _ends(row["spared_low"], row["spared_high"]),
        }
    return Figures("", values, policies)


def _ends(low: int, high: int | None) -> Ends:
    return low, math.inf if high is None else high


def checked(gates: Sequence[Gate], all_figures: Figures) -> Iterator[Check]:
    """Yield the outcome of each gate."""
    return check(gates, all_figures, None, FIGURES)
