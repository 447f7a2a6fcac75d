# SPDX-License-Identifier: Apache-2.0
"""One task of a fleet's replay: one VM of one recording under a list of policies, from a store, into a store.

It may run anywhere and any number of times: what it writes is the same bytes under the same name, which is made of all
that they depend on, and an object that is there is left alone.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from replay import plan, run
from replay.decode.capabilities import Capabilities
from replay.fleet.fleet_schema import RESULTS, RESULTS_FORMAT
from replay.fleet.outcome_rows import rows_of
from replay.fleet.results import ResultFolder
from replay.fleet.time_limit import limited
from replay.plan import Plan
from replay.timing.timed_run import Settings
from traces import progress
from traces.errors import Problem
from traces.reader import Trace
from traces.stores.location import location
from traces.stores.object_store import Objects, StoredObject
from traces.stores.remote_trace import remote_trace
from traces.text import printable

_MEMORY: Final = "there was not enough memory for it"


@dataclass(frozen=True)
class PolicyText:
    """A policy by its name; of a user's own file, with its text, so that it need not be where the task runs."""

    name: str
    text: str = ""

    @property
    def mark(self) -> str:
        """What tells it from others, for people and for the names of tasks."""
        return (
            f"{Path(self.name).name} {hashlib.sha256(self.text.encode()).hexdigest()[:16]}" if self.text else self.name
        )


@dataclass(frozen=True)
class FleetTask:
    """`trace` is a key below `root`; `decoded` about what the VM's rows take in memory, bytes; `results` a place.

    `seconds` that it may take; 0: no limit.
    """

    root: str
    trace: str
    etag: str
    size: int
    vm: int
    decoded: int
    policies: tuple[PolicyText, ...]
    results: str
    made_by: str
    seconds: float = 0.0

    @property
    def id(self) -> str:
        """The name of its result: the same for the same rows, policies and version, and for nothing else."""
        told = [self.trace, self.etag, self.size, self.vm, [each.mark for each in self.policies], self.made_by]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.trace}, VM {self.vm}"


@cache
def made_by() -> str:
    """What the bytes of a result depend on besides the recording and the policies."""
    return f"kvmtrace {version('kvmtrace')}, results {RESULTS_FORMAT['major']}.{RESULTS_FORMAT['minor']}"


def policy_texts(names: Sequence[str]) -> tuple[PolicyText, ...]:
    """Policies as a user names them. Raises Problem where a file of his cannot be read."""
    found = []
    for name in dict.fromkeys(names):
        if not (name.endswith(".py") or "/" in name):
            found.append(PolicyText(name))
            continue
        try:
            found.append(PolicyText(name, Path(name).read_text()))
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise Problem(f"--policy {printable(name)}: {why}") from None
    return tuple(found)


def perform(task: FleetTask) -> str:
    """Do a task, where its result is not there yet; why it cannot be done, empty where it was."""
    progress.hide()
    if task.made_by != made_by():
        return f"this worker is of {made_by()}, and the results are those of {task.made_by}: install the same"
    try:
        with limited(task.seconds):
            _perform(task)
    except Problem as problem:
        return printable(str(problem).removeprefix(f"{task.trace}: "))
    except MemoryError:
        return _MEMORY
    return ""


def _perform(task: FleetTask) -> None:
    results = _results(task.results)
    if results.has(task.id):
        return
    with remote_trace(_objects(task.root), StoredObject(task.trace, task.size, task.etag), task.vm) as trace:
        rows = rows_for(trace, task)
    results.put(task.id, pa.Table.from_pylist(rows, RESULTS))


def rows_for(trace: Trace, task: FleetTask) -> list[dict[str, Any]]:
    """The rows of a task's result, of its trace."""
    capabilities = Capabilities(trace)
    with _policies(task.policies) as names:
        wanted = planned(capabilities, names)
        replayed = run.replay(wanted, Settings(), only=task.vm)
    return rows_of(replayed, task.trace, task.etag, task.vm)


def planned(capabilities: Capabilities, names: Sequence[str]) -> Plan:
    """These policies and the recorded one, which all others are compared with."""
    return plan.make(capabilities, list(dict.fromkeys([capabilities.own.name, *(names or plan.DEFAULT)])))


@contextmanager
def _policies(policies: Sequence[PolicyText]) -> Iterator[list[str]]:
    """What `plan.make` takes: files of users' own are written anew."""
    if not any(each.text for each in policies):
        yield [each.name for each in policies]
        return
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for number, each in enumerate(policies):
            path = Path(folder) / str(number) / Path(each.name).name
            if each.text:
                path.parent.mkdir()
                path.write_text(each.text)
            names.append(str(path) if each.text else each.name)
        yield names


@lru_cache(4)
def _objects(place: str) -> Objects:
    return Objects(location(place))


@lru_cache(4)
def _results(place: str) -> ResultFolder:
    return ResultFolder(location(place))
