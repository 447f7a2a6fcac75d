# SPDX-License-Identifier: Apache-2.0
"""With EPT the guest owns CR0.WP from 6.4 on: what a kernel that unloads for it would have done has no upper end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from replay import bounds, counts_text, plan, run
from replay.bounds import Count
from replay.decode.capabilities import Capabilities
from replay.plan import Plan
from replay.timing import time_text
from replay.timing.timed_run import Settings
from tests.corpus import CORPUS
from tests.verbs import printed
from traces.reader import Trace

pytestmark = pytest.mark.slow


def kvmtrace(*arguments: str, code: int = 0) -> str:
    return printed(*arguments, code=code, columns=100)


def planned(name: str, kernel: str, refault: str = "", policy: str = "") -> Plan:
    capabilities = Capabilities(Trace.open(CORPUS / f"{name}.parquet"))
    return plan.make(capabilities, [policy] if policy else [], kernel, plan.refault(refault))


def counted(name: str, kernel: str, refault: str = "") -> dict[str, Count]:
    wanted = planned(name, kernel, refault, "sync")
    return bounds.counts(run.replay(wanted).outcomes, wanted.refault)


@pytest.mark.parametrize(
    ("name", "kernel", "hidden"),
    [
        ("wp-toggle-6.1-ept", "5.10", True),  # 5.10 unloads, and has roots of their own for WP
        ("smi-storm-6.1-ept", "5.10", True),  # whether or not this guest toggles it: no row could tell
        ("wp-toggle-7.x-ept", "6.1.20", True),  # before the back-port
        ("smi-storm-6.1-pml", "5.15", True),
        ("wp-toggle-6.1-ept", "6.12", False),  # unloads for it no more
        ("wp-toggle-6.1-ept", "", False),
        ("wp-toggle-5.10-ept", "6.1.20", False),  # on 5.10 each write exits
        ("wp-toggle-6.1", "5.10", False),  # on AMD it still exits
    ],
)
def test_there_is_no_upper_end_where_writes_of_cr0_wp_are_not_seen(name: str, kernel: str, hidden: bool) -> None:
    wanted = planned(name, kernel)
    assert {target.at_least for target in wanted.targets if not target.recorded} == {hidden}
    said = [line for target in wanted.targets for line in target.open if "CR0.WP" in line]
    assert bool(said) == hidden


def test_what_was_recorded_there_is_not_denied() -> None:
    """6 roots and 2,584 faults on 5.10; the recording of 6.1 shows none of the writes that made them."""
    recorded = {"creations": Trace.open(CORPUS / "wp-toggle-5.10-ept.parquet").metadata.root_count, "faults": 2_584}
    assert recorded["creations"] == 6
    for refault in ("", "none"):
        found = counted("wp-toggle-6.1-ept", "5.10", refault)
        for name, number in recorded.items():
            assert number in found[name], (refault, name)
            assert found[name].high is None
            assert found[name].text.endswith(" or more")
    assert found["creations"].value == [1, None]
    assert 0 not in found["creations"]


def test_an_assumption_on_re_faults_says_nothing_of_the_writes() -> None:
    for refault in ("all", "recent:3"):
        found = counted("wp-toggle-6.1-ept", "5.10", refault)
        assert all(count.high is None for count in found.values()), refault


def test_every_way_to_see_it_says_so(tmp_path: Path) -> None:
    recording = str(CORPUS / "wp-toggle-6.1-ept.parquet")
    result = str(tmp_path / "result.parquet")
    done = kvmtrace("replay", recording, "--kernel", "5.10", "--policy", "sync", "-o", result)
    assert "1 or more" in done
    assert "writes CR0.WP without an exit" in " ".join(done.split())
    assert "x the time" not in done, "two times without an upper bound are not compared"
    document = json.loads(kvmtrace("replay", recording, "--kernel", "5.10", "--policy", "sync", "--json"))
    (policy,) = document["policies"]
    assert policy["at_least"]
    (figures,) = document["vms"][0]["policies"]
    assert figures["creations"] == [1, None]
    assert not figures["frees_by_cause"]
    report = json.loads(kvmtrace("report", result, "--format", "json"))
    assert "or more" in kvmtrace("report", result)
    assert "[1, null]" in json.dumps(report)
    gated = kvmtrace("report", result, "--fail-on", "sync.roots_created > 3", code=1)
    assert "cannot be decided" in " ".join(gated.split())
    kvmtrace("report", result, "--fail-on", "sync.roots_created < 1")  # that it can be: it is 1 or more


def test_times_have_no_upper_end_either() -> None:
    replayed = run.replay(planned("wp-toggle-6.1-ept", "5.10"), Settings())
    said = [line for vm in replayed.times for line in time_text.verdicts(vm, [0])]
    assert said
    assert all("or more under" in line for line in said)
    assert "or more" in counts_text.render(replayed)
