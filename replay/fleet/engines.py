# SPDX-License-Identifier: Apache-2.0
"""The engines that run a fleet's tasks: processes of this machine, or Dask.

The rest of the code sees both as an Executor.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor
from contextlib import contextmanager
from typing import Any, Final, Protocol

from replay.fleet.worker_processes import WorkerDied, WorkerProcesses
from traces.command_line.extras import how_to_get
from traces.errors import ENVIRONMENT, Problem
from traces.text import printable

LOCAL: Final = "local"
DASK: Final = "dask"
MODULE: Final = "replay.fleet.fleet_task"  # importing it imports everything that a task needs
_SHARE: Final = 0.5  # the share of the available memory that the rows of tasks may take
_ASKED: Final = 2.0  # seconds between two requests to a scheduler for its workers
_CONNECT: Final = 15  # seconds to wait for a scheduler's answer
_PATIENCE: Final = 60  # seconds to wait for a scheduler's first worker


class FleetEngine(Protocol):
    """An executor for tasks, with the properties that scheduling needs."""

    name: str

    @property
    def executor(self) -> Executor:
        """The executor that runs the tasks."""

    @property
    def slots(self) -> int:
        """How many tasks to submit at a time: those it can run, and as many waiting ones as keep it from being idle."""

    @property
    def memory(self) -> int:
        """The bytes that the rows of all running tasks may take, if the user gives no limit."""

    def died(self, error: BaseException) -> str:
        """Say how the process of a task ended, judging by the task's exception; empty if the process did not end."""


@contextmanager
def opened(name: str, workers: int) -> Iterator[FleetEngine]:
    """Open the engine of that name for the duration of the `with`; on an exception its tasks are cancelled.

    Raises Problem if there is no such engine, or if it cannot be reached.
    """
    if name == LOCAL:
        with _local(workers) as local:
            yield local
    elif name == DASK or "://" in name:
        with _dask("" if name == DASK else name, workers) as dask:
            yield dask
    else:
        raise Problem(f"--engine {printable(name)}: give local, dask, or a scheduler's address such as tcp://HOST:8786")


class _Local:
    def __init__(self, workers: int) -> None:
        self.name = LOCAL
        self.slots = workers or os.cpu_count() or 1
        self.executor: Executor = WorkerProcesses(self.slots, (MODULE,))
        self.memory = int(_available() * _SHARE)

    def died(self, error: BaseException) -> str:
        return str(error) if isinstance(error, WorkerDied) else ""


@contextmanager
def _local(workers: int) -> Iterator[_Local]:
    engine = _Local(workers)
    try:
        yield engine
    except BaseException:
        engine.executor.shutdown(cancel_futures=True)
        raise
    engine.executor.shutdown()


class _Dask:
    def __init__(self, client: Any, name: str) -> None:
        self.name = name
        self.executor: Executor = client.get_executor(pure=False)
        self._client = client
        self._asked = 0.0
        self._workers: dict[str, Any] = {}

    @property
    def slots(self) -> int:
        # Each worker has one more task waiting, which it begins as soon as it is done with the one before.
        return sum(int(each["nthreads"]) + 1 for each in self._there().values())

    @property
    def memory(self) -> int:
        return int(sum(int(each["memory_limit"] or 0) for each in self._there().values()) * _SHARE) or _available()

    def died(self, error: BaseException) -> str:
        from distributed.scheduler import KilledWorker

        if isinstance(error, CancelledError):
            raise Problem(
                f"{self.name}: the scheduler is gone, or gave the tasks up: run the same again, what is done is kept",
                ENVIRONMENT,
            )
        return "killed, or ended, as when memory runs out" if isinstance(error, KilledWorker) else ""

    def _there(self) -> dict[str, Any]:
        if time.monotonic() - self._asked > _ASKED:
            self._workers = self._client.scheduler_info(n_workers=-1)["workers"]
            self._asked = time.monotonic()
        return self._workers


@contextmanager
def _dask(address: str, workers: int) -> Iterator[_Dask]:
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError:
        raise Problem(f"--engine: Dask is not installed: {how_to_get('distributed')}", ENVIRONMENT) from None
    count = workers or os.cpu_count() or 1
    # When a worker dies, Dask runs its tasks again, and fails them all once that has happened too often. In our own
    # cluster they fail at once, since fleet_run.py then tries each of them alone.
    settings = {
        "distributed.scheduler.allowed-failures": 0,
        "distributed.worker.preload": [MODULE],
        # By default a lost worker that is not back after 15 s, as when it dies again, is given up for good.
        "distributed.deploy.lost-worker-timeout": "1 day",
        # Nobody looks at Dask's dashboard. So do not sample each worker's stack every 10 ms or the machine twice a
        # second, nor check every 20 ms that each event loop runs: more than half of an idle cluster's CPU time.
        "distributed.worker.profile.enabled": False,
        "distributed.admin.system-monitor.interval": "5s",
        "distributed.admin.tick.interval": "1s",
    }
    new_client: Any = Client
    new_cluster: Any = LocalCluster
    said = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # failures of workers and schedulers are reported by us, in one line each
    try:
        with dask.config.set(settings), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that the dashboard has another port than usual
            if address:
                with new_client(address, timeout=_CONNECT, set_as_default=False) as client:
                    yield _ready(client, address, 1)
            else:
                with (
                    new_cluster(
                        n_workers=count,
                        threads_per_worker=1,
                        processes=True,
                        dashboard_address="127.0.0.1:0",  # for this machine only
                        silence_logs=logging.CRITICAL,
                    ) as cluster,
                    new_client(cluster, set_as_default=False) as client,
                ):
                    yield _ready(client, DASK, count)
    except (OSError, TimeoutError) as error:
        why = (str(error).splitlines() or ["it does not answer"])[0]
        raise Problem(f"--engine {printable(address or DASK)}: {printable(why[:200])}", ENVIRONMENT) from None
    finally:
        logging.disable(said)


def _ready(client: Any, name: str, least: int) -> _Dask:
    try:
        client.wait_for_workers(least, timeout=_PATIENCE)
    except TimeoutError:
        raise Problem(f"{name}: it has no worker: start some, such as `dask worker {name}`", ENVIRONMENT) from None
    return _Dask(client, name)


def _available() -> int:
    """Return the bytes of memory that are available, as /proc/meminfo says."""
    with open("/proc/meminfo") as file:  # noqa: PTH123
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 30
