# SPDX-License-Identifier: Apache-2.0
"""`kvmtrace kernels`: what a version does, and what changed between two."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from typer.testing import CliRunner

import kvmtrace
from tests.thinned import thinned
from traces.errors import Problem
from traces.kernels.changes import CHANGES

VERSIONS = ("5.10", "5.15", "5.18", "6.1.0", "6.1", "6.2.0", "6.4", "6.9", "6.12", "6.13", "6.18", "7.x")


def said(*arguments: str) -> str:
    result = CliRunner().invoke(kvmtrace.app, ["kernels", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    "arguments", thinned(3, [(), *((v,) for v in VERSIONS), *pairwise(VERSIONS), ("5.10", "7.x"), ("7.x", "5.10")])
)
def test_text_fits_a_terminal_of_80_columns(arguments: tuple[str, ...]) -> None:
    text = said(*arguments)
    assert max(map(len, text.splitlines())) <= 80
    assert text.endswith("\n")


def test_all_changes_are_listed_with_their_commits() -> None:
    text, document = " ".join(said().split()), json.loads(said("--json"))
    assert document["schema"] == 1
    assert [change["what"] for change in document["changes"]] == [change.what for change in CHANGES]
    for change in CHANGES:
        assert change.what in text
        assert all(commit in text for commit in change.commits)


def test_a_version() -> None:
    text = " ".join(said("6.12").split())
    assert "preserve: roots stay until a memslot change or the VM's end; the task that did it zaps" in text
    assert "edbdb43fc96b; also 6.1.50, 6.2.15, 6.3.2" in text
    document = json.loads(said("6.12", "--json"))
    assert document["kernel"]["policy"] == "preserve"
    assert {tuple(change["commits"]) for change in document["changes"]} >= {("edbdb43fc96b",), ("8ca983631f3c",)}


def test_what_changed_between_two() -> None:
    document = json.loads(said("6.11", "6.12", "--json"))
    assert [change["commits"] for change in document["gained"]] == [["989a84c93f59"], []]
    assert document["lost"] == []
    assert document["fields"].keys() == {"ret_pf", "slot_zap"}
    assert "fixed: 4 -> 5" in said("6.11", "6.12")


def test_a_newer_release_may_lack_what_an_older_series_took_back() -> None:
    assert "6.1 has, and 6.2.0 has not:" in said("6.1", "6.2.0")
    assert "policy            preserve -> async" in said("6.1", "6.2.0")
    assert "no change that kvmtrace knows of" in said("6.16", "6.17")


def test_a_version_newer_than_the_table_says_so_first() -> None:
    text = " ".join(said("99.9").split())
    assert text.startswith(
        "KVM's MMU in Linux 99.9 99.9 is newer than all that this kvmtrace knows, which ends with 7.3"
    )
    assert "newer than all" in json.loads(said("99.9", "--json"))["note"]
    assert said("6.12", "99.9").count("newer than all") == 1
    for known in ("7.x", "7.3", "7.3.9", "6.1"):
        assert "newer than all" not in said(known)


@pytest.mark.parametrize("version", ["nope", "5.4", "6", "-1", "x6.1\x1b[31m"])
def test_what_is_no_version_is_one_line(version: str) -> None:
    with pytest.raises(Problem) as problem:
        CliRunner().invoke(kvmtrace.app, ["kernels", "--", version], catch_exceptions=False)
    assert problem.value.code == 2
    assert str(problem.value).isprintable()
