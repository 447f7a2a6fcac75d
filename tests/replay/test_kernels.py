"""The table of kernel versions, and the role words it gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from replay import kernels, roles
from replay.axes import NAMED
from replay.causes import ALWAYS, OPEN, Trigger
from replay.kernels import KERNELS
from traces.errors import Problem
from traces.reader import Trace

CORPUS = Path(__file__).parents[2] / "traces" / "corpus"


def test_the_table_is_in_order_and_finds_itself() -> None:
    assert [kernel.since for kernel in KERNELS] == sorted({kernel.since for kernel in KERNELS})
    for kernel in KERNELS:
        assert kernels.at(".".join(map(str, kernel.since))) is kernel
        assert kernels.at(kernel.name) is kernel, kernel.name
        assert kernel.unloads >= ALWAYS


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
    assert kernel.axes.name == policy
    assert (Trigger.CR0_WP in kernel.unloads, Trigger.CR4_PGE in kernel.unloads) == (wp, pge)


@pytest.mark.parametrize("version", ["", "new", "6", "5.4", "4.19.1"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(Problem, match="--kernel"):
        kernels.at(version)


def test_faults_share_the_lock_from_5_12_on() -> None:
    assert [kernel.name for kernel in KERNELS if not kernel.axes.faults_share] == ["5.10"]
    assert not kernels.at("5.10").policy("async").faults_share
    assert kernels.at("5.12").policy("sync").faults_share
    assert not kernels.at("6.12").policy("shadow").faults_share


def test_loads_share_the_lock_from_6_9_on() -> None:
    assert [kernel.name for kernel in KERNELS if kernel.axes.loads_share] == ["6.9", "6.12", "7.x"]
    assert kernels.at("6.12").policy("async").loads_share
    assert not kernels.at("6.1").policy("preserve").loads_share
    assert not kernels.at("6.12").policy("shadow").loads_share


def test_only_5_10_empties_roots_and_leaves_them_valid() -> None:
    assert kernels.at("5.10").axes.invalidate == "empty"
    assert kernels.at("5.15").axes == replace(kernels.at("5.10").axes, invalidate="retire", faults_share=True)


def test_a_policy_takes_over_what_is_the_kernels_own() -> None:
    assert not kernels.at("6.1").policy("preserve").split_in_place
    assert not kernels.at("6.1").policy("async").split_in_place
    assert kernels.at("6.12").policy("async").split_in_place
    assert kernels.at("5.10").policy("shadow").request == "reload"
    assert {kernels.at("6.6").policy(name).name for name in NAMED} == set(NAMED)
    with pytest.raises(Problem, match="neither a policy"):
        kernels.at("6.6").policy("lru")


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


@pytest.mark.parametrize("version", [kernel.name for kernel in KERNELS])
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
        ("steady-7.x-shadow", "7.x", "shadow"),
    ],
)
def test_recordings_are_of_the_kernel_they_name(name: str, kernel: str, policy: str) -> None:
    trace = Trace.open(CORPUS / f"{name}.parquet")
    found, axes = kernels.recorded(trace.metadata)
    assert (found.name, axes.name) == (kernel, policy)
    assert found.layout == kernels.at(kernel).layout  # as BTF has it


def test_what_is_left_open_has_two_ends() -> None:
    for trigger, (least, most) in OPEN.items():
        assert trigger not in ALWAYS
        assert least not in OPEN
        assert most not in OPEN
