# SPDX-License-Identifier: Apache-2.0
"""One task of a fleet's replay: replay one VM of one recording in a store under several policies, and store the result.

A task may run anywhere and any number of times. Its result has the same bytes each time, and a name that is derived
from everything on which they depend; a result that exists already is left alone.
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
from traces.command_line import progress
from traces.errors import Problem
from traces.reader import Trace
from traces.stores.location import location
from traces.stores.object_store import Objects, StoredObject
from traces.stores.remote_trace import remote_trace
from traces.text import printable

_MEMORY: Final = "there was not enough memory for it"


@dataclass(frozen=True)
class PolicyText:
    """A policy by its name. For a user's own file it includes the text, since the task may run on another machine."""

    name: str
    text: str = ""

    @property
    def mark(self) -> str:
        """A text that identifies the policy, for people and for the names of
        tasks: it includes a hash of the file's text.
        """
        return (
            f"{Path(self.name).name} {hashlib.sha256(self.text.encode()).hexdigest()[:16]}" if self.text else self.name
        )


@dataclass(frozen=True)
class FleetTask:
    """The replay of one VM of the recording `trace`, a key below `root`.

    `decoded` is the approximate size of the VM's rows in memory, in bytes; `results` is the place for the result;
    `seconds` is the time that the task may take, and 0 means no limit.
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
        """The name of the task's result: a hash over the recording, the VM, the policies and kvmtrace's version."""
        told = [self.trace, self.etag, self.size, self.vm, [each.mark for each in self.policies], self.made_by]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]

    @property
    def text(self) -> str:
        """The task as it is named in messages."""
        return f"{self.trace}, VM {self.vm}"


@cache
def made_by() -> str:
    """Return the versions of kvmtrace and of the results' format, on which the bytes of a result depend."""
    return f"kvmtrace {version('kvmtrace')}, results {RESULTS_FORMAT['major']}.{RESULTS_FORMAT['minor']}"


def policy_texts(names: Sequence[str]) -> tuple[PolicyText, ...]:
    """Return the policies that a user names. Raises Problem if one is a file that cannot be read."""
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
    """Run a task unless its result exists, and return the reason if it failed, else an empty text."""
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
    """Return the rows of a task's result, replayed from its trace."""
    capabilities = Capabilities(trace)
    with _policies(task.policies) as names:
        wanted = planned(capabilities, names)
        replayed = run.replay(wanted, Settings(), only=task.vm)
    return rows_of(replayed, task.trace, task.etag, task.vm)


def planned(capabilities: Capabilities, names: Sequence[str]) -> Plan:
    """Return the plan for these policies and the recorded one, with which all others are compared."""
    return plan.make(capabilities, list(dict.fromkeys([capabilities.own.name, *(names or plan.DEFAULT)])))


@contextmanager
def _policies(policies: Sequence[PolicyText]) -> Iterator[list[str]]:
    """Give the names of policies as `plan.make` takes them; a user's own file is written to a temporary directory."""
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
