# SPDX-License-Identifier: Apache-2.0
"""Search every interleaving of a model's actors, breadth first, so that the first violation found is a shortest one.

A state is the shared memory and the place of each actor. The search finds invariants that do not hold, deadlocks, and
livelocks (states from which, whatever is scheduled, not all actors can finish any more).

Reduction. If the next step of an actor reads nothing that another may still write, and writes nothing that another may
still read or write or that an invariant for every state reads, then it commutes with everything that the others may do
before it. It is enough to follow that actor alone (a persistent set of one). What an actor may still touch is learned
during the search. When no state is left to follow, states at which too little was known are followed up with all
actors, until there are none. The step of one actor alone always leads to a new state, so that no actor is postponed for
ever. The reduction preserves all broken invariants, deadlocks and livelocks, but not the shortest path to them: that is
then searched for without reduction.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from replay.explore.actors import Place, StepOutcome
from replay.explore.memory import Broken
from replay.explore.model import Model
from replay.explore.ready_model import ReadyModel, Values, after, lasso, moved
from traces.command_line.progress import Progress
from traces.errors import Problem

LIMIT: Final = 3_000_000
NO_LIVELOCK: Final = "no livelock"

Key = tuple[Any, ...]  # the number of a memory, then each actor's place


@dataclass(frozen=True)
class Found:
    """A violation, and the path to it as numbers of actors.

    In a livelock, `cycle` can repeat for ever after the path.
    """

    violation: Broken
    path: tuple[int, ...]
    cycle: tuple[int, ...] = ()


@dataclass(frozen=True)
class Exploration:
    """The result of a search.

    `shortest` says that no schedule to any violation has fewer steps (before the cycle, if there is one).
    """

    found: Found | None
    states: int
    transitions: int
    seconds: float
    shortest: bool = True


def explore(model: Model, limit: int = LIMIT, reduced: bool = True) -> Exploration:
    """Search all states of a model. Raises Problem if there are more than `limit`."""
    began = time.monotonic()
    ready = ReadyModel(model)
    search = _Search(ready, limit, reduced).run()
    found, shortest = search.found, True
    if reduced and found is not None:
        try:
            found = _Search(ready, limit, False).run().found
        except _TooMany:
            shortest = False
    return Exploration(found, search.states, search.transitions, time.monotonic() - began, shortest)


def explore_from(model: ReadyModel, values: Values, places: tuple[Place, ...]) -> Exploration:
    """Search all states that can be reached from this state."""
    began = time.monotonic()
    model.start, model.places = values, places
    search = _Search(model, LIMIT, False).run()
    return Exploration(search.found, search.states, search.transitions, time.monotonic() - began)


class _TooMany(Problem):
    pass


def _learn(model: ReadyModel) -> None:
    """Work out what each actor may still read and write from each of its places, as far as its steps are known."""
    for actor in model.actors:
        changed = True
        while changed:
            changed = False
            for place in reversed(actor.places):
                read, written = place.future_reads, place.future_writes
                for outcome in place.outcomes:
                    read |= outcome.read
                    written |= outcome.written
                    if outcome.place is not None:
                        read |= outcome.place.future_reads
                        written |= outcome.place.future_writes
                if (read, written) != (place.future_reads, place.future_writes):
                    place.future_reads, place.future_writes = read, written
                    changed = True


@dataclass(eq=False)
class _Search:
    """One search through the states of a model."""

    model: ReadyModel
    limit: int
    reduced: bool
    found: Found | None = None
    transitions: int = 0
    memories: dict[Values, int] = field(default_factory=dict)
    known: dict[Key, int] = field(default_factory=dict)
    keys: list[Key] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    parents: array[int] = field(default_factory=lambda: array("q"))
    by: array[int] = field(default_factory=lambda: array("b"))
    edges: tuple[array[int], array[int]] = field(default_factory=lambda: (array("q"), array("q")))
    alone: list[tuple[int, int, StepOutcome]] = field(
        default_factory=list
    )  # states where only one actor was followed, with its number and step
    backward: bool = False  # some step led to the same or an earlier state, so there may be cycles

    @property
    def states(self) -> int:
        return len(self.keys)

    def run(self) -> _Search:
        """Search layer by layer; in a layer, what is broken in a state comes before what a step from it breaks."""
        violation, _ = self._reach(self.model.start, self.model.places, -1, -1)
        if violation is not None:
            self.found = Found(violation, ())
            return self
        with Progress("exploring, states") as progress:
            self._search(progress)
        if self.found is None and self.backward:
            self.found = self._livelock()
        return self

    def _search(self, progress: Progress) -> None:
        layer = 0
        while self.found is None and (layer < self.states or self._follow_up()):
            end = self.states
            for state in range(layer, end):
                self._note(self._expand(state))
                if self.states > self.limit:
                    raise _TooMany(
                        f"not exhausted: more than {self.limit:,} states; lower the bounds, or raise --max-states"
                    )
            progress.at(self.states)
            if self.reduced:
                _learn(self.model)
            layer = end

    def _note(self, found: Found | None) -> None:
        if found is not None and (self.found is None or len(found.path) < len(self.found.path)):
            self.found = found

    def _follow_up(self) -> bool:
        """Follow all actors from states at which one was followed wrongly, for lack of knowledge.

        Return whether there were any.
        """
        mistaken = [
            (state, number)
            for state, number, outcome in self.alone
            if not self._independent(number, outcome, self.keys[state][1:])
        ]
        again = dict(mistaken)
        self.alone = [followed for followed in self.alone if followed[0] not in again]
        for state, number in mistaken:
            self._note(self._expand(state, number))
        return bool(mistaken)

    def _reach(self, values: Values, places: tuple[Place, ...], parent: int, by: int) -> tuple[Broken | None, int]:
        """Return what is broken in a state, and the state's number; a new state gets the next number."""
        memory = self.memories.setdefault(values, len(self.values))
        violation = None
        if memory == len(self.values):
            self.values.append(values)
            violation = self.model.broken(values)
        key = (memory, *places)
        state = self.known.setdefault(key, len(self.keys))
        if state == len(self.keys):
            self.keys.append(key)
            self.parents.append(parent)
            self.by.append(by)
        return violation, state

    def _expand(self, state: int, followed: int | None = None) -> Found | None:
        """Follow the actors from a state, except the one that was already `followed`.

        Return a violation if there is one.
        """
        model = self.model
        memory, *places = self.keys[state]
        values = self.values[memory]
        outcomes = []
        for number, (actor, place) in enumerate(zip(model.actors, places, strict=True)):
            if place.done:
                continue
            outcome = actor.step(place, values)
            if outcome.violation is not None:
                return Found(outcome.violation, (*self._path(state), number))
            if outcome.place is not None:
                outcomes.append((number, outcome))
        if not outcomes:
            stopped = model.stopped(values, places)
            return Found(stopped, self._path(state)) if stopped is not None else None
        if followed is not None:
            outcomes = [each for each in outcomes if each[0] != followed]
        elif self.reduced and len(outcomes) > 1:
            alone = self._alone(outcomes, places, values)
            if alone is not None:
                self.alone.append((state, *alone))
                outcomes = [alone]
        for number, outcome in outcomes:
            broken, reached = self._reach(after(values, outcome), moved(places, number, outcome), state, number)
            if broken is not None:
                return Found(broken, (*self._path(state), number))
            self.transitions += 1
            self.edges[0].append(state)
            self.edges[1].append(reached)
            if reached <= state:
                self.backward = True
        return None

    def _alone(
        self, outcomes: list[tuple[int, StepOutcome]], places: Sequence[Place], values: Values
    ) -> tuple[int, StepOutcome] | None:
        """Return an actor and its step that can be followed alone, as far as is known, or None."""
        for number, outcome in outcomes:
            if self._independent(number, outcome, places):
                memory = self.memories.get(after(values, outcome))
                if memory is None or (memory, *moved(places, number, outcome)) not in self.known:
                    return number, outcome
        return None

    def _independent(self, number: int, outcome: StepOutcome, places: Sequence[Place]) -> bool:
        """Return whether a step commutes with all that other actors may still do, and is seen by no invariant."""
        read, written = outcome.read, outcome.written
        if written & self.model.visible:
            return False
        for other, place in enumerate(places):
            if other != number and (written & (place.future_reads | place.future_writes) or read & place.future_writes):
                return False
        return True

    def _path(self, state: int) -> tuple[int, ...]:
        path = []
        while self.parents[state] >= 0:
            path.append(self.by[state])
            state = self.parents[state]
        return tuple(reversed(path))

    def _livelock(self) -> Found | None:
        """Return the first state from which no end can be reached, with a cycle of its actors.

        None if there is no such state.
        """
        import numpy as np

        ends = np.fromiter((self.model.ended(key[1:]) for key in self.keys), bool, self.states)
        source, target = (np.frombuffer(side, np.int64) for side in self.edges)
        count = -1
        while count != (count := int(ends.sum())):
            ends[source[ends[target]]] = True
        stuck = np.flatnonzero(~ends)
        if not len(stuck):
            return None
        state, on, cycle = self._round_of_one(stuck.tolist()) or self._round_of_all(int(stuck[0]))
        names = [self.model.actors[number].name for number in sorted(set(cycle))]
        who = " and ".join(names) + (" goes" if len(names) == 1 else " go")
        detail = f"{who} round for ever, whatever the others do"
        return Found(Broken(NO_LIVELOCK, detail), (*self._path(state), *on), cycle)

    def _round_of_one(self, stuck: Sequence[int]) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
        """Return the first state in which one actor loops by itself, on
        memory that no other actor will change any more.
        """
        model = self.model
        _learn(model)
        for state in stuck:
            memory, *places = self.keys[state]
            cycles = []
            for number in range(len(places)):
                on, cycle = lasso(model, self.values[memory], tuple(places), (number,))
                if cycle and not on:
                    others = (place.future_writes for at, place in enumerate(places) if at != number)
                    if not any(self._reads_only(state, cycle) & written for written in others):
                        cycles.append(cycle)
            if cycles:
                return state, (), min(cycles, key=len)
        return None

    def _reads_only(self, state: int, path: Sequence[int]) -> int:
        """Return the bit set of fields that these steps read and do not write themselves."""
        memory, *places = self.keys[state]
        values, read, written = self.values[memory], 0, 0
        for number in path:
            outcome = self.model.actors[number].step(places[number], values)
            read, written = read | outcome.read, written | outcome.written
            values, places = after(values, outcome), list(moved(places, number, outcome))
        return read & ~written

    def _round_of_all(self, state: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        memory, *places = self.keys[state]
        on, cycle = lasso(self.model, self.values[memory], tuple(places), tuple(range(len(places))))
        return state, on, cycle
