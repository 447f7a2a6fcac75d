# SPDX-License-Identifier: Apache-2.0
"""Recordings of this machine's own KVM, where it is software KVM with shadow roots: each found, created, zapped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.validate.compare import ConformanceReport, validate
from replay.validate.row_tuples import rows_of
from replay.validate.shadow_driver import is_paged
from replay.validate.validate_text import render
from tests.conftest import NESTED_PAGING, nested_paging
from tests.own_vm import noted, own_vms
from tests.profiles import examples
from tests.replay.paging import draw_mutation, mutated, run
from traces.reader import Trace

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("live")]

# Roots made and recycled, found again with another role word, invalidated by slots, and VMs that come and go.
SCENARIOS = {
    "roots": ("roots", "--loops", "150"),
    "wp-toggle": ("wp-toggle",),
    "slot-delete": ("slot-delete",),
    "churn": ("churn",),
}
Recorded = tuple[Trace, list[int]]
Recordings = Callable[[str], Recorded]


@pytest.fixture(scope="module", autouse=True)
def shadow_paging() -> None:
    """Elsewhere the lab's recordings stand for shadow paging."""
    if nested_paging():
        pytest.skip(NESTED_PAGING)


@pytest.fixture(scope="module")
def recordings(vmm: str, live: None, shadow_paging: None, tmp_path_factory: pytest.TempPathFactory) -> Recordings:
    """Each scenario, recorded once."""
    directory = tmp_path_factory.mktemp("live")
    return cache(lambda scenario: recorded(vmm, directory / f"{scenario}.parquet", scenario))


def recorded(vmm: str, out: Path, scenario: str) -> Recorded:
    """A recording and its VMs that are the scenario's own: others may run on this machine meanwhile."""
    pid = out.with_suffix(".pid")
    words = [sys.executable, "-m", "kvmtrace", "record", "--events", "all", "-o", str(out), "--"]
    words += noted(pid, vmm, *SCENARIOS[scenario])
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    trace = Trace.open(out)
    own = [int(vm["id"]) for vm in own_vms(trace, pid)]
    assert is_paged(trace.metadata)
    return trace, own


def whole(report: ConformanceReport, own: list[int]) -> bool:
    """Whether each of these VMs is as predicted from its creation to its end."""
    found = [vm for vm in report.vms if vm.vm in own]
    tallies = [tally for vm in found for tally in vm.tallies.values()]
    unlike = any(tally.mismatched or tally.missing for tally in tallies)
    return bool(tallies) and not unlike and not any(vm.skipped or vm.until or vm.left or vm.first for vm in found)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_root_is_found_created_and_zapped_as_recorded(recordings: Recordings, scenario: str) -> None:
    trace, own = recordings(scenario)
    report = validate(trace.path)
    assert whole(report, own), render(report)
    for kind in ("kvm_mmu_get_page", "kvm_mmu_prepare_zap_page"):
        compared = sum(vm.tallies[kind].matched for vm in report.vms if vm.vm in own)
        assert compared == sum(row.kind == kind for vm in own for row in rows_of(trace, vm)) > 0
    if "mmu_load" not in trace.metadata.kinds:
        assert any("mmu_load" in note and "not compared" in note for note in report.notes)


@pytest.mark.parametrize("scenario", ["roots", "wp-toggle", "slot-delete"])
def test_a_response_that_is_missing_doubled_or_altered_is_found(recordings: Recordings, scenario: str) -> None:
    trace, (vm,) = recordings(scenario)
    rows = [row for row in rows_of(trace, vm) if "paging_element" not in row.kind]
    assert run(trace, vm, rows) is not None

    @examples(20)
    @given(st.data())
    def found(data: st.DataObject) -> None:
        at, mutation = draw_mutation(data, trace, rows)
        assert run(trace, vm, mutated(rows, at, mutation)) is None, f"{mutation} of {rows[at]} was not found"

    found()
