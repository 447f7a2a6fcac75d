# SPDX-License-Identifier: Apache-2.0
"""The results of an exploration as text, and as the JSON from which `kvmtrace explore --replay` repeats a schedule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from replay.explore import catalogue, schedule
from replay.explore.ready_model import ReadyModel
from replay.explore.scenario import Scenario, ScenarioRun
from replay.explore.schedule import Schedule
from traces.command_line.screen import Page
from traces.errors import Problem
from traces.text import count

_MAX_JSON: Final = 64 << 20


def bounds(texts: Sequence[str]) -> dict[str, int]:
    """Parse the values of --bound, NAME=N each. Raises Problem if one is invalid."""
    found = {}
    for text in texts:
        name, _, count = text.partition("=")
        if not name or not count.isdigit():
            raise Problem(f"--bound {text}: give NAME=N, such as vcpus=3")
        found[name] = int(count)
    return found


def listing(scenarios: Sequence[Scenario]) -> dict[str, Any]:
    """Return the JSON document of --list."""
    return {
        "scenarios": [
            {
                "name": scenario.name,
                "title": scenario.title,
                "bounds": dict(scenario.bounds),
                "variants": [
                    {"name": variant.name, "expect": variant.expect, "about": variant.about}
                    for variant in scenario.variants
                ],
            }
            for scenario in scenarios
        ]
    }


def render_listing(scenarios: Sequence[Scenario]) -> str:
    """Return the text of --list."""
    page = Page()
    for scenario in scenarios:
        page.say(f"{scenario.name}: {scenario.title} ({_bounds(scenario.bounds)})")
        wide = max(len(variant.name) for variant in scenario.variants)
        page.facts([(f"  {each.name:{wide}}  {each.expect}", each.about) for each in scenario.variants], at=wide + 15)
    return page.text


def to_dict(run: ScenarioRun) -> dict[str, Any]:
    """Return one run as it stands in the JSON document."""
    return {
        "variant": run.variant.name,
        "expect": run.variant.expect,
        "outcome": run.outcome,
        "bounds": dict(run.bounds),
        "states": run.exploration.states,
        "transitions": run.exploration.transitions,
        "seconds": round(run.exploration.seconds, 3),
        "steps": len(run.schedule.lines) if run.schedule else None,
        "shortest": run.exploration.shortest if run.schedule else None,
        "schedule": run.schedule.to_dict() if run.schedule else None,
    }


def render(run: ScenarioRun) -> str:
    """Return a variant's outcome as text, with the schedule that leads to the violation if one was found."""
    page = Page()
    name, seen = f"{run.scenario.name} {run.variant.name}", run.exploration
    expected = "" if run.outcome == run.variant.expect else f"  NOT AS EXPECTED: {run.variant.expect}"
    if run.schedule is None:
        bounded = _bounds(run.bounds)
        page.say(f"{name}: no violation in {seen.states:,} states, {bounded}, {seen.seconds:.1f} s{expected}")
    else:
        short = "" if seen.shortest else ", perhaps not the shortest"
        page.say(f"{name}: violation in {count(len(run.schedule.lines), 'step')}{short}{expected}")
    if run.variant.about:
        page.say(f"  {run.variant.about}", indent="  ")
    return page.text if run.schedule is None else f"{page.text}\n{schedule.render(run.schedule)}"


def _bounds(bounds: Mapping[str, int]) -> str:
    return "bounds " + (", ".join(f"{name}={count}" for name, count in bounds.items()) or "none")


def schedules(path: Path) -> list[Schedule]:
    """Read the schedules in what `explore --json` printed, or a single schedule.

    Raises Problem if the file has none.
    """
    try:
        if not path.is_file() and path.exists():  # a pipe would keep its reader waiting
            raise Problem(f"{path}: not a file: give what kvmtrace explore --json printed")
        with path.open("rb") as file:
            document = json.loads(file.read(_MAX_JSON))
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise Problem(f"{path}: not what kvmtrace explore --json prints (not JSON)") from None
    if not isinstance(document, dict):
        raise Problem(f"{path}: not what kvmtrace explore --json prints")
    runs = document.get("runs", [{"schedule": document}])
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise Problem(f"{path}: not what kvmtrace explore --json prints")
    found = [schedule.parse(run["schedule"], str(path)) for run in runs if run.get("schedule")]
    if not found:
        raise Problem(f"{path}: has no schedule: no violation was found in that run")
    return found


def replay(given: Schedule, scenario: Scenario | None, where: str) -> dict[str, Any]:
    """Run a schedule again, and return the result as a dictionary.

    `broken` is the invariant that breaks at its end (or None), and `again` whether it is the one that broke before.
    """
    scenario = scenario or _named(given, where)
    if scenario.name != given.scenario:
        raise Problem(f"{where}: is of scenario {given.scenario}, not of {scenario.name}")
    model = scenario.model(scenario.variant(given.variant).name, scenario.bounded(given.bounds))
    broken = schedule.replay(ReadyModel(model), given, where)
    return {
        "scenario": given.scenario,
        "variant": given.variant,
        "steps": len(given.lines),
        "invariant": given.invariant,
        "broken": broken.invariant if broken is not None else None,
        "again": broken is not None and broken.invariant == given.invariant,
    }


def _named(given: Schedule, where: str) -> Scenario:
    if "/" in given.scenario or given.scenario.endswith(".py"):
        raise Problem(f"{where}: {given.scenario!r} is no name of a scenario")
    try:
        return catalogue.find(given.scenario)
    except Problem:
        raise Problem(
            f"{where}: {given.scenario!r} is no scenario of kvmtrace; give the file it is in before --replay"
        ) from None


def render_replay(replayed: Mapping[str, Any]) -> str:
    """Return the result of a replayed schedule as text."""
    page = Page()
    name = f"{replayed['scenario']} {replayed['variant']}, {replayed['steps']} steps"
    if replayed["again"]:
        page.say(f"{name}: broken again: {replayed['broken']}")
    else:
        now = f"now broken: {replayed['broken']}" if replayed["broken"] else "nothing is broken now"
        page.say(f"{name}: {now} (before: {replayed['invariant']})")
    return page.text
