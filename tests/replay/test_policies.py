# SPDX-License-Identifier: Apache-2.0
"""Policies of users: the examples, what is asked of a file, and plans."""

from __future__ import annotations

import importlib.metadata
import inspect
from pathlib import Path
from typing import Any

import pytest

from replay import plan, run
from replay.decode.capabilities import Capabilities
from replay.examples import idle_time, keep_n
from replay.run import Outcome
from replay.simulate.policy_api import Policy
from traces.errors import Problem
from traces.reader import Trace

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "replay" / "examples"
CORPUS = ROOT / "traces" / "corpus"
LOADS = 9  # of smi-storm: one, and two for each of four SMIs


def storm(source: str, *policies: str) -> list[Outcome]:
    capabilities = Capabilities(Trace.open(CORPUS / f"smi-storm-{source}.parquet"))
    return run.replay(plan.make(capabilities, policies)).outcomes


def written(directory: Path, text: str) -> str:
    path = directory / "mine.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("module", [keep_n, idle_time])
def test_examples_are_as_short_as_promised(module: Any) -> None:
    assert len(inspect.getsource(module).splitlines()) <= 40


@pytest.mark.parametrize(("kept", "roots"), [(0, LOADS), (1, LOADS), (2, 2), (9, 2)])
def test_keep_n_lies_between_the_kernels(tmp_path: Path, kept: int, roots: int) -> None:
    text = (EXAMPLES / "keep_n.py").read_text().replace(f"N = {keep_n.N}\n", f"N = {kept}\n")
    mine, old, new = storm("6.1-async", written(tmp_path, text), "async", "preserve")
    assert mine.target.name == f"keep-{kept}"
    counts = mine.counts()
    assert counts["creations"] == roots
    like = (old if roots == LOADS else new).counts()
    assert {name: counts[name] for name in ("faults", "tables_built", "frees")} == {
        name: like[name] for name in ("faults", "tables_built", "frees")
    }
    # With one root kept, it is always the other one that is needed next.
    assert mine.roots_peak == (2 if kept else 1)
    assert mine.frees["policy"] == {0: LOADS, 1: LOADS - 1}.get(kept, 0)


@pytest.mark.parametrize(("limit", "roots"), [(0, LOADS), (1 << 62, 2)])
def test_idle_time_frees_what_is_not_used_in_time(tmp_path: Path, limit: int, roots: int) -> None:
    text = (EXAMPLES / "idle_time.py").read_text().replace(f"IDLE_NS = {idle_time.IDLE_NS:_}", f"IDLE_NS = {limit}")
    assert str(limit) in text
    (mine,) = storm("6.1-async", written(tmp_path, text))
    assert mine.counts()["creations"] == roots


def test_idle_time_as_it_is_lets_go_of_some() -> None:
    (mine,) = storm("6.1-async", str(EXAMPLES / "idle_time.py"))
    assert 2 < mine.counts()["creations"] < LOADS
    assert mine.frees["policy"] == mine.counts()["creations"] - 2


def test_from_a_recording_that_kept_roots_there_is_an_interval() -> None:
    low, high = storm("6.1", str(EXAMPLES / "idle_time.py"))
    assert (low.run.bound, high.run.bound) == ("low", "high")
    (true,) = storm("6.1-async", str(EXAMPLES / "idle_time.py"))
    assert low.counts()["faults"] <= true.counts()["faults"] <= high.counts()["faults"] + 514


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no subclass"),
        ("from replay.simulate.policy_api import Policy\n", "has no subclass"),
        (
            "from replay.simulate.policy_api import Policy\nclass A(Policy): ...\nclass B(Policy): ...\n",
            "has 2 subclasses",
        ),
        ("this is no Python\n", "does not load: SyntaxError"),
        ("1 / 0\n", "does not load: ZeroDivisionError"),
    ],
)
def test_a_file_without_one_policy_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(Problem, match=words) as problem:
        storm("6.1", written(tmp_path, text))
    assert "\n" not in str(problem.value)
    assert "mine.py" in str(problem.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="no such file"):
        storm("6.1", str(tmp_path / "none.py"))


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        importlib.metadata.EntryPoint("lazy", "replay.examples.idle_time:IdleTime", plan.GROUP),
        importlib.metadata.EntryPoint("wrong", "replay.simulate.reference:Vm", plan.GROUP),
        importlib.metadata.EntryPoint("gone", "replay.nowhere:Policy", plan.GROUP),
    ]
    monkeypatch.setattr(plan, "_entries", lambda: entries)
    (mine,) = storm("6.1-async", "lazy")
    assert mine.target.policy is idle_time.IdleTime
    with pytest.raises(Problem, match="no subclass"):
        storm("6.1", "wrong")
    with pytest.raises(Problem, match="does not load"):
        storm("6.1", "gone")


def test_the_rules_of_a_kernel_are_the_default() -> None:
    class Plain(Policy):
        pass

    capabilities = Capabilities(Trace.open(CORPUS / "smi-both-6.1-async.parquet"))
    (reference,) = run.replay(
        plan.Plan(
            capabilities, (plan.Target("plain", capabilities.kernel, Plain.parameters, Plain, False, (), (_EXACT,)),)
        )
    ).outcomes
    (engine,) = run.replay(plan.make(capabilities, ["async"])).outcomes
    assert reference.counts() == engine.counts()
    assert reference.frees == engine.frees


_EXACT = plan.Run("exact", False, plan.Case())


LEAKS = """
from replay.simulate.reference import Root
from replay.simulate.policy_api import Policy
from replay.simulate.page_table import Table


class Leaks(Policy):
    name = "leaks"

    def on_vm_end(self, vm):
        vm.roots.append(Root(99, 0, Table(4, 0), 0))
"""


def test_a_broken_invariant_names_the_event_and_what_went_before(tmp_path: Path) -> None:
    left = r"leaks: VM 1, row [\d,]+, END: VM end: 1 roots and 0 tables are left"
    with pytest.raises(Problem, match=left) as raised:
        storm("6.1-async", written(tmp_path, LEAKS))
    assert raised.value.code == 1
    assert "before: root" in str(raised.value)
    assert "\n" not in str(raised.value)
