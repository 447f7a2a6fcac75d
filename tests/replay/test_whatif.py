# SPDX-License-Identifier: Apache-2.0
"""SMIs at other rates: the rate at which a slow program hangs, and the arithmetic for comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvmtrace
from replay.decode.capabilities import Capabilities
from replay.whatif.smi_rate import SmiChange, Sweep, Swept, parse, swept
from traces.errors import Problem
from traces.kernels.policies import ASYNC, PRESERVE, SHADOW, SYNC_RW
from traces.reader import Trace
from traces.synth import Parameters, synthesize

CORPUS = Path(__file__).parents[2] / "traces" / "corpus"


@pytest.fixture(scope="module")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guest that fills 64 MiB, struck by a few SMIs."""
    path = tmp_path_factory.mktemp("whatif") / "firmware.parquet"
    synthesize(path, Parameters(smi_rate=20, working_set=4000, memory=64 << 20, duration=30))
    return path


def by_policy(path: Path, sweep: Sweep, change: SmiChange | None = None) -> dict[str, Swept]:
    by_vm, checks, unanswered = swept(
        Capabilities(Trace.open(path)), (SYNC_RW, ASYNC, SHADOW, PRESERVE), sweep, change or SmiChange()
    )
    (found,) = by_vm.values()
    assert [check.text for check in checks if check.text] == []
    assert not unanswered
    return {each.policy: each for each in found}


@pytest.mark.slow
def test_old_policies_tip_where_the_arithmetic_says(firmware: Path) -> None:
    found = by_policy(firmware, Sweep(1, 10_000))
    for policy in ("sync", "async"):
        each = found[policy]
        assert each.tips is not None
        assert abs(each.tips / each.limit - 1) < 0.1
        factors = [factor for factor in each.factors if factor is not None]
        assert factors == sorted(factors), "more SMIs never make it quicker"
        hung = [factor is None for factor in each.factors]
        assert hung == sorted(hung), "once it hangs it hangs at every higher rate"
    for policy in ("shadow", "preserve"):
        assert found[policy].tips is None
        assert all(factor is not None and factor < 1.5 for factor in found[policy].factors)


def test_a_larger_working_set_tips_at_a_lower_rate(firmware: Path) -> None:
    once = by_policy(firmware, Sweep(1, 10_000))["async"].tips
    twice = by_policy(firmware, Sweep(1, 10_000), SmiChange(working_set=2))["async"].tips
    assert once is not None
    assert twice is not None
    assert abs(once / twice - 2) < 0.2


def test_another_holder_saves_the_root(firmware: Path) -> None:
    assert by_policy(firmware, Sweep(1, 10_000), SmiChange(holders=2))["async"].tips is None


def test_points_of_a_sweep() -> None:
    assert parse("smi-rate=10:10000:log").rates == pytest.approx([10 ** (1 + i / 3) for i in range(10)])
    assert parse("smi-rate=10:100:lin").rates == pytest.approx(list(range(10, 101, 10)))
    assert Sweep(5, 5).rates == [5]


@pytest.mark.parametrize("text", ["", "smi-rate", "smi-rate=10", "smi-rate=0:5", "smi-rate=9:5:log", "faults=1:2"])
def test_what_is_no_sweep_is_one_line(text: str) -> None:
    with pytest.raises(Problem, match="write it like smi-rate=10:10000:log"):
        parse(text)


def test_without_an_smi_there_is_none_to_repeat() -> None:
    with pytest.raises(Problem, match="no whole SMI to repeat"):
        by_policy(CORPUS / "steady-6.1.parquet", Sweep(1, 10))


def test_the_command_sweeps(firmware: Path) -> None:
    runner = CliRunner()
    command = ["replay", str(firmware), "--policy", "async", "--policy", "preserve"]
    done = runner.invoke(kvmtrace.app, [*command, "--sweep", "smi-rate=1:1000:log"])
    assert done.exit_code == 0
    assert "hangs from" in done.stdout
    assert "arithmetic limit" in done.stdout
    assert "assumed: after each SMI the guest needs every page" in done.stdout
    document = json.loads(runner.invoke(kvmtrace.app, [*command, "--smi-rate", "1000", "--json"]).stdout)
    (vm,) = document["sweep"]["vms"]
    assert document["sweep"]["rates"] == [1000]
    async_, preserve = (each["factors"] for each in vm["policies"])
    assert async_ == [None]
    assert preserve[0] < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("asked", [("--smi-rate", "100"), ("--tdp-pages", "list,counter")])
def test_what_rests_on_a_replay_that_the_rows_contradict_says_so(asked: tuple[str, str]) -> None:
    storm = str(CORPUS / "smi-storm-6.1.parquet")
    wrong = CliRunner().invoke(kvmtrace.app, ["replay", storm, *asked, "--recorded-policy", "async"])
    assert wrong.exit_code == 0
    assert " ".join(wrong.stdout.split()).startswith(
        "UNTRUSTED: the replay under the recording's own policy is not what its rows show: VM 1"
    )
    right = CliRunner().invoke(kvmtrace.app, ["replay", storm, *asked, "--json"])
    assert json.loads(right.stdout)["own_policy"]["agrees"] is True
