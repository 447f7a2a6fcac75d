# SPDX-License-Identifier: Apache-2.0
"""A schedule that leads to a violation: rendered as columns, converted to and from JSON, and replayed."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from replay.explore.memory import FREED, Broken
from replay.explore.ready_model import ReadyModel, after, moved
from replay.explore.search import NO_LIVELOCK, Found, explore_from
from traces.command_line import screen
from traces.command_line.layout import GAP, wrapped
from traces.errors import Problem

WIDEST: Final = 120
_NUMBER: Final = 5  # screen columns for a step's number
_CHANGES: Final = 30  # screen columns for what a step changed, at least
_NARROWEST: Final = 12  # screen columns for an actor, at least; with less room, all actors share one column
_FOR_EVER: Final = "     from here on, for ever:\n"


@dataclass(frozen=True)
class Line:
    """One step: the actor, its label, and what it changed as (name, before, after)."""

    actor: str
    step: str
    changes: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Schedule:
    """The steps from the start to the violation. In a livelock the steps from index `cycle` on can repeat for ever."""

    scenario: str
    variant: str
    bounds: Mapping[str, int]
    invariant: str
    detail: str
    lines: tuple[Line, ...]
    cycle: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as it stands in JSON; `parse` reads it."""
        return {
            "scenario": self.scenario,
            "variant": self.variant,
            "bounds": dict(self.bounds),
            "invariant": self.invariant,
            "detail": self.detail,
            "cycle": self.cycle,
            "steps": [
                {"actor": line.actor, "step": line.step, "changes": [list(change) for change in line.changes]}
                for line in self.lines
            ],
        }


def parse(document: Any, where: str) -> Schedule:
    """Return a schedule from its JSON. Raises Problem, whose text begins with `where`, if it is not one."""
    try:
        cycle = document["cycle"]
        lines = tuple(Line(str(step["actor"]), str(step["step"])) for step in document["steps"])
        if cycle is not None and not 0 <= int(cycle) < len(lines):
            raise ValueError("the cycle is outside of the steps")
        return Schedule(
            str(document["scenario"]), str(document["variant"]),
            {str(name): int(count) for name, count in document["bounds"].items()},
            str(document["invariant"]), str(document["detail"]), lines, cycle if cycle is None else int(cycle),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Problem(f"{where}: not a schedule: {type(error).__name__}: {error}") from None


def make(model: ReadyModel, found: Found, scenario: str, variant: str, bounds: Mapping[str, int]) -> Schedule:
    """Return the schedule that leads to what a search has found."""
    values, places = model.start, model.places
    lines = []
    for number in (*found.path, *found.cycle):
        actor, place = model.actors[number], places[number]
        outcome = actor.step(place, values)
        changed = after(values, outcome)
        lines.append(Line(actor.name, place.label, _changes(model, values, changed)))
        if outcome.place is not None:
            values, places = changed, moved(places, number, outcome)
    return Schedule(
        scenario, variant, bounds, found.violation.invariant, found.violation.detail, tuple(lines),
        len(found.path) if found.cycle else None,
    )  # fmt: skip


def replay(model: ReadyModel, schedule: Schedule, where: str) -> Broken | None:
    """Run a schedule again, and return what is broken at its end, or None.

    Raises Problem if the steps are no longer those of the scenario.
    """
    numbers = {actor.name: number for number, actor in enumerate(model.actors)}
    values, places = model.start, model.places
    round_begins = None
    for at, line in enumerate(schedule.lines):
        if at == schedule.cycle:
            round_begins = values, places
        number = numbers.get(line.actor)
        said = f"{where}: step {at + 1} of {schedule.scenario} {schedule.variant}: the schedule is out of date: "
        if number is None:
            raise Problem(f"{said}there is no actor {line.actor}")
        place = places[number]
        if place.label != line.step:
            raise Problem(f"{said}{line.actor} does not reach {line.step!r} but {place.label or 'its end'!r}")
        outcome = model.actors[number].step(place, values)
        if outcome.violation is not None:
            return outcome.violation
        if outcome.place is None:
            raise Problem(f"{said}{line.actor} would have to wait: {line.step!r}")
        values, places = after(values, outcome), moved(places, number, outcome)
        broken = model.broken(values)
        if broken is not None:
            return broken
    if schedule.cycle is not None:
        closes = round_begins == (values, places)
        found = explore_from(model, values, places).found if closes else None
        return found.violation if found is not None and found.violation.invariant == NO_LIVELOCK else None
    if any(
        actor.step(place, values).place is not None
        for actor, place in zip(model.actors, places, strict=True)
        if not place.done
    ):
        return None
    return model.stopped(values, places)


def _changes(model: ReadyModel, before: Sequence[Any], now: Sequence[Any]) -> tuple[tuple[str, str, str], ...]:
    changes = (
        (name.rpartition(".")[0], "", "freed") if new is FREED else (name, _text(old), _text(new))
        for name, old, new in zip(model.memory.names, before, now, strict=True)
        if old is not new and old != new
    )
    return tuple(dict.fromkeys(changes))  # a freed thing is listed once, not once for each of its fields


def _text(value: Any) -> str:
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(map(_text, value))) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_text, value)) + ")"
    return value if isinstance(value, str) else repr(value)


