# SPDX-License-Identifier: Apache-2.0
"""Find the scenario that a command names: one that kvmtrace ships, or one in a file of the user's."""

from __future__ import annotations

from pathlib import Path

from replay import userfile
from replay.explore.scenario import Scenario
from replay.explore.scenarios import SCENARIOS
from traces.errors import Problem


def find(name: str) -> Scenario:
    """Return the scenario of this name, or the one in this Python file. Raises Problem if there is none."""
    if name.endswith(".py") or "/" in name:
        return _from_file(Path(name))
    for scenario in SCENARIOS:
        if scenario.name == name:
            return scenario
    known = ", ".join(scenario.name for scenario in SCENARIOS)
    raise Problem(f"there is no scenario {name}: give {known}, or a Python file that has one")


def _from_file(path: Path) -> Scenario:
    module = userfile.load(path, str(path))
    found = [value for value in vars(module).values() if isinstance(value, Scenario)]
    if len(found) != 1:
        what = "has no" if not found else f"has {len(found)} of"
        raise Problem(f"{path}: {what} replay.explore.Scenario among its variables: it must have one")
    return found[0]
