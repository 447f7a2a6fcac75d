# SPDX-License-Identifier: Apache-2.0
"""What a scenario is built from: things in shared memory, actors that act on them, invariants, locks and RCU."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from replay.explore.memory import Broken, Memory, Thing, free


class Step(NamedTuple):
    """What an actor is about to do, and the condition that it waits for, if any."""

    label: str
    ready: Callable[[], Any] | None = None


Steps = Generator[str | Step, None, Any]


def until(label: str, ready: Callable[[], Any]) -> Step:
    """Return a step to yield that happens only in states where `ready()` is true."""
    return Step(label, ready)


def require(condition: Any, invariant: str, detail: str = "") -> None:
    """Report a violation of this invariant unless the condition holds, as WARN_ON and BUG_ON do in the kernel."""
    if not condition:
        raise Broken(invariant, detail)


@dataclass(frozen=True)
class Part:
    """An actor as the scenario described it; a `daemon` need not finish."""

    name: str
    start: Callable[[], Steps]
    daemon: bool


@dataclass(frozen=True)
class Invariant:
    """A named predicate, which must hold in every state or at the end only."""

    name: str
    holds: Callable[[], Any]


class Model:
    """A model that a scenario builds and the search then explores; actors must not add anything to it."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.parts: list[Part] = []
        self.everywhere: list[Invariant] = []
        self.ends: list[Invariant] = []

    def thing(self, name: str, kind: str = "", /, **fields: Any) -> Thing:
        """Add a thing with these fields. With a `kind` it can be freed, and violations about that name the kind."""
        return Thing(self.memory, name, kind, fields)

    def actor(self, name: str, steps: Callable[..., Steps], *arguments: Any, daemon: bool = False) -> None:
        """Add an actor: `steps(*arguments)` yields what it is about to do.

        What follows up to the next yield is one step.

        It must be deterministic, touch shared memory only after its first yield, and keep across a yield only what
        cannot change (or an iterator over that). A `daemon`, such as a worker that waits for work, need not end.
        """
        self.parts.append(Part(name, lambda: steps(*arguments), daemon))

    def always(self, invariant: str, holds: Callable[[], Any]) -> None:
        """Require that the predicate holds in every state."""
        self.everywhere.append(Invariant(invariant, holds))

    def at_end(self, invariant: str, holds: Callable[[], Any]) -> None:
        """Require that the predicate holds when all actors but daemons have ended and nothing more can happen."""
        self.ends.append(Invariant(invariant, holds))

    @property
    def me(self) -> str:
        """The name of the actor whose step is running."""
        return self.memory.actor


class Mutex:
    """A lock for one holder: a kernel mutex or spinlock. Locking is a step of its own; unlocking is part of a step.

    That loses no interleaving: an unlock only lets others continue, so it is enough to have it as early as possible, in
    the step before it.
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
    """A lock for one writer or many readers, as mmu_lock is since 5.12.

    Unlocking is part of a step, as with `Mutex`.
    """

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
    """RCU read-side sections, and the things that wait to be freed.

    A thing is freed the moment its grace period is over.

    The kernel may free it later. But the earliest moment is the worst case: whoever accesses a thing after it was freed
    later also accesses it after it was freed earlier.
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
        """call_rcu(): free the thing when all actors that are in a read-side section now have left theirs."""
        self._settle((*self.state.waiting, (thing, self.state.readers)))

    def barrier(self) -> Step:
        """Return a step to yield that waits until nothing is left to be freed: rcu_barrier()."""
        return until("rcu_barrier()", lambda: not self.state.waiting)

    def _settle(self, waiting: Iterable[tuple[Thing, frozenset[str]]]) -> None:
        left = []
        for thing, readers in waiting:
            if readers:
                left.append((thing, readers))
            else:
                free(thing)
        self.state.waiting = tuple(left)
