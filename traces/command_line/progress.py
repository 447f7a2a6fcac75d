# SPDX-License-Identifier: Apache-2.0
"""What a command is doing, on one line of the terminal: every long job of the product shows itself here.

    with Progress("replaying", metadata.events) as progress:
        for batch in batches:
            ...
            progress.at(row)

Nothing is shown unless standard error is a terminal and the job takes more than a second. Of jobs within jobs the
innermost is shown. rich draws, in a thread of its own: most of what takes long is inside a library's call.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Final, Self

from traces.command_line import interrupts
from traces.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Drawn
    from rich.progress import TaskID

DELAY: Final = 1.0  # seconds before anything is shown
_REFRESHES: Final = 5  # a second


class Progress:
    """A job, shown from entering its `with` block to the end; `total` is how many steps it has, if that is known."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what = what
        self.total = total
        self.done = 0

    def __enter__(self) -> Self:
        _LINE.begin(self)
        return self

    def __exit__(self, *_: object) -> None:
        _LINE.end(self)

    @property
    def shown(self) -> bool:
        """Whether the line is on screen; if not, a text that takes effort to make can be spared."""
        return _LINE.drawn is not None

    def at(self, done: int) -> None:
        """Report that at least `done` steps are done: VMs that are replayed in parallel do not report in order."""
        interrupts.stop_if_interrupted()
        self.done = max(self.done, done)
        _LINE.update()

    def say(self, what: str) -> None:
        """Set what is being done from now on."""
        self.what = what
        _LINE.update()


def hide() -> None:
    """Show nothing in this process from now on, because another one has the terminal."""
    _LINE.hidden = True


class _Line:
    """The line of the terminal, and the jobs under way, the innermost last."""

    def __init__(self) -> None:
        self.drawn: Drawn | None = None
        self.hidden = False
        self._task: TaskID | None = None
        self._jobs: list[Progress] = []
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def begin(self, job: Progress) -> None:
        with self._lock:
            self._jobs.append(job)
            if len(self._jobs) == 1 and not self.hidden and sys.stderr.isatty():
                self._timer = threading.Timer(DELAY, self._draw)
                self._timer.daemon = True
                self._timer.start()
        self.update()

    def end(self, job: Progress) -> None:
        with self._lock:
            self._jobs.remove(job)
            if self._jobs:
                self._refresh()
                return
            if self._timer is not None:
                self._timer.cancel()
            if self.drawn is not None:
                self.drawn.stop()
            self.drawn = self._timer = None

    def update(self) -> None:
        if self.drawn is not None:
            with self._lock:
                self._refresh()

    def _draw(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        with self._lock:
            if threading.current_thread() is not self._timer:
                return  # the job that it was to show ended just before
            self.drawn = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
                console=Console(stderr=True), transient=True, refresh_per_second=_REFRESHES,
                redirect_stdout=False, redirect_stderr=False,  # standard output is the command's answer
            )  # fmt: skip
            self._task = self.drawn.add_task("")
            self._refresh()
            self.drawn.start()

    def _refresh(self) -> None:
        if self.drawn is not None and self._task is not None and self._jobs:
            job = self._jobs[-1]
            count = f": {job.done:,}" if job.done and job.total is None else ""
            self.drawn.update(self._task, description=printable(job.what) + count, total=job.total, completed=job.done)


_LINE: Final = _Line()
