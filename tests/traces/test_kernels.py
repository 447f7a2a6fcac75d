# SPDX-License-Identifier: Apache-2.0
"""The table of kernel versions, and the role words it gives."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from traces import kernels
from traces.errors import Problem
from traces.kernels import roles
from traces.kernels.changes import CHANGES, FIRST
from traces.kernels.fold import apply
from traces.kernels.policies import POLICIES
from traces.kernels.triggers import ALWAYS, OPEN, Trigger
from traces.reader import Trace

VERSIONS = [
    "5.10",
    "5.11",
    "5.12",
    "5.13",
    "5.15",
    "5.17",
    "5.18",
    "5.19",
    "6.0",
    "6.1.0",
    "6.1",
    "6.2.0",
    "6.2",
    "6.3.0",
    "6.3",
    "6.4",
    "6.6",
    "6.9",
    "6.10",
    "6.12",
    "6.13",
    "6.14",
    "6.15",
    "6.18",
    "7.0",
    "7.3",
    "7.x",
]
CORPUS = Path(__file__).parents[2] / "traces" / "corpus"


def test_the_changes_are_in_order_and_say_what_they_change() -> None:
    assert [change.since for change in CHANGES] == sorted(change.since for change in CHANGES)
    kernel = FIRST
    for change in CHANGES:
        assert len(change.what) <= 110, change
        assert all(re.fullmatch("[0-9a-f]{12}", commit) for commit in change.commits), change
        after = apply(kernel, change)
        for name, value in change.fields.items():
            outer, _, inner = name.partition(".")
            before = getattr(getattr(kernel, outer), inner) if inner else getattr(kernel, outer)
            assert before != value, (change.what, name)
        assert len(after.points ^ kernel.points) == len(change.points), change
        assert len(after.unloads ^ kernel.unloads) == len(change.unloads), change
        kernel = after


@pytest.mark.parametrize("version", VERSIONS)
def test_a_name_finds_its_kernel_again(version: str) -> None:
    kernel = kernels.at(version)
    again = kernels.at(kernel.name)
    assert replace(again, version=kernel.version) == kernel
    assert kernel.unloads >= ALWAYS
    assert kernel.policy in POLICIES


@pytest.mark.parametrize(
    ("version", "policy", "wp", "pge"),
    [
        ("5.10", "sync", True, True),
        ("5.15", "sync", True, False),
        ("5.18", "async", True, False),
        ("6.1.0", "async", True, False),
        ("6.1", "preserve", False, False),
        ("v6.2.1-rc3", "async", True, False),
        ("6.2", "preserve-worker", False, False),
        ("6.3.1", "async", True, False),
        ("6.5", "preserve-worker", False, False),
        ("6.6.30", "preserve", False, False),
        ("7.x", "preserve", False, False),
        ("9.1", "preserve", False, False),
    ],
)
def test_a_version_picks_policy_and_triggers(version: str, policy: str, wp: bool, pge: bool) -> None:
    kernel = kernels.at(version)
    assert kernel.policy == policy
    assert (Trigger.CR0_WP in kernel.unloads, Trigger.CR4_PGE in kernel.unloads) == (wp, pge)


@pytest.mark.parametrize("version", ["", "new", "6", "5.4", "4.19.1"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(Problem, match=r"not a version|no TDP MMU before"):
        kernels.at(version)


def test_faults_share_the_lock_from_5_12_on() -> None:
    assert [version for version in VERSIONS if not kernels.at(version).faults_share] == ["5.10", "5.11"]
    assert not kernels.at("5.10").parameters("async").faults_share
    assert kernels.at("5.12").parameters("sync").faults_share
    assert not kernels.at("6.12").parameters("shadow").faults_share


def test_loads_share_the_lock_from_6_9_on() -> None:
    assert next(version for version in VERSIONS if kernels.at(version).loads_share) == "6.9"
    assert kernels.at("6.12").parameters("async").loads_share
    assert not kernels.at("6.1").parameters("preserve").loads_share
    assert not kernels.at("6.12").parameters("shadow").loads_share


def test_only_5_10_empties_roots_and_leaves_them_valid() -> None:
    assert kernels.at("5.10").parameters().zap_all_fast == "empty"
    newer = replace(kernels.at("5.10").parameters(), zap_all_fast="invalidate", faults_share=True)
    assert kernels.at("5.15").parameters() == newer


def test_a_policy_takes_over_what_is_the_kernels_own() -> None:
    assert not kernels.at("6.1").parameters("preserve").split_in_place
    assert not kernels.at("6.1").parameters("async").split_in_place
    assert kernels.at("6.12").parameters("async").split_in_place
    assert kernels.at("5.10").parameters("shadow").request == "reload"
    assert {kernels.at("6.6").parameters(name).name for name in POLICIES} == set(POLICIES)
    assert kernels.at("5.15").parameters("async").request == "obsolete", "it came with 5.18's way of invalidating"
    with pytest.raises(Problem, match="neither a policy"):
        kernels.at("6.6").parameters("lru")


@pytest.mark.parametrize(
    ("version", "usual", "smm", "count"),
    [
        ("5.10", 0x3794, 0x01003794, 24),
        ("5.18", 0x3784, 0x01003784, 24),
        ("6.1", 0x3784, 0x01003784, 6),
        ("7.1", 0x6F84, 0x01006F84, 6),
    ],
)
def test_words_are_those_of_the_reference(version: str, usual: int, smm: int, count: int) -> None:
    words, index = roles.words(kernels.at(version).layout, ad_disabled=False)
    assert words[0].word == usual
    assert index[roles.USUAL] == 0
    assert words[index[roles.USUAL | roles.SMM]].word == smm
    assert words[index[roles.USUAL | roles.SMM]].as_id == 1
    assert words[index[roles.USUAL | roles.LEVEL5]].level == 5
    # SMM and guest mode exclude each other: six of the words can be.
    assert len([word for word in words if not (word.as_id and word.word & 1 << 17)]) == count
    assert roles.words(kernels.at(version).layout, ad_disabled=True)[0][0].word == usual | 1 << 16


@pytest.mark.parametrize("version", VERSIONS)
def test_a_word_gives_back_its_state(version: str) -> None:
    layout = kernels.at(version).layout
    words, index = roles.words(layout, ad_disabled=False)
    state = np.arange(roles.STATES)
    back = roles.states(np.array([words[i].word for i in index], np.uint32), layout)
    assert np.array_equal(back, state if layout.guest_bits else state | roles.USUAL)


@pytest.mark.parametrize(
    ("name", "kernel", "policy"),
    [
        ("steady-5.10", "5.10", "sync"),
        ("steady-5.10-shadow", "5.10", "shadow"),
        ("steady-6.1", "6.1", "preserve"),
        ("steady-6.1-async", "6.1", "async"),
        ("steady-6.12", "6.12", "preserve"),
        ("steady-7.x-shadow", "7.3", "shadow"),
    ],
)
def test_recordings_are_of_the_kernel_they_name(name: str, kernel: str, policy: str) -> None:
    trace = Trace.open(CORPUS / f"{name}.parquet")
    found = kernels.recorded(trace.metadata)
    assert (found.name, found.policy) == (kernel, policy)
    assert found.layout == kernels.at(kernel).layout  # as BTF has it


def test_what_is_left_open_has_two_ends() -> None:
    for trigger, (least, most) in OPEN.items():
        assert trigger not in ALWAYS
        assert least not in OPEN
        assert most not in OPEN


def test_return_codes_shift_with_6_12_and_not_before() -> None:
    """RET_PF_WRITE_PROTECTED; two tables that there once were said different things of 6.9 to 6.11."""
    codes = {version: kernels.at(version).ret_pf.fixed for version in ("5.17", "5.18", "6.8", "6.9", "6.11", "6.12")}
    assert codes == {"5.17": 3, "5.18": 4, "6.8": 4, "6.9": 4, "6.11": 4, "6.12": 5}


def test_5_18_has_the_guests_bits_in_its_role_words() -> None:
    assert kernels.at("5.18").layout.guest_bits
    assert not kernels.at("5.19").layout.guest_bits


@pytest.mark.parametrize("version", ["5.18", "6.1", "6.12", "7.3"])
def test_sync_on_a_newer_kernel_has_that_kernels_habits(version: str) -> None:
    """It frees at the last put, but marks roots invalid first and drops no tables with a range."""
    sync = kernels.at(version).parameters("sync")
    assert (sync.own_reference, sync.teardown) == (False, "inline")
    assert (sync.zap_all_fast, sync.request) == ("invalidate", "obsolete")
    assert not sync.zap_tables
    assert not sync.flush_per_table
    assert kernels.at("5.17").parameters("sync").zap_tables


@pytest.mark.parametrize("policy", ["sync", "async", "preserve-worker", "preserve"])
def test_what_a_range_zap_does_is_the_kernels_habit_and_no_policys(policy: str) -> None:
    old, new = (kernels.at(version).parameters(policy) for version in ("5.17", "6.1"))
    assert (old.zap_tables, old.flush_per_table) == (True, True)
    assert (new.zap_tables, new.flush_per_table) == (False, False)
    assert (old.own_reference, old.teardown) == (new.own_reference, new.teardown)


def test_huge_pages_are_put_back_from_6_13_on() -> None:
    assert [kernels.at(version).recovers for version in ("6.12", "6.13", "6.18", "7.3")] == [False, True, True, True]


def test_sections_of_the_document_that_the_code_cites_are_there() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "kvm-mmu.md").read_text()
    heads = {line.lstrip("# ") for line in text.splitlines() if line.startswith("##")}
    cited = set()
    for folder in ("replay", "traces", "tracer", "analysis"):
        for path in (root / folder).rglob("*.py"):
            for found in re.findall(r'docs/kvm-mmu\.md((?:,| \()(?: ?"[^"]+",?)+)', path.read_text()):
                cited |= set(re.findall(r'"([^"]+)"', found))
    assert cited, "the code cites none"
    assert cited <= heads
    anchors = {re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in heads}
    assert set(re.findall(r"\]\(#([a-z0-9-]+)\)", text)) <= anchors
