# SPDX-License-Identifier: Apache-2.0
"""Actors as the search sees them: places in their code, and what a step from a place does to a given memory.

A generator cannot be copied. But what a step does is determined by what it reads, so each step has to run once for each
combination of values that it reads; after that its outcome is remembered (`Memo`). To return to a place, a new
generator is run along the path that led there, with the values that were read on it.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    GeneratorType,
    MappingProxyType,
    MethodType,
    ModuleType,
)
from typing import Any, Final

from replay.explore.memo import Memo
from replay.explore.memory import Broken, Memory, Thing
from replay.explore.model import Model, Mutex, Part, Rcu, RwLock, Step, Steps
from replay.userfile import one_line
from traces.errors import Problem

_PLAIN: Final = (int, float, str, bytes, type(None), Thing, range, type, ModuleType)
_LASTING: Final = (Model, Mutex, RwLock, Rcu, MappingProxyType)
_OF_EVERY_FRAME: Final = (FrameType, CodeType, FunctionType, dict)


class Place:
    """Where an actor stands: its next step and everything that it remembers."""

    __slots__ = ("before", "done", "future_reads", "future_writes", "label", "memo", "number", "outcomes", "reads")

    def __init__(self, number: int, label: str, done: bool, before: Place | None, reads: Mapping[int, Any]) -> None:
        self.number = number
        self.label = label
        self.done = done
        self.before = before  # the place before this one, on one path to it
        self.reads = reads  # what the step from there to here read
        self.memo: Memo[StepOutcome] = Memo()
        self.outcomes: list[StepOutcome] = []
        self.future_reads = 0  # bit sets of memory fields that later steps may touch, maintained by `search`
        self.future_writes = 0


@dataclass(eq=False)
class StepOutcome:
    """What a step does. `place` is None if the step has to wait or breaks an invariant.

    `read` and `written` are bit sets of memory fields.
    """

    place: Place | None
    writes: tuple[tuple[int, Any], ...]
    read: int
    written: int
    violation: Broken | None = None


class Actor:
    """One actor of a model, with all its places that were found so far."""

    def __init__(self, memory: Memory, part: Part) -> None:
        self.memory = memory
        self.name = part.name
        self.daemon = part.daemon
        self._start = part.start
        self.places: list[Place] = []
        self._by_key: dict[Any, Place] = {}
        steps = self._fresh()
        self.first = self._place(steps, self._advance(steps, {}, ""), None, {})

    def step(self, place: Place, values: Sequence[Any]) -> StepOutcome:
        """Return what the actor's step from this place does if memory has these values."""
        return place.memo.look(values) or self._run(place, values)

    def _fresh(self) -> Steps:
        steps = self._start()
        if not isinstance(steps, GeneratorType):
            raise Problem(f"actor {self.name}: its function is no generator: it has no yield")
        return steps

    def _run(self, place: Place, values: Sequence[Any]) -> StepOutcome:
        memory = self.memory
        steps, step = self._again(place)
        following, violation = None, None
        memory.begin(self.name, values)
        try:
            if step.ready is None or step.ready():
                following = self._advance(steps, None, step.label)
        except Broken as broken:
            violation = broken
        except Problem:
            raise
        except Exception as error:
            raise Problem(f"actor {self.name}, {step.label!r}: {one_line(error)}") from None
        reads, writes = memory.reads, memory.writes
        goes = following is not None and violation is None
        outcome = StepOutcome(
            self._place(steps, following, place, reads) if following is not None and goes else None,
            tuple(writes.items()) if goes else (),
            _bits(reads),
            _bits(writes) if goes else 0,
            violation,
        )
        place.memo.store(reads, outcome)
        place.outcomes.append(outcome)
        return outcome

    def _advance(self, steps: Steps, given: Mapping[int, Any] | None, label: str) -> Step:
        """Run the generator to its next yield, and return what it yields; an empty label says that it has ended.

        `given` are the values that it may read; None continues the step that is under way.
        """
        if given is not None:
            self.memory.begin(self.name, given)
        try:
            said = next(steps)
        except StopIteration:
            return Step("")
        if isinstance(said, str) and said:
            return Step(said)
        if isinstance(said, Step):
            return said
        raise Problem(f"actor {self.name}, after {label!r}: yields {said!r}, which is neither a text nor until(...)")

    def _again(self, place: Place) -> tuple[Steps, Step]:
        """Return a new generator that stands at this place, and its next step.

        Raises Problem if the actor is not deterministic.
        """
        path = [place]
        while path[-1].before is not None:
            path.append(path[-1].before)
        steps = self._fresh()
        step = Step("")
        for way in reversed(path):
            try:
                # The condition need not be evaluated: its reads are among those of the step, and it was true then.
                step = self._advance(steps, way.reads, step.label)
            except Broken as violation:
                raise self._undetermined(place) from violation
        if step.label != place.label or self._by_key.get(self._key(steps, step)) is not place:
            raise self._undetermined(place)
        return steps, step

    def _undetermined(self, place: Place) -> Problem:
        return Problem(
            f"actor {self.name}, before {place.label!r}: does another thing on the same memory; actors must be "
            "deterministic and keep nothing outside of the model"
        )

    def _place(self, steps: Steps, step: Step, before: Place | None, reads: Mapping[int, Any]) -> Place:
        key = self._key(steps, step)
        if key not in self._by_key:
            place = Place(len(self.places), step.label, not step.label, before, reads)
            self._by_key[key] = place
            self.places.append(place)
        return self._by_key[key]

    def _key(self, steps: Steps, step: Step) -> Any:
        if not step.label:
            return None
        try:
            return step.label, _frozen(step.ready), _frozen(steps)
        except _Unfit as unfit:
            raise Problem(
                f"actor {self.name}, before {step.label!r}: keeps {unfit} across a yield; keep numbers, strings, "
                "tuples, frozensets or things"
            ) from None