def render(schedule: Schedule) -> str:
    """Return the schedule as text, with a column for each actor that steps and one for the changes."""
    actors = list(dict.fromkeys(line.actor for line in schedule.lines))
    if not actors:
        return f"     in the first state: {_said(schedule)}\n"
    notes = [", ".join(_change(*change) for change in line.changes) for line in schedule.lines]
    whole = min(screen.width(), WIDEST)
    share = (whole - _NUMBER - _CHANGES) // len(actors) - GAP
    if share < _NARROWEST:
        return _one_column(schedule, notes, whole)
    widths = [
        max(min(max(len(line.step) for line in schedule.lines if line.actor == actor), share), len(actor))
        for actor in actors
    ]
    rest = max(whole - _NUMBER - sum(wide + GAP for wide in widths), _NARROWEST)
    rows = [_row("", [*actors, "changes"], [*widths, rest])]
    for at, (line, note) in enumerate(zip(schedule.lines, notes, strict=True)):
        if at == schedule.cycle:
            rows.append(_FOR_EVER)
        cells = [line.step if line.actor == actor else "" for actor in actors]
        rows.append(_row(str(at + 1), [*cells, note], [*widths, rest]))
    return "".join(rows) + _end(schedule, whole)


def _one_column(schedule: Schedule, notes: Sequence[str], whole: int) -> str:
    """Return the schedule as text in a single column, where there is no room for one column per actor."""
    rows = []
    for at, (line, note) in enumerate(zip(schedule.lines, notes, strict=True)):
        if at == schedule.cycle:
            rows.append(_FOR_EVER)
        told = f"{line.actor}: {line.step}" + (f": {note}" if note else "")
        rows.append(_row(str(at + 1), [told], [whole - _NUMBER]))
    return "".join(rows) + _end(schedule, whole)


def _end(schedule: Schedule, whole: int) -> str:
    return "".join(f"{line}\n" for line in wrapped(f"     => {_said(schedule)}", whole, " " * 8))


def _said(schedule: Schedule) -> str:
    return f"broken: {schedule.invariant}" + (f" ({schedule.detail})" if schedule.detail else "")


def _change(name: str, before: str, now: str) -> str:
    return f"{name} {now}" if now == "freed" else f"{name} {before} -> {now}"


def _row(number: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    wrapped = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
    lines = []
    for at in range(max(map(len, wrapped))):
        parts = (part[at] if at < len(part) else "" for part in wrapped)
        text = "  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True))
        lines.append(f"{number if at == 0 else '':>3}  {text}".rstrip() + "\n")
    return "".join(lines)
