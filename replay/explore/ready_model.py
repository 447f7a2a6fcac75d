# SPDX-License-Identifier: Apache-2.0
"""A model made ready for a search: its actors with their places, and its invariants with their known values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from replay.explore.actors import Actor, Place, StepOutcome
from replay.explore.memo import Memo
from replay.explore.memory import Broken, Memory
from replay.explore.model import Invariant, Model
from replay.userfile import one_line
from traces.errors import Problem

NO_DEADLOCK: Final = "no deadlock"

Values = tuple[Any, ...]


class ReadyModel:
    """What a search steps through; `start` (memory) and `places` (of the actors) are the first state."""

    def __init__(self, model: Model) -> None:
        self.memory: Memory = model.memory
        self.actors = [Actor(model.memory, part) for part in model.parts]
        if not self.actors:
            raise Problem("the scenario has no actors")
        if len({actor.name for actor in self.actors}) < len(self.actors):
            raise Problem("the scenario has two actors of one name")
        self.everywhere = [(invariant, Memo[bool]()) for invariant in model.everywhere]
        self.ends = [(invariant, Memo[bool]()) for invariant in model.ends]
        self.visible = 0  # bit set of the memory fields that invariants for every state read
        self.start: Values = tuple(model.memory.initial)
        self.places: tuple[Place, ...] = tuple(actor.first for actor in self.actors)

    def broken(self, values: Values) -> Broken | None:
        """Return the first invariant for every state that does not hold in this memory, or None."""
        return next((Broken(i.name) for i, memo in self.everywhere if not self._holds(i, memo, values, True)), None)

    def broken_at_end(self, values: Values) -> Broken | None:
        """Return the first invariant for the end that does not hold in this memory, or None."""
        return next((Broken(i.name) for i, memo in self.ends if not self._holds(i, memo, values, False)), None)

    def ended(self, places: Sequence[Place]) -> bool:
        """Return whether all actors that have to finish have finished."""
        return all(place.done or actor.daemon for actor, place in zip(self.actors, places, strict=True))

    def stopped(self, values: Values, places: Sequence[Place]) -> Broken | None:
        """Return what is wrong with a state in which no actor can step: a
        deadlock, or a broken invariant for the end; else None.
        """
        if self.ended(places):
            return self.broken_at_end(values)
        waiting = (
            f"{actor.name}: {place.label}"
            for actor, place in zip(self.actors, places, strict=True)
            if not (place.done or actor.daemon)
        )
        return Broken(NO_DEADLOCK, "waiting for ever: " + "; ".join(waiting))

    def _holds(self, invariant: Invariant, memo: Memo[bool], values: Values, visible: bool) -> bool:
        known = memo.look(values)
        if known is not None:
            return known
        self.memory.begin("", values)
        try:
            holds = bool(invariant.holds())
        except (Problem, Broken):
            raise
        except Exception as error:
            raise Problem(f"invariant {invariant.name!r}: {one_line(error)}") from None
        memo.store(self.memory.reads, holds)
        if visible:
            for place in self.memory.reads:
                self.visible |= 1 << place
        return holds


def after(values: Values, outcome: StepOutcome) -> Values:
    """Return the memory after a step."""
    if not outcome.writes:
        return values
    changed = list(values)
    for place, value in outcome.writes:
        changed[place] = value
    return tuple(changed)


def moved(places: Sequence[Place], number: int, outcome: StepOutcome) -> tuple[Place, ...]:
    """Return where the actors stand after a step of the one with this number."""
    assert outcome.place is not None
    return (*places[:number], outcome.place, *places[number + 1 :])


def lasso(
    model: ReadyModel, values: Values, places: tuple[Place, ...], turns: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Let these actors step in turn until a state repeats, and return the path to it and the loop from it to itself.

    The loop is empty if all of them have to stop.
    """
    seen: dict[tuple[Any, ...], int] = {}
    path: list[int] = []
    turn = 0
    while (values, turn, *places) not in seen:
        seen[(values, turn, *places)] = len(path)
        for ahead in range(len(turns)):
            number = turns[(turn + ahead) % len(turns)]
            place = places[number]
            outcome = model.actors[number].step(place, values) if not place.done else None
            if outcome is not None and outcome.place is not None:
                values, places = after(values, outcome), moved(places, number, outcome)
                path.append(number)
                turn = (turn + ahead + 1) % len(turns)
                break
        else:
            return tuple(path), ()
    begin = seen[(values, turn, *places)]
    return tuple(path[:begin]), tuple(path[begin:])
