# SPDX-License-Identifier: Apache-2.0
"""A replay that the rows contradict is not believed: the first line of every format says so, and CI fails."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from typer.testing import CliRunner, Result

import kvmtrace
from analysis.formats import FORMATS
from traces.reader import Trace

pytestmark = pytest.mark.slow

CORPUS = Path(__file__).parents[2] / "traces" / "corpus"
STORM = CORPUS / "smi-storm-6.1.parquet"
# Its types say `preserve`, its rows `sync`.
SYNC = Path(__file__).parents[1] / "recordings" / "smi-storm-6.1-sync.parquet"
WRONG = ("--recorded-policy", "async")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(kvmtrace.app, [*map(str, arguments)])


def squeezed(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in ("html", "junit", "json")])
def test_the_first_line_says_so(form: str) -> None:
    done = run("report", STORM, *WRONG, "--format", form)
    assert done.exit_code == 0
    said = squeezed(done.stdout.replace("*", "").replace("#", "").replace(">", ""))
    assert "UNTRUSTED: the replay under the recording's own policy is not what its rows show: VM 1" in said[:260]
    assert "roots created 9 (its rows: 2)" in said
    assert "from row" in said
    good = run("report", STORM, "--format", form)
    assert "UNTRUSTED" not in good.stdout
    assert "its replay equals the rows in 1 of 1 VMs" in squeezed(good.stdout)


@pytest.mark.slow
def test_the_page_says_so() -> None:
    done = run("report", STORM, *WRONG, "--format", "html")
    assert "<title>kvmtrace: UNTRUSTED" in done.stdout
    assert "UNTRUSTED" not in run("report", STORM, "--format", "html").stdout


def test_programs_are_told() -> None:
    (report,) = json.loads(run("report", STORM, *WRONG, "--format", "json").stdout)["reports"]
    assert report["headline"].startswith("UNTRUSTED")
    (vm,) = report["own_policy"]
    assert (vm["vm"], vm["agreement"]) == (1, "differs")
    assert vm["from_row"] > 0
    assert report["figures"]["whole"]["own_policy_mismatch"] == 1
    document = json.loads(run("replay", STORM, *WRONG, "--no-time", "--json").stdout)
    assert document["own_policy"]["agrees"] is False
    created = next(each for each in document["own_policy"]["vms"][0]["counts"] if each["count"] == "roots created")
    assert (created["rows"], created["replayed"]) == (2, 9)
    assert json.loads(run("replay", STORM, "--no-time", "--json").stdout)["own_policy"]["agrees"] is True


@pytest.mark.slow
def test_in_ci_it_fails_without_being_asked_for(tmp_path: Path) -> None:
    done = run("report", STORM, *WRONG, "--format", "junit", "-o", tmp_path / "a.xml")
    assert done.exit_code == 1
    text = (tmp_path / "a.xml").read_text()
    assert cases_of(text)["own_policy_mismatch > 0"] == "failure"
    done = run("report", STORM, "--format", "junit", "-o", tmp_path / "b.xml")
    assert done.exit_code == 0
    assert cases_of((tmp_path / "b.xml").read_text())["own_policy_mismatch > 0"] == "passed"
    # Whoever means to live with it says so.
    gate = ("--fail-on", "own_policy_mismatch > 1")
    done = run("report", STORM, *WRONG, *gate, "--format", "junit", "-o", tmp_path / "c.xml")
    assert done.exit_code == 0
    assert cases_of((tmp_path / "c.xml").read_text())["own_policy_mismatch > 1"] == "passed"
    # Without a replay there is nothing to compare with the rows.
    done = run("report", STORM, "--no-replay", "--format", "junit", "-o", tmp_path / "d.xml")
    assert done.exit_code == 0
    assert cases_of((tmp_path / "d.xml").read_text())["own_policy_mismatch > 0"] == "skipped"


def cases_of(text: str) -> dict[str, str]:
    return {
        str(case.get("name")): next((child.tag for child in case), "passed")
        for case in Xml.fromstring(text).iter("testcase")
    }


def test_the_gate_fails_in_any_format_where_it_is_asked_for() -> None:
    assert run("report", STORM, "--fail-on", "own_policy_mismatch > 0").exit_code == 0
    done = run("report", STORM, *WRONG, "--fail-on", "own_policy_mismatch > 0")
    assert done.exit_code == 1
    assert squeezed(done.stdout).startswith("FAILED: own_policy_mismatch > 0: own_policy_mismatch is 1: VM 1")


def test_a_comparison_says_which_side(tmp_path: Path) -> None:
    done = run("diff", STORM, CORPUS / "smi-storm-6.1-async.parquet", *WRONG)
    said = squeezed(done.stdout)
    assert said.startswith(f"UNTRUSTED: {STORM}: the replay under"), said[:300]
    assert said.count("UNTRUSTED") == 1


@pytest.mark.parametrize("verb", ["info", "replay", "report", "validate"])
def test_what_the_rows_show_is_the_policy_everywhere(verb: str) -> None:
    assert Trace.open(SYNC).metadata.raw["policy"]["name"] == "preserve-inline"
    done = run(verb, SYNC)
    assert done.exit_code == 0
    said = squeezed(done.stdout)
    assert "UNTRUSTED" not in said
    assert {"validate": "policy sync, by its rows", "info": "sync, by its rows"}.get(
        verb, "sync roots, by its rows"
    ) in said


@pytest.mark.slow
def test_the_policy_can_be_given_in_every_verb(tmp_path: Path) -> None:
    given = ("--recorded-policy", "preserve")
    assert run("validate", SYNC, *given).exit_code == 1
    assert "preserve (recorded)" in run("replay", SYNC, *given, "--no-time").stdout
    assert "UNTRUSTED" in run("report", SYNC, *given).stdout
    assert "UNTRUSTED" in run("diff", SYNC, STORM, *given).stdout
    assert run("export", SYNC, *given, "--list").exit_code == 0
    for verb in ("validate", "replay", "report", "export"):
        done = run(verb, SYNC, "--recorded-policy", "lazy", *(["--list"] if verb == "export" else []))
        assert str(done.exception).startswith("--recorded-policy lazy: give one of"), verb
