# SPDX-License-Identifier: Apache-2.0
"""One VM that cannot be answered for never hides the others: a note for each, in every mode of replay."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from replay.whatif.each_vm import UnansweredVm, ask_each_vm, notes
from tests.verbs import invoke
from traces.errors import Problem

FIELD = Path(__file__).parents[1] / "recordings" / "field-6.1.parquet"  # 26 VMs; some never entered their guests


def recording(*vms: dict[str, Any]) -> Any:
    return SimpleNamespace(trace=SimpleNamespace(path="x.parquet", metadata=SimpleNamespace(vms=vms)))


def ask(vm: Any) -> str:
    if vm["id"] % 2:
        raise UnansweredVm("it is odd")
    return f"answer {vm['id']}"


def test_those_without_an_answer_are_named_and_the_others_answered() -> None:
    vms = [{"id": number, "vcpus": [1] if number < 5 else []} for number in range(1, 6)]
    answers, unanswered = ask_each_vm(recording(*vms), ask)
    assert answers == {2: "answer 2", 4: "answer 4"}
    assert notes(unanswered) == ["note: no answer for VMs 1, 3: it is odd", "note: no answer for VM 5: it had no vCPU"]


def test_no_answer_at_all_is_a_problem_that_says_of_how_many() -> None:
    vms = [{"id": number, "vcpus": [1]} for number in (1, 3, 5)]
    with pytest.raises(Problem, match=r"^x\.parquet: VM 1: it is odd \(2 more VMs have no answer either\)$"):
        ask_each_vm(recording(*vms), ask)


def test_what_is_wrong_with_the_file_is_no_note() -> None:
    def damaged(_: Any) -> str:
        raise Problem("x.parquet: damaged: row group 3")

    with pytest.raises(Problem, match="damaged"):
        ask_each_vm(recording({"id": 1, "vcpus": [1]}, {"id": 2, "vcpus": [1]}), damaged)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--aging locked", "--zap-lock read", "--apicv gfn", "--tdp-pages list"])
def test_design_questions_of_many_vms(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    invoke(["replay", str(FIELD), *mode.split(), "--json"])
    document = json.loads(capsys.readouterr().out)
    answered = {each["vm"] for each in document["designs"]}
    unanswered = {each["vm"] for each in document["unanswered"]}
    assert answered
    assert unanswered
    assert not answered & unanswered
    assert answered | unanswered == set(range(1, 27))


def test_replay_counts_every_vm_and_says_which_has_no_times(capsys: pytest.CaptureFixture[str]) -> None:
    invoke(["replay", str(FIELD), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert {each["vm"] for each in document["vms"]} == set(range(1, 27))
    refused = {each["vm"]: each["refused"] for each in document["time"]["vms"] if each["refused"]}
    assert 1 in refused
    assert len(refused) < 26
