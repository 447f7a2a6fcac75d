# SPDX-License-Identifier: Apache-2.0
"""Remember the results of a function of shared memory by what it read,
in a tree of the fields that it reads in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

Leaf = TypeVar("Leaf")


class _Fork:
    __slots__ = ("place", "ways")

    def __init__(self, place: int) -> None:
        self.place = place
        self.ways: dict[Any, Any] = {}


class Memo(Generic[Leaf]):
    """The results of one deterministic function.

    It is sound because such a function, having read the same values so far, reads the same field next.
    """

    __slots__ = ("root",)

    def __init__(self) -> None:
        self.root: Any = None

    def look(self, values: Sequence[Any]) -> Leaf | None:
        """Return the result for this memory, if one is known for the same values of the fields that matter.

        Else None.
        """
        node = self.root
        while node.__class__ is _Fork:
            node = node.ways.get(values[node.place])
        return node  # type: ignore[no-any-return]

    def store(self, reads: Mapping[int, Any], leaf: Leaf) -> None:
        """Remember a result; `reads` has the fields and values in the order in which they were read."""
        if not reads:
            self.root = leaf
            return
        *path, last = reads
        node = self.root = self.root or _Fork(next(iter(reads)))
        for place, following in zip(path, list(reads)[1:], strict=True):
            node = node.ways.setdefault(reads[place], _Fork(following))
        node.ways[reads[last]] = leaf
