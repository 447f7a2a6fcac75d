# SPDX-License-Identifier: Apache-2.0
"""The registry of named queries: their sources, the kinds of event that they need, their lookup by name.

A query whose kinds of event were not recorded has no answer, and says why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, Generic, TypeVar

import polars as pl

from analysis.reading.result_source import Result
from analysis.reading.rows import Question
from analysis.reading.sources import HIDDEN, Recording
from traces.errors import Problem
from traces.text import printable

Source = TypeVar("Source", Recording, Result)
_MODULES: Final = tuple(
    f"analysis.queries.{name}"
    for name in (
        "recorded", "mapped_pages", "replayed", "by_vm", "exit_times", "removed", "drawn", "leaves", "guest_tasks",
    )
)  # fmt: skip
_QUERIES: Final[dict[str, Query[Any]]] = {}
_OLD_NAMES: Final = {"doings": "vcpu_states"}  # old names, accepted in 0.2 and no longer in 0.3


@dataclass(frozen=True)
class Query(Generic[Source]):
    """A named query: a callable that takes an opened recording or result and returns a LazyFrame.

    `needs` are the kinds of event without which there is no answer. `asks` returns the questions about a recording's
    rows that the query asks if it is called without options; so a recording can answer those of several queries in one
    pass.
    """

    name: str
    source: type[Source]
    needs: tuple[str, ...]
    asks: Callable[[Source], Iterable[Question]]
    make: Callable[..., pl.LazyFrame]

    def __call__(self, source: Source, **options: Any) -> pl.LazyFrame:
        """Make the query. Raises Problem for a source of the wrong type, or one without the kinds of event it needs."""
        if not isinstance(source, self.source):
            what = "recordings" if self.source is Recording else "results of `kvmtrace replay -o`"
            raise Problem(f"{source.path}: query {self.name} is for {what}")
        if isinstance(source, Recording):
            source.need(self.needs, f"query {self.name}")
        return self.make(source, **options)

    def lacking(self, source: Source) -> list[str]:
        """Return the kinds of event that the query needs and that were not watched."""
        return [kind for kind in self.needs if isinstance(source, Recording) and kind not in source.kinds]

    def questions(self, source: Source) -> list[Question]:
        """Return what the query will ask of the rows; nothing where it has no answer."""
        return [] if self.lacking(source) else list(self.asks(source))

    @property
    def about(self) -> str:
        """What the query returns, in one line: the first of its docstring."""
        return (self.make.__doc__ or "").splitlines()[0]


def query(
    source: type[Source], needs: tuple[str, ...] = (), asks: Callable[[Source], Iterable[Question]] = lambda _: ()
) -> Callable[[Callable[..., pl.LazyFrame]], Query[Source]]:
    """Register a function of an opened source (and options) as a query, under the function's name."""

    def register(make: Callable[..., pl.LazyFrame]) -> Query[Source]:
        made = Query(make.__name__, source, needs, asks, make)
        _QUERIES[made.name] = made
        return made

    return register


def queries() -> dict[str, Query[Any]]:
    """Return all queries by name."""
    for module in _MODULES:
        import_module(module)
    return dict(sorted(_QUERIES.items()))


def named(name: str) -> Query[Any]:
    """Return the query of this name. Raises a Problem that lists all names where there is none."""
    known = queries()
    name = _OLD_NAMES.get(name, name)
    if name not in known:
        raise Problem(f"{name}: no such query; there are {', '.join(known)}")
    return known[name]


def unanswered(recording: Recording, asked: Iterable[Query[Any]]) -> list[str]:
    """Return why queries have no answer for a recording, one line for each reason."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    names: dict[str, list[str]] = defaultdict(list)
    for each in asked:
        if lacking := each.lacking(recording):
            hidden = not recording.hidden.isdisjoint(lacking)
            why = f"not observable: {HIDDEN}" if hidden else f"not recorded ({recording.why_not(lacking[0])})"
            found[why] |= dict.fromkeys(lacking)
            names[why].append(each.name)
    return [printable(f"{', '.join(kinds)} {why}: no {', '.join(names[why])}") for why, kinds in found.items()]
