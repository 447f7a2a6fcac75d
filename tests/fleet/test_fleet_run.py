# SPDX-License-Identifier: Apache-2.0
"""Which tasks run when, and what a death, an error or an earlier run does to them: in threads and small processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from replay.fleet import fleet_run
from replay.fleet.fleet_catalogue import Catalogue
from replay.fleet.fleet_schema import CATALOGUE, RESULTS
from replay.fleet.fleet_task import FleetTask, PolicyText, policy_texts
from replay.fleet.results import ResultFolder, Results
from replay.fleet.worker_processes import WorkerDied, WorkerProcesses
from traces.errors import Problem
from traces.stores.location import location

SIZES = [5, 900, 40, 300, 300, 20, 1000, 7, 60, 110]


@dataclass
class Threads:
    """An engine of threads, which remembers what was under way."""

    slots: int = 4
    memory: int = 1000
    name: str = "threads"
    executor: Executor = field(default_factory=lambda: ThreadPoolExecutor(8))

    def died(self, error: BaseException) -> str:
        return str(error) if isinstance(error, WorkerDied) else ""


@pytest.fixture
def folder(tmp_path: Path) -> ResultFolder:
    found = ResultFolder(location(str(tmp_path / "results")), make=True)
    found.claim({"policies": []})
    return found


def catalogue(sizes: list[int]) -> Catalogue:
    rows = [
        {
            "trace": f"{number}.parquet", "etag": "e", "size": 9, "vm": 1, "vcpus": 2, "events": size, "decoded": size,
            "lost": number % 2, "kernel": "6.1.0" if number % 3 else "5.10", "policy": "preserve", "reason": "",
        }
        for number, size in enumerate(sizes)
    ]  # fmt: skip
    rows.append({"trace": "broken.parquet", "size": 3, "reason": "damaged"})
    rows.append({**rows[0], "trace": "no-vcpu.parquet", "vcpus": 0})
    return Catalogue("/traces", pl.DataFrame(pl.from_arrow(pa.Table.from_pylist(rows, CATALOGUE))))


def tasks(folder: ResultFolder, sizes: list[int] = SIZES) -> dict[str, tuple[FleetTask, dict[str, Any]]]:
    found = catalogue(sizes)
    return fleet_run.tasks_of(found, fleet_run.chosen(found, ""), (PolicyText("async"),), folder.place.text)


class Work:
    """What tasks do: they are seen while under way, and write one row."""

    def __init__(self, folder: ResultFolder, fails: dict[str, Any] | None = None, seconds: float = 0.02) -> None:
        self.folder, self.fails, self.seconds = folder, fails or {}, seconds
        self.lock = threading.Lock()
        self.under_way: list[FleetTask] = []
        self.together: list[list[FleetTask]] = []
        self.begun: list[FleetTask] = []

    def __call__(self, task: FleetTask) -> str:
        with self.lock:
            self.under_way.append(task)
            self.begun.append(task)
            self.together.append(list(self.under_way))
        try:
            time.sleep(self.seconds)
            outcome = self.fails.get(task.trace, "")
            outcome = outcome.pop(0) if isinstance(outcome, list) and outcome else outcome or ""
            if isinstance(outcome, BaseException):
                raise outcome
            if not outcome:
                self.folder.put(task.id, pa.Table.from_pylist([{"row": "vm", "trace": task.trace}], RESULTS))
            return str(outcome)
        finally:
            with self.lock:
                self.under_way.remove(task)


def traces(folder: ResultFolder, row: str = "vm") -> list[str]:
    return sorted(Results(folder).rows().filter(pl.col("row") == row).collect()["trace"].to_list())


ALL = [f"{number}.parquet" for number in range(len(SIZES))]


def test_the_largest_first_and_no_more_under_way_than_fit(folder: ResultFolder) -> None:
    work = Work(folder)
    done = fleet_run.run(tasks(folder), folder, Threads(), 1000, perform=work)
    assert (done.done, done.failed, done.before) == (len(SIZES), [], 0)
    assert traces(folder) == ALL
    assert all(sum(task.decoded for task in each) <= 1000 for each in work.together)
    assert all(len(each) <= 4 for each in work.together)
    assert max(map(len, work.together)) > 1
    assert work.begun[0].decoded == 1000
    assert [task.decoded for task in work.begun[:3]] == [1000, 900, 300] or work.begun[1].decoded == 900


def test_one_is_always_under_way_however_large(folder: ResultFolder) -> None:
    work = Work(folder)
    fleet_run.run(tasks(folder), folder, Threads(), 1, perform=work)
    assert traces(folder) == ALL
    assert max(map(len, work.together)) == 1


def test_what_is_done_or_failed_is_not_done_again(folder: ResultFolder) -> None:
    first = Work(folder, {"3.parquet": "its reason"})
    done = fleet_run.run(tasks(folder), folder, Threads(), perform=first)
    assert [(each.task.trace, each.reason) for each in done.failed] == [("3.parquet", "its reason")]
    assert traces(folder, "failed") == ["3.parquet"]
    second = Work(folder)
    done = fleet_run.run(tasks(folder), folder, Threads(), perform=second)
    assert (done.before, done.failed_before, done.done, second.begun) == (10, 1, 0, [])
    third = Work(folder)
    done = fleet_run.run(tasks(folder), folder, Threads(), perform=third, retry_failed=True)
    assert [task.trace for task in third.begun] == ["3.parquet"]
    assert (done.done, done.failed_before) == (1, 0)
    assert traces(folder) == ALL
    assert traces(folder, "failed") == []


def test_an_error_is_its_own_tasks(folder: ResultFolder) -> None:
    work = Work(folder, {"1.parquet": RuntimeError("odd\nthing"), "6.parquet": OSError(28, "No space")})
    done = fleet_run.run(tasks(folder), folder, Threads(), perform=work)
    reasons = {each.task.trace: each.reason for each in done.failed}
    assert reasons == {"1.parquet": "RuntimeError: odd", "6.parquet": "OSError: [Errno 28] No space"}
    assert traces(folder) == sorted(set(ALL) - set(reasons))


def test_whose_worker_died_is_tried_alone_and_blamed_only_then(folder: ResultFolder) -> None:
    always = [WorkerDied("killed by SIGKILL") for _ in range(9)]
    work = Work(folder, {"4.parquet": always, "2.parquet": [WorkerDied("killed by SIGKILL")]})
    done = fleet_run.run(tasks(folder), folder, Threads(), perform=work)
    assert [each.task.trace for each in done.failed] == ["4.parquet"]
    assert done.failed[0].reason == "the process that replays it died, alone and 3 times: killed by SIGKILL"
    assert traces(folder) == sorted(set(ALL) - {"4.parquet"})
    again = [each for each in work.together if each[-1].trace in ("2.parquet", "4.parquet")][2:]
    assert len(again) == 3
    assert all(len(each) == 1 for each in again)


def test_a_condition_chooses_and_is_never_python() -> None:
    found = catalogue(SIZES)
    assert len(fleet_run.chosen(found, "")) == 10
    assert len(fleet_run.chosen(found, "kernel LIKE '6.1%' AND lost = 0")) == 3
    for text in ("nothing = 1", "kernel", "__import__('os').system('false')", "1 +", "trace; DROP TABLE x"):
        with pytest.raises(Problem, match=r"^--where .*: the columns are trace, etag"):
            fleet_run.chosen(found, text)


def test_a_tasks_name_is_of_all_that_its_result_depends_on(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1")
    one = FleetTask("/r", "a", "e", 1, 1, 5, policy_texts([str(tmp_path / "mine.py"), "async"]), "/o", "v1")
    (tmp_path / "mine.py").write_text("x = 2")
    other = policy_texts([str(tmp_path / "mine.py"), "async"])
    changed = [
        replace(one, trace="b"), replace(one, etag="f"), replace(one, vm=2), replace(one, made_by="v2"),
        replace(one, policies=other), replace(one, policies=one.policies[:1]), replace(one, size=2),
    ]  # fmt: skip
    assert len({each.id for each in [one, *changed]}) == 8
    same = [replace(one, root="/s"), replace(one, results="/p"), replace(one, decoded=6)]
    assert {each.id for each in same} == {one.id}
    with pytest.raises(Problem, match="No such file"):
        policy_texts([str(tmp_path / "none.py")])


def _ended(how: str) -> int:
    if how == "exit":
        os._exit(7)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise ValueError("its own")
    if how == "sleep":
        time.sleep(600)
    return os.getpid()


@pytest.mark.slow
def test_a_process_that_dies_takes_no_other_task_along() -> None:
    with WorkerProcesses(2) as processes:
        futures = [processes.submit(_ended, how) for how in ("", "kill", "", "exit", "", "raise", "", "")]
        wait(futures)
        errors = [repr(future.exception()) for future in futures]
        pids = {future.result() for future in futures if future.exception() is None}
    assert errors[1] == repr(WorkerDied("killed by SIGKILL, as the kernel does when memory runs out"))
    assert errors[3] == repr(WorkerDied("it ended with code 7"))
    assert errors[5] == repr(ValueError("its own"))
    assert [error for at, error in enumerate(errors) if at not in (1, 3, 5)] == ["None"] * 5
    assert os.getpid() not in pids


@pytest.mark.slow
def test_processes_end_at_once_when_they_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMTRACE_TEST", "seen")
    processes = WorkerProcesses(2)
    assert processes.submit(os.getenv, "KVMTRACE_TEST").result() == "seen"
    slow = [processes.submit(_ended, "sleep") for _ in range(3)]
    time.sleep(0.5)
    processes.shutdown(cancel_futures=True)
    assert all(future.cancelled() or isinstance(future.exception(), WorkerDied) for future in slow)
