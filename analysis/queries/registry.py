# SPDX-License-Identifier: Apache-2.0
"""Named queries: what each asks, the kinds of event it needs, and where to find it by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, Generic, TypeVar

import polars as pl

from analysis.rows import Question
from analysis.sources import Recording, Result
from traces.errors import Problem

Source = TypeVar("Source", Recording, Result)
_MODULES: Final = tuple(
    f"analysis.queries.{name}"
    for name in ("recorded", "replayed", "by_vm", "exit_times", "removed", "drawn", "leaves", "guest_tasks")
)
_QUERIES: Final[dict[str, Query[Any]]] = {}
_OLD_NAMES: Final = {"doings": "vcpu_states"}  # accepted in 0.2, and no longer in 0.3


@dataclass(frozen=True)
class Query(Generic[Source]):
    """A named query: called with an opened recording or result it gives a LazyFrame.

    `needs`: kinds of event without which there is no answer. `asks`: what it will ask of a recording's rows, without
    options: whoever makes several queries lets the recording answer all that they ask in one pass.
    """

    name: str
    source: type[Source]
    needs: tuple[str, ...]
    asks: Callable[[Source], Iterable[Question]]
    make: Callable[..., pl.LazyFrame]

    def __call__(self, source: Source, **options: Any) -> pl.LazyFrame:
        """Raises Problem where the source is of the other sort, or was not watched for what the query needs."""
        if not isinstance(source, self.source):
            what = "recordings" if self.source is Recording else "results of `kvmtrace replay -o`"
            raise Problem(f"{source.path}: query {self.name} is for {what}")
        if isinstance(source, Recording):
            source.need(self.needs, f"query {self.name}")
        return self.make(source, **options)

    def lacking(self, source: Source) -> list[str]:
        """The kinds that it needs and that were not watched."""
        return [kind for kind in self.needs if isinstance(source, Recording) and kind not in source.kinds]

    def questions(self, source: Source) -> list[Question]:
        """What it will ask of the rows; nothing where there is no answer."""
        return [] if self.lacking(source) else list(self.asks(source))

    @property
    def about(self) -> str:
        """What it asks, in a line."""
        return (self.make.__doc__ or "").splitlines()[0]


def query(
    source: type[Source], needs: tuple[str, ...] = (), asks: Callable[[Source], Iterable[Question]] = lambda _: ()
) -> Callable[[Callable[..., pl.LazyFrame]], Query[Source]]:
    """Make a function of an opened source (and options) a query under the function's name."""

    def register(make: Callable[..., pl.LazyFrame]) -> Query[Source]:
        made = Query(make.__name__, source, needs, asks, make)
        _QUERIES[made.name] = made
        return made

    return register


def queries() -> dict[str, Query[Any]]:
    """All of them by name."""
    for module in _MODULES:
        import_module(module)
    return dict(sorted(_QUERIES.items()))


def named(name: str) -> Query[Any]:
    """The query of this name; a Problem that lists them where there is none."""
    known = queries()
    name = _OLD_NAMES.get(name, name)
    if name not in known:
        raise Problem(f"{name}: no such query; there are {', '.join(known)}")
    return known[name]
