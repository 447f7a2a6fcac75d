# SPDX-License-Identifier: Apache-2.0
"""Text fits its terminal: every verb on recordings of several VMs, in 80 columns and in 40."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.corpus import CORPUS
from tests.verbs import TALKERS, Files, Verb, invoke
from traces.command_line import screen

pytestmark = pytest.mark.slow

FIELD = Path(__file__).parent / "recordings" / "field-6.1.parquet"
SEVERAL = {"field": FIELD, "two VMs": CORPUS / "two-vms-6.1-async.parquet", "one VM": CORPUS / "smi-both-6.1.parquet"}
# Not for a terminal: files, mails, documents, a path; and help, which test_help.py holds.
NO_TEXT = ("-md", "-mail", "-html", "-json", "-junit", "-csv", "-fetch", "help", "version")
TEXTS = [verb for verb in TALKERS if verb.code < 2 and not verb.needs and not verb.name.endswith(NO_TEXT)]
QUICK = ("info", "replay", "report-text")


def said(verb: Verb, files: Files, capsys: pytest.CaptureFixture[str]) -> str:
    """What a verb prints, whatever its verdict."""
    capsys.readouterr()
    invoke(verb.words(files))
    return capsys.readouterr().out


def several(verb: Verb) -> list[str]:
    if "smi-rate" in verb.line:
        return ["two VMs", "one VM"]  # with SMIs
    if verb.name in ("validate-part", "diff-part"):
        return ["two VMs", "one VM"]  # whose VM 1 goes on after a ms
    return list(SEVERAL) if "{trace}" in verb.line else ["field"]


@pytest.mark.parametrize("width", [80, 40])
@pytest.mark.parametrize(
    ("verb", "of"),
    [
        pytest.param(verb, of, id=f"{verb.name} of {of}", marks=[] if verb.name in QUICK else [pytest.mark.slow])
        for verb in TEXTS
        for of in several(verb)
    ],
)
def test_every_line_fits(
    verb: Verb, of: str, width: int, files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "width", lambda: width)
    given = replace(files, trace=SEVERAL[of])
    text = said(verb, given, capsys)
    assert text.strip()
    wide = [line for line in text.splitlines() if len(line) > width and "-> " not in line]  # a command is not cut
    assert not wide, "\n".join(wide)


def test_replays_and_reports_have_the_worst_vm_first_and_say_how_many_more_there_are(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    def first(text: str, after: str) -> list[int]:
        lines = text.partition(after)[2].splitlines()[2:]
        found = [int(line.split()[0]) for line in lines if line.split() and line.split()[0].isdigit()]
        return list(dict.fromkeys(found))[: screen.VMS_SHOWN]

    given = replace(files, trace=FIELD)
    replayed = said(Verb("replay", "replay {trace} --policy preserve"), given, capsys)
    reported = said(Verb("report", "report {trace} --policy preserve"), given, capsys)
    ranked = first(replayed, "the worst first:")
    vms = json.loads(said(Verb("info", "info {trace} --json"), given, capsys))["vms"]
    assert ranked == first(reported, "-- VMs, the worst first")
    assert len(ranked) == screen.VMS_SHOWN < len(vms)
    assert f"... {len(vms) - screen.VMS_SHOWN:,} more VMs" in replayed
    assert ranked != sorted(ranked)
