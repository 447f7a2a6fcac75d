# SPDX-License-Identifier: Apache-2.0
"""The shared memory of a model. Every read and write is observed, so that a step is characterised by what it read.

Nothing is stored in the things themselves: the memory of a state is one tuple, with a place for each field of each
thing. What a step does is a function of what it read (`memo.Memo`), which makes the search cheap; what it read and
wrote says which steps of different actors commute (`search`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from traces.errors import Problem


class Broken(Exception):
    """An invariant does not hold: `invariant` is its name, `detail` says in what way."""

    def __init__(self, invariant: str, detail: str = "") -> None:
        super().__init__(invariant)
        self.invariant = invariant
        self.detail = detail


class _Freed:
    def __repr__(self) -> str:
        return "freed"


FREED: Final = _Freed()


class Memory:
    """The memory's fields, and the step that is running: what it may read, and what it has read and written so far."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.initial: list[Any] = []
        self.given: Sequence[Any] | Mapping[int, Any] | None = None  # None: the model is being built
        self.actor = ""
        self.reads: dict[int, Any] = {}
        self.writes: dict[int, Any] = {}

    def begin(self, actor: str, given: Sequence[Any] | Mapping[int, Any]) -> None:
        """Start a step of `actor` on the memory of a state, or on the values that the same step read before."""
        self.actor, self.given = actor, given
        self.reads, self.writes = {}, {}

    def read(self, place: int) -> Any:
        if self.given is None:
            return self.initial[place]
        if place in self.writes:
            return self.writes[place]
        if place not in self.reads:
            try:
                self.reads[place] = self.given[place]
            except KeyError:
                raise Problem(
                    f"{self.actor or 'an invariant'}: reads {self.names[place]} where it did not before; actors may "
                    "touch shared memory only after their first yield, and keep nothing outside of the model"
                ) from None
        return self.reads[place]

    def write(self, place: int, value: Any) -> None:
        try:
            hash(value)
        except TypeError:
            raise Problem(
                f"{self.names[place]} is given a {type(value).__name__}; fields hold what cannot change, such as "
                "numbers, strings, tuples, frozensets and things"
            ) from None
        if self.given is None:
            self.initial[place] = value
        else:
            self.writes[place] = value


class Thing:
    """A piece of shared memory with named fields, made by `Model.thing`. Fields are read and assigned as usual."""

    __slots__ = ("_kind", "_memory", "_name", "_places")

    _kind: str
    _memory: Memory
    _name: str
    _places: dict[str, int]

    def __init__(self, memory: Memory, name: str, kind: str, fields: Mapping[str, Any]) -> None:
        for slot, value in (("_memory", memory), ("_name", name), ("_kind", kind), ("_places", {})):
            object.__setattr__(self, slot, value)
        for field, value in fields.items():
            self._places[field] = len(memory.names)
            memory.names.append(f"{name}.{field}")
            memory.initial.append(None)
            memory.write(self._places[field], value)

    def _place(self, field: str) -> int:
        try:
            return self._places[field]
        except KeyError:
            raise AttributeError(f"{self._name} has no field {field}") from None

    def __getattr__(self, field: str) -> Any:
        value = self._memory.read(self._place(field))
        if value is FREED:
            raise Broken(f"no access to a freed {self._kind}", f"{self._name}.{field} is read")
        return value

    def __setattr__(self, field: str, value: Any) -> None:
        place = self._place(field)
        if self._kind and self._memory.read(place) is FREED:
            raise Broken(f"no access to a freed {self._kind}", f"{self._name}.{field} is written")
        self._memory.write(place, value)

    def __repr__(self) -> str:
        return self._name


def free(thing: Thing) -> None:
    """Free a thing that was made with a `kind`: from now on every access to it is a violation."""
    if not thing._kind:
        raise Problem(f"{thing} was made without a kind, so that it cannot be freed")
    places = thing._places.values()
    if any(thing._memory.read(place) is FREED for place in places):
        raise Broken(f"no {thing._kind} is freed twice", f"{thing}")
    for place in places:
        thing._memory.write(place, FREED)


def freed(thing: Thing) -> bool:
    """Return whether a thing has been freed; for invariants only, since an actor cannot know."""
    return thing._memory.read(next(iter(thing._places.values()))) is FREED
