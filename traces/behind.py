# SPDX-License-Identifier: Apache-2.0
"""Work for a second thread: what Arrow compresses and encodes, and what is read, holds no interpreter meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


class Behind:
    """Does what it is given while the caller goes on, in order; it holds one piece of work, so that memory is bounded.

    What a piece of work raised comes out of the next call.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._begun: Future[None] | None = None

    def do(self, work: Callable[[], None]) -> None:
        """Begin with this once all before it is done."""
        self.wait()
        self._begun = self._thread.submit(work)

    def wait(self) -> None:
        """Until all is done."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.result()

    def end(self) -> None:
        """Wait, whatever comes of it; nothing is done after that."""
        self._thread.shutdown()


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items; each is made while the caller is busy with the one before."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item
