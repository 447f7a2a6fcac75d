# SPDX-License-Identifier: Apache-2.0
"""Every scenario that comes with kvmtrace, at its documented bounds; the verb; schedules that replay."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks import explore_table
from replay.explore import explore_text
from replay.explore.catalogue import find
from replay.explore.scenario import VIOLATION, ScenarioRun, run
from replay.explore.scenarios import SCENARIOS
from tests.verbs import answered
from traces.errors import Problem

pytestmark = pytest.mark.xdist_group("explore")  # each variant is explored once

ROOT = Path(__file__).parents[2]
VARIANTS = [(scenario.name, variant.name) for scenario in SCENARIOS for variant in scenario.variants]
APIC = "the APIC page is not mapped once APICv is inhibited"
COUNTED = "no table is counted at teardown"
EMPTY = "a root is empty when it is freed"
# The invariant that must break, and the steps of the shortest schedule; a variant that is not here holds.
BROKEN = {
    ("vm-destroy", "v2"): ("no access to a freed root", 11),
    ("last-put", "no-reference"): ("no writer sees a root with refcount 0", 7),
    ("last-put", "no-work"): ("zap_all_fast returns only after all roots that were there are zapped", 24),
    ("last-put", "preserve-unowned"): ("the final put is never of a valid root", 2),
    ("invalidate", "no-check"): (EMPTY, 16),
    ("invalidate", "early-check"): (EMPTY, 17),
    ("invalidate", "read-invalidate"): (EMPTY, 17),
    ("invalidate", "request-first"): ("no livelock", 11),
    ("invalidate", "one-look"): ("at most one valid root for a role word", 10),
    ("apicv", "read"): (APIC, 12),
    ("apicv", "read-count-seq"): (APIC, 14),
    ("apicv", "read-recheck"): (APIC, 13),
    ("apicv", "write"): (APIC, 12),
    ("apicv", "write-count"): (APIC, 14),
    ("apicv", "write-seq-yields"): (APIC, 16),
    ("apicv", "write-count-seq-late"): (APIC, 14),
    ("rmap", "fatal-lockless"): ("no walker to which that is fatal meets a non-present SPTE", 9),
    ("rmap", "walk-unlocked"): ("no access to a freed rmap descriptor", 9),
    ("rmap", "remove-unlocked"): ("no access to a freed rmap descriptor", 8),
    ("rmap", "add-unlocked"): ("to unlock a walk undoes nothing", 20),
    ("accounting", "plain-link"): (COUNTED, 16),
    ("accounting", "count-first"): (COUNTED, 17),
    ("accounting", "plain-counter"): (COUNTED, 17),
    ("accounting", "no-freeze"): (COUNTED, 17),
    ("accounting", "list-unlocked"): ("a table that is taken off the list is on it", 16),
    ("accounting", "list-read-recovery"): ("a table that is taken off the list is on it", 5),
    ("mmu-seq", "int"): ("no livelock", 12),
}


# Of many states: explored where there is time.
HEAVY = {
    ("invalidate", "request-first"), ("invalidate", "two-looks"), ("invalidate", "check"),
    ("mmu-seq", "int"), ("mmu-seq", "int-early"), ("mmu-seq", "unsigned-long"),
}  # fmt: skip


def light(variants: Iterable[tuple[str, str]]) -> list[Any]:
    """Parameters of tests of variants, those with many states marked."""
    heavy = [variant in HEAVY or variant[0] == "accounting" for variant in variants]
    return [
        pytest.param(*variant, marks=pytest.mark.slow if slow else ())
        for variant, slow in zip(variants, heavy, strict=True)
    ]


@cache
def made(scenario: str, variant: str) -> ScenarioRun:
    return run(find(scenario), variant, {})


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2
    assert not done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("kvmtrace: ")
    return line


@pytest.mark.parametrize(("scenario", "variant"), light(VARIANTS))
def test_each_variant_is_as_expected(scenario: str, variant: str) -> None:
    this = made(scenario, variant)
    assert this.outcome == this.variant.expect
    if (scenario, variant) in BROKEN:
        assert this.schedule is not None
        assert (this.schedule.invariant, len(this.schedule.lines)) == BROKEN[scenario, variant]
        assert this.exploration.shortest
    else:
        assert this.schedule is None


@pytest.mark.parametrize(("scenario", "variant"), light(BROKEN))
def test_its_schedule_replays_from_json(scenario: str, variant: str, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text(json.dumps({"runs": [explore_text.to_dict(made(scenario, variant))]}))
    (given,) = explore_text.schedules(path)
    replayed = explore_text.replay(given, None, str(path))
    assert (replayed["broken"], replayed["again"]) == (BROKEN[scenario, variant][0], True)


def test_every_scenario_has_both_kinds() -> None:
    for scenario in SCENARIOS:
        assert {variant.expect for variant in scenario.variants} == {"violation", "holds"}, scenario.name


def test_bounds_are_three_actors_and_four_roots_or_entries() -> None:
    for scenario in SCENARIOS:
        model = scenario.model(scenario.variants[-1].name, scenario.bounded({}))
        things = {name.rpartition(".")[0] for name in model.memory.names}
        assert len(model.parts) >= 3, scenario.name
        assert sum(re.fullmatch(r"R\d|spte\d|T\d[a-f]", name) is not None for name in things) >= 4, scenario.name


@pytest.mark.parametrize(
    ("scenario", "bounds"),
    [
        ("vm-destroy", {"roots": 2, "workers": 1}),
        pytest.param("vm-destroy", {"roots": 5, "workers": 3}, marks=pytest.mark.slow),
        ("last-put", {"roots": 2, "vcpus": 2}),
        ("apicv", {"vcpus": 1}),
        ("mmu-seq", {"vcpus": 2, "invalidations": 3}),
        pytest.param("accounting", {"vcpus": 2}, marks=pytest.mark.slow),
        ("rmap", {"sptes": 5, "walkers": 1}),
    ],
)
def test_the_outcome_is_the_same_at_other_bounds(scenario: str, bounds: dict[str, int]) -> None:
    for variant in find(scenario).variants:
        assert run(find(scenario), variant.name, bounds).outcome == variant.expect, variant.name


@pytest.mark.slow
def test_the_table_is_current() -> None:
    _, current, _ = explore_table.split(explore_table.DOCUMENT.read_text())
    written = [tuple(cell.strip() for cell in line.split("|")[1:-2]) for line in current.splitlines()[2:]]
    assert written == [row[:-1] for row in explore_table.rows(made(*names) for names in VARIANTS)]


def test_the_schedule_in_the_document_is_current() -> None:
    assert explore_text.render(made("vm-destroy", "v2")) in explore_table.DOCUMENT.read_text()


def test_list() -> None:
    done = answered("explore", "--list", "--json")
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    listed = {each["name"]: {v["name"]: v["expect"] for v in each["variants"]} for each in document["scenarios"]}
    assert listed == {each.name: {v.name: v.expect for v in each.variants} for each in SCENARIOS}
    text = " ".join(answered("explore", "--list").stdout.split())
    assert all(f"{each.name}: {each.title}" in text for each in SCENARIOS)


@pytest.mark.slow
def test_text_and_exit_codes() -> None:
    both = answered("explore", "vm-destroy")
    assert both.returncode == 1
    assert "vm-destroy v2: violation in 11 steps\n" in both.stdout
    assert "=> broken: no access to a freed root (R0.next is read)" in both.stdout
    assert "vm-destroy v3: no violation in 3,928 states, bounds roots=4, workers=2, " in both.stdout
    assert not both.stderr
    assert answered("explore", "vm-destroy", "--variant", "v2").returncode == 1
    assert answered("explore", "vm-destroy", "--variant", "v3").returncode == 0
    fewer = answered("explore", "vm-destroy", "--variant", "v3", "--bound", "roots=2", "--bound", "workers=1")
    assert "bounds roots=2, workers=1" in fewer.stdout


@pytest.mark.slow
def test_json_replays(tmp_path: Path) -> None:
    done = answered("explore", "apicv", "--variant", "write", "--variant", "write-count-seq", "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert [(each["variant"], each["outcome"], each["steps"]) for each in document["runs"]] == [
        ("write", "violation", 12), ("write-count-seq", "holds", None),
    ]  # fmt: skip
    assert document["runs"][0]["schedule"]["steps"][-1]["actor"] == "vcpu0"
    found = tmp_path / "found.json"
    found.write_text(done.stdout)
    again = answered("explore", "--replay", str(found))
    assert again.returncode == 1
    assert " ".join(again.stdout.split()) == f"apicv write, 12 steps: broken again: {APIC}"
    # The same steps without the last break nothing yet; the fixed variant cannot make them.
    short, fixed = json.loads(done.stdout)["runs"][0]["schedule"], document["runs"][0]["schedule"]
    short["steps"].pop()
    found.write_text(json.dumps(short))
    again = answered("explore", "--replay", str(found), "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["replays"][0]["broken"] is None
    fixed["variant"] = "write-recheck"
    found.write_text(json.dumps(fixed))
    assert "step 11 of apicv write-recheck: the schedule is out of date: vcpu0 does not reach" in one_line(
        answered("explore", "--replay", str(found))
    )


def changed(**changes: Any) -> dict[str, Any]:
    schedule = made("vm-destroy", "v2").schedule
    assert schedule is not None
    return {**schedule.to_dict(), **changes}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("no JSON", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not what kvmtrace explore --json prints"),
        ('{"runs": 3}', "not what kvmtrace explore --json prints"),
        ('{"runs": []}', "has no schedule"),
        ('{"runs": [{"schedule": null}]}', "has no schedule"),
        ('{"runs": [{"schedule": {"scenario": "apicv"}}]}', "not a schedule: KeyError: 'cycle'"),
        ("gone", "'gone' is no scenario of kvmtrace; give the file it is in"),
        ("path", "'./x.py' is no name of a scenario"),
        ("variant", "has no variant v4: it has v2, v3"),
        ("bound", "has no bound cows"),
        ("actor", "there is no actor nobody"),
        ("cycle", "not a schedule: ValueError"),
        ("early", "worker0 would have to wait: 'takes work from the queue'"),
    ],
)
def test_a_schedule_that_is_none(document: str, said: str, tmp_path: Path) -> None:
    documents = {
        "gone": changed(scenario="gone"),
        "path": changed(scenario="./x.py"),
        "variant": changed(variant="v4"),
        "bound": changed(bounds={"cows": 1}),
        "actor": changed(steps=[{"actor": "nobody", "step": "sleeps"}]),
        "cycle": changed(cycle=1000),
        "early": changed(steps=[{"actor": "worker0", "step": "takes work from the queue"}]),
    }
    path = tmp_path / "given.json"
    path.write_text(json.dumps(documents[document]) if document in documents else document)
    with pytest.raises(Problem) as problem:
        explore_text.replay(explore_text.schedules(path)[0], None, str(path))
    assert said in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.slow
def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert "there is no scenario cows: give vm-destroy, " in one_line(answered("explore", "cows"))
    assert "has no variant v4: it has v2, v3" in one_line(answered("explore", "vm-destroy", "--variant", "v4"))
    assert "has no bound cows: it has roots, workers" in one_line(
        answered("explore", "vm-destroy", "--bound", "cows=1")
    )
    assert "give NAME=N" in one_line(answered("explore", "vm-destroy", "--bound", "roots"))
    assert "at least 1" in one_line(answered("explore", "vm-destroy", "--bound", "roots=0"))
    assert "give a scenario, or --list" in one_line(answered("explore"))
    assert "more than 100 states" in one_line(
        answered("explore", "apicv", "--variant", "write-seq", "--max-states", "100")
    )
    assert "No such file" in one_line(answered("explore", "--replay", str(tmp_path / "none.json")))
    assert "there is no such file" in one_line(answered("explore", str(tmp_path / "none.py")))


@pytest.mark.slow
def test_a_scenario_of_ones_own(tmp_path: Path) -> None:
    example = ROOT / "replay" / "examples" / "last_reference.py"
    code = example.read_text()
    assert len(code[code.index("def build") :].splitlines()) <= 50
    done = answered("explore", str(example), "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert [(each["variant"], each["outcome"], each["steps"]) for each in document["runs"]] == [
        ("inc", "violation", 7), ("inc-not-zero", "holds", None),
    ]  # fmt: skip
    assert all(each["outcome"] == each["expect"] for each in document["runs"])
    found = tmp_path / "found.json"
    found.write_text(done.stdout)
    assert "broken again" in answered("explore", str(example), "--replay", str(found)).stdout
    assert "give the file it is in" in one_line(answered("explore", "--replay", str(found)))
    assert "is of scenario last-reference, not of apicv" in one_line(
        answered("explore", "apicv", "--replay", str(found))
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def", "does not load: SyntaxError"),
        ("1 / 0", "does not load: ZeroDivisionError"),
        ("x = 1", "has no replay.explore.Scenario"),
        ("from replay.explore.scenarios import apicv, rmap\nA, B = apicv.SCENARIO, rmap.SCENARIO", "has 2 of"),
    ],
)
def test_a_broken_file_is_one_line(code: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    assert said in one_line(answered("explore", str(path)))


def test_not_as_expected_is_said(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from replay.explore import *\n"
        "def build(model, variant, bounds):\n"
        "    def fail():\n"
        "        yield 'fails'\n"
        "        require(False, 'it does not fail')\n"
        "    model.actor('a', fail)\n"
        "SCENARIO = Scenario('mine', 'Mine', (Variant('only', HOLDS),), build)\n"
    )
    done = answered("explore", str(path))
    assert done.returncode == 1
    assert "mine only: violation in 1 step  NOT AS EXPECTED: holds" in done.stdout
    assert VIOLATION not in done.stderr
