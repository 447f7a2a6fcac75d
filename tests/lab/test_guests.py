# SPDX-License-Identifier: Apache-2.0
"""Guests that nobody here wrote: the list of them, how one's end is read, and when a measurement holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import lab_guests
from benchmarks.lab_guests import Measured
from tracer.lab import builds, guests, nested
from tracer.lab.guests import GUESTS


def test_every_guest_is_built_and_run_by_what_is_there() -> None:
    assert {guest.build for guest in GUESTS.values()} == set(builds._BUILDS)
    ours = [guest.name for guest in GUESTS.values() if guest.build != "selftests"]
    assert sorted(ours) == sorted(nested.GUESTS)
    for guest in GUESTS.values():
        assert guest.shows
        assert "{built}" in guest.command
    assert {guest.build for guest in GUESTS.values() if guest.check} == {"selftests"}, "quick enough for every check"


def test_a_build_within_a_recipe_of_make_is_a_make_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM's selftests built into / where MAKELEVEL was set."""
    (tmp_path / "Makefile").write_text("all:\n\t@echo $(MAKELEVEL) >&2\n")
    monkeypatch.setenv("MAKELEVEL", "1")
    assert builds._make(tmp_path, "all") == "0\n"


def test_a_job_has_its_limit_and_says_how_it_ended(tmp_path: Path) -> None:
    job = guests._job(GUESTS["selftest-smm"], "6.1", Path("/built here"))
    assert job["out"] == "/mnt/lab/selftest-smm-6.1.parquet"
    assert job["command"] == ["sh", "-c", "{ timeout 300 '/built here'/smm_test; echo ended with $?; } 2>&1"]


@pytest.mark.parametrize(
    ("printed", "status", "said"),
    [
        ("some words\nended with 0\n", 0, ""),
        ("some words\n\nended with 4\n", 4, "some words"),
        ("ended with 124\n", 124, ""),
        ("some words\n", None, "the boot failed"),
        (None, None, "the boot failed"),
    ],
)
def test_how_a_guest_ended(tmp_path: Path, printed: str | None, status: int | None, said: str) -> None:
    if printed is not None:
        (tmp_path / "debian-6.1.stdout").write_text(printed)
    run = guests._run(GUESTS["debian"], "6.1", tmp_path, "the boot failed")
    assert (run.status, run.said, run.trace) == (status, said, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("deadly", "boots", "none"),
    [((), 1, []), ((1,), 2, [1]), ((0, 2), 3, [0, 2]), ((3,), 1, [3]), ((0, 1), 2, [0, 1, 2, 3])],
)
def test_a_guest_that_ends_the_machine_underneath_ends_no_other(
    deadly: tuple[int, ...], boots: int, none: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless two boots in a row fail."""
    group = list(GUESTS.values())[:4]
    made: list[int] = []

    def boot(booted: object, group_: list[guests.LabGuest], place: Path, directory: Path) -> str:
        made.append(len(group_))
        for guest in group_:
            if group.index(guest) in deadly:
                return "QEMU gave up"
            (directory / f"{guest.name}-6.1.stdout").write_text("ended with 0\n")
        return ""

    monkeypatch.setattr(guests, "fetch", lambda kernel, say: None)
    monkeypatch.setattr(guests, "built", lambda what, say: tmp_path)
    monkeypatch.setattr(guests, "_boot", boot)
    runs = guests.record("6.1", group, tmp_path, lambda line: None)
    assert [run.guest for run in runs] == group
    assert [at for at, run in enumerate(runs) if run.status is None] == none
    assert all(run.said == "QEMU gave up" for run in runs if run.status is None)
    assert len(made) == boots


GOOD = Measured("debian", "6.1", "6.1.0", 0, "", 1000, 0, 1, 400, 400, 20, True)


def test_what_holds() -> None:
    assert GOOD.holds
    none = replace(GOOD, events=0, vms=0, responses=None, matched=None, apart=0, agrees=None)
    assert replace(none, status=guests.SKIPPED).skipped
    assert not replace(none, status=guests.SKIPPED).holds
    assert not replace(none, status=guests.SKIPPED).faults
    assert replace(none, status=0, said="it has no VM").faults == ["it has no VM"]
    assert replace(none, status=254, said="no NRIPS").faults == ["made no VM, and ended with 254: no NRIPS"]
    for change, fault in (
        ({"lost": 3}, "3 events lost"),
        ({"matched": 399}, "1 responses do not match"),
        ({"apart": 22}, "94.8% modelled"),
        ({"agrees": False}, "the replay under its own policy differs from the rows"),
        ({"status": None, "said": "panicked"}, r"did not run (panicked)"),
        ({"events": None, "said": ""}, "no recording"),
    ):
        changed = replace(GOOD, **change)  # type: ignore[arg-type]
        assert not changed.holds
        assert changed.faults == [fault]


def test_table_rounds_nothing_up() -> None:
    table = lab_guests.render(
        [replace(GOOD, matched=399, responses=400_000), replace(GOOD, kernel="7.x", release="7.3")]
    )
    assert "0 of 1 hold in all." in table
    assert "1 of 1 hold in all." in table
    assert "| debian | Debian's kernel and userland | well | 1 | 1,000 | 0 | 99.99 % | 0.10 % | equal |" in table
    assert "| 95.24 % | 100 % | equal |" in table
    assert "What does not hold, and why:\n\n- debian: 399,601 responses do not match\n" in table


def test_what_did_not_run_stands_in_the_table_with_its_reason() -> None:
    table = lab_guests.render([Measured("debian", "6.1", "", None, "QEMU gave up")])
    assert "| debian | Debian's kernel and userland | did not run | | | | | | |" in table
    assert table.endswith("- debian: did not run (QEMU gave up)\n")
