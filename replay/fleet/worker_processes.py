# SPDX-License-Identifier: Apache-2.0
"""An Executor of processes on this machine, in which a process that dies fails its own task and no other.

`concurrent.futures.ProcessPoolExecutor` fails all of its tasks when one of its processes dies, and does not say which
process was running which task. So there is one pool of one process for each slot, recreated when it breaks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess, parent_process
from typing import Any, Final, ParamSpec, TypeVar

Given = ParamSpec("Given")
Found = TypeVar("Found")

OUT_OF_TIME: Final = "killed by SIGALRM"  # time_limit.py ends a process in this way
_WAIT: Final = 10.0  # seconds to wait for the exit code of a process that died


class WorkerDied(Exception):
    """The process that was running a task ended; the text says how."""


class WorkerProcesses(Executor):
    """An Executor with `count` processes.

    `preload` are modules that every process needs: a fork server imports them once, and the processes are forked from
    it.
    """

    def __init__(self, count: int, preload: tuple[str, ...] = ()) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        self._context = context
        self._slots: list[_Slot] = []
        self._own = threading.local()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="slot")

    def submit(self, function: Callable[Given, Found], /, *args: Given.args, **kwargs: Given.kwargs) -> Future[Found]:
        """Run a function in a process. The future raises WorkerDied if that process ends."""
        return self._threads.submit(self._run, function, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes when their tasks are done; with `cancel_futures` at once, whatever they do."""
        if cancel_futures:
            self._threads.shutdown(wait=False, cancel_futures=True)
            for slot in list(self._slots):
                slot.kill()
        self._threads.shutdown(wait)
        for slot in self._slots:
            slot.end()

    def _run(self, function: Callable[Given, Found], /, *args: Given.args, **kwargs: Given.kwargs) -> Found:
        slot = getattr(self._own, "slot", None)
        if slot is None:
            slot = self._own.slot = _Slot(self._context)
            with self._lock:
                self._slots.append(slot)
        found: Found = slot.run(function, *args, **kwargs)
        return found


class _Slot:
    """A pool of one process, which belongs to the thread that uses it."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._pool: ProcessPoolExecutor | None = None
        self._process: BaseProcess | None = None

    def run(self, function: Callable[..., Found], /, *args: Any, **kwargs: Any) -> Found:
        try:
            if self._pool is None:
                # The fork server has the environment from when it was started, so pass the current one.
                self._pool = ProcessPoolExecutor(
                    1, mp_context=self._context, initializer=_begin, initargs=(dict(os.environ),)
                )
                pid = self._pool.submit(os.getpid).result()
                self._process = next(each for each in multiprocessing.active_children() if each.pid == pid)
            return self._pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            how = self._ended()
            self.end()
            raise WorkerDied(how) from None

    def kill(self) -> None:
        """Kill the process, whatever it does."""
        if self._process is not None:
            with contextlib.suppress(ValueError):  # the process object was closed already
                self._process.kill()

    def end(self) -> None:
        """End the process when it is done with its task."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = self._process = None

    def _ended(self) -> str:
        code = None
        if self._process is not None:
            self._process.join(_WAIT)
            code = self._process.exitcode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-code).name
                return f"killed by {name}" + (", as the kernel does when memory runs out" if code == -9 else "")
        return "it ended by itself" if code is None else f"it ended with code {code}"


def _begin(environment: Mapping[str, str]) -> None:
    """Set up a new process: ignore ^C, which is for the parent; take its environment; and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
