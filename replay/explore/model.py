# SPDX-License-Identifier: Apache-2.0
"""What a scenario builds: things in shared memory, actors that step on them, invariants; and locks and RCU to use."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from replay.explore.memory import Broken, Memory, Thing, free


class Step(NamedTuple):
    """What an actor is about to do, and the condition it waits for, if any."""

    label: str
    ready: Callable[[], Any] | None = None


Steps = Generator[str | Step, None, Any]


def until(label: str, ready: Callable[[], Any]) -> Step:
    """To yield: the step comes only in states where `ready()` is true, and sees it true."""
    return Step(label, ready)


def require(condition: Any, invariant: str, detail: str = "") -> None:
    """A violation of this invariant unless the condition holds: what WARN_ON and BUG_ON are to the kernel."""
    if not condition:
        raise Broken(invariant, detail)


@dataclass(frozen=True)
class Part:
    """An actor as it was described; `daemon`: it need not finish."""

    name: str
    start: Callable[[], Steps]
    daemon: bool


@dataclass(frozen=True)
class Invariant:
    """A named predicate, for every state or for ends only."""

    name: str
    holds: Callable[[], Any]


class Model:
    """Built by a scenario, then explored; nothing may be added by the actors."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.parts: list[Part] = []
        self.everywhere: list[Invariant] = []
        self.ends: list[Invariant] = []

    def thing(self, name: str, kind: str = "", /, **fields: Any) -> Thing:
        """A thing with these fields. With a `kind` it can be freed, and the invariant of that has the kind's name."""
        return Thing(self.memory, name, kind, fields)

    def actor(self, name: str, steps: Callable[..., Steps], *arguments: Any, daemon: bool = False) -> None:
        """An actor: `steps(*arguments)` yields what it is about to do; what follows, up to the next yield, is one step.

        It must be deterministic, touch shared memory only after its first yield, and keep across a yield only what
        cannot change (or an iterator over that). A `daemon` need not end: a worker that waits for work.
        """
        self.parts.append(Part(name, lambda: steps(*arguments), daemon))

    def always(self, invariant: str, holds: Callable[[], Any]) -> None:
        """The predicate holds in every state."""
        self.everywhere.append(Invariant(invariant, holds))

    def at_end(self, invariant: str, holds: Callable[[], Any]) -> None:
        """The predicate holds when all actors but daemons have ended and nothing more can happen."""
        self.ends.append(Invariant(invariant, holds))

    @property
    def me(self) -> str:
        """The actor whose step is running."""
        return self.memory.actor


class Mutex:
    """A lock for one: a kernel mutex or spinlock. To lock is a step of its own; to unlock is part of a step.

    That loses nothing: an unlock can only let others go on, so that it comes soonest with the step before it.
    """

    def __init__(self, model: Model, name: str) -> None:
        self.name = name
        self.state = model.thing(name, held=False)

    def lock(self) -> Steps:
        yield until(f"locks {self.name}", lambda: not self.state.held)
        self.state.held = True

    def unlock(self) -> None:
        self.state.held = False


class RwLock:
    """A lock for one writer or many readers, as mmu_lock is since 5.12. Unlocking: see `Mutex`."""

    def __init__(self, model: Model, name: str) -> None:
        self.name = name
        self.state = model.thing(name, readers=0, writer=False)

    def read(self) -> Steps:
        yield until(f"locks {self.name} for read", lambda: not self.state.writer)
        self.state.readers += 1

    def read_unlock(self) -> None:
        self.state.readers -= 1

    def write(self) -> Steps:
        yield until(f"locks {self.name} for write", lambda: not self.state.writer and not self.state.readers)
        self.state.writer = True

    def write_unlock(self) -> None:
        self.state.writer = False


class Rcu:
    """Read sections and what waits for them. A thing is freed the moment its grace period is over.

    The kernel may free later. The soonest is the worst: what reads a thing freed later reads it freed sooner too.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.state = model.thing("rcu", readers=frozenset(), waiting=())

    def read_lock(self) -> None:
        self.state.readers |= {self.model.me}

    def read_unlock(self) -> None:
        me = self.model.me
        self.state.readers -= {me}
        self._settle((thing, readers - {me}) for thing, readers in self.state.waiting)

    def call_free(self, thing: Thing) -> None:
        """call_rcu(): free it when all that are in a read section now have left theirs."""
        self._settle((*self.state.waiting, (thing, self.state.readers)))

    def barrier(self) -> Step:
        """To yield: until nothing waits to be freed."""
        return until("rcu_barrier()", lambda: not self.state.waiting)

    def _settle(self, waiting: Iterable[tuple[Thing, frozenset[str]]]) -> None:
        left = []
        for thing, readers in waiting:
            if readers:
                left.append((thing, readers))
            else:
                free(thing)
        self.state.waiting = tuple(left)