def _bits(places: Mapping[int, Any]) -> int:
    bits = 0
    for place in places:
        bits |= 1 << place
    return bits


class _Unfit(Exception):
    pass


def _frozen(value: Any, inside: frozenset[int] = frozenset()) -> Any:
    """Return a hashable value that is equal for equal values, of whatever an actor may keep across a yield.

    Places whose frozen values are equal behave in the same way from then on. Raises _Unfit for values that may change.
    """
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, _LASTING):  # they live as long as the search, and their mutable state is in shared memory
        return id(value)
    if isinstance(value, GeneratorType):
        return _frame(value)
    if isinstance(value, tuple | frozenset):
        parts = (_frozen(part, inside) for part in value)
        return type(value), frozenset(parts) if isinstance(value, frozenset) else tuple(parts)
    if isinstance(value, CellType):
        try:
            return _frozen(value.cell_contents, inside)
        except ValueError:  # the variable has no value yet
            return None
    if isinstance(value, FunctionType):
        if id(value) in inside:
            return value.__code__
        inside |= {id(value)}
        kept = (*(value.__closure__ or ()), *(value.__defaults__ or ()))
        return value.__code__, tuple(_frozen(part, inside) for part in kept)
    if isinstance(value, BuiltinFunctionType):
        return value.__name__
    if isinstance(value, MethodType):
        return value.__func__, _frozen(value.__self__, inside)
    if is_dataclass(value) and value.__hash__ is not None:  # a frozen one
        return type(value), tuple(_frozen(getattr(value, field.name), inside) for field in fields(value))
    if hasattr(value, "__next__"):
        _, *state = value.__reduce__()
        return type(value), tuple(
            _frozen(tuple(part) if isinstance(part, list) else part, inside) for part in (*state[0], *state[1:])
        )
    raise _Unfit(f"a {type(value).__name__}")


def _frame(steps: Any) -> Any:
    """Freeze everything that a suspended generator remembers: its variables,
    and its stack (such as the iterator of a `for`).
    """
    frame: FrameType | None = steps.gi_frame
    if frame is None:
        return None
    variables = []
    for name, value in sorted(frame.f_locals.items()):
        try:
            variables.append((name, _frozen(value)))
        except _Unfit as unfit:
            raise (unfit if "(" in str(unfit) else _Unfit(f"{unfit} ({name})")) from None
    hidden = (held for held in gc.get_referents(steps) if not isinstance(held, _OF_EVERY_FRAME))
    return frame.f_code, frame.f_lasti, tuple(variables), tuple(map(_frozen, hidden))
