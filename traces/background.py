# SPDX-License-Identifier: Apache-2.0
"""A second thread for work that runs without the interpreter's lock, such as reading, and compressing by Arrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


class Background:
    """Runs work on a second thread while the caller goes on, one piece at a time, so that memory is bounded.

    An exception that a piece of work raised is raised by the next call.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._begun: Future[None] | None = None

    def do(self, work: Callable[[], None]) -> None:
        """Wait until the work before is done, then begin this piece of work."""
        self.wait()
        self._begun = self._thread.submit(work)

    def wait(self) -> None:
        """Wait until all work is done."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.result()

    def end(self) -> None:
        """End the thread once its work is done, whatever came of it; nothing can be begun after that."""
        self._thread.shutdown()


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the items; each is made on a second thread while the caller works on the one before."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item
