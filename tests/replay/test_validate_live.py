"""Recordings of this machine's own KVM, where it is software KVM with shadow roots: each found, created, zapped."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from replay.validate.compare import Report, validate
from replay.validate.row_tuples import rows_of
from replay.validate.shadow_driver import is_paged
from replay.validate.validate_text import render
from tests.conftest import NESTED_PAGING, nested_paging
from tests.replay.paging import harmed, harms, run
from traces.reader import Trace

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("live")]

# Roots made and recycled, found again with another role word, invalidated by slots, and VMs that come and go.
SCENARIOS = {
    "roots": ("roots", "--loops", "150"),
    "wp-toggle": ("wp-toggle",),
    "slot-delete": ("slot-delete",),
    "churn": ("churn",),
}
HARMS = 40


@pytest.fixture(autouse=True)
def shadow_paging() -> None:
    """Elsewhere the lab's recordings stand for shadow paging."""
    if nested_paging():
        pytest.skip(NESTED_PAGING)


def recorded(vmm: str, out: Path, scenario: str) -> tuple[Trace, list[int]]:
    """A recording and its VMs that are the scenario's own: others may run on this machine meanwhile."""
    pid = out.with_suffix(".pid")
    words = [sys.executable, "-m", "kvmtrace", "record", "--events", "all", "-o", str(out), "--"]
    words += ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(pid), vmm, *SCENARIOS[scenario]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    trace = Trace.open(out)
    own = [int(vm["id"]) for vm in trace.metadata.vms if vm["pid"] == int(pid.read_text())]
    assert is_paged(trace.metadata)
    return trace, own


def whole(report: Report, own: list[int]) -> bool:
    """Whether each of these VMs is as foretold from its creation to its end."""
    found = [vm for vm in report.vms if vm.vm in own]
    tallies = [tally for vm in found for tally in vm.tallies.values()]
    unlike = any(tally.wrong or tally.missing for tally in tallies)
    return bool(tallies) and not unlike and not any(vm.skipped or vm.until or vm.left or vm.first for vm in found)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_root_is_found_created_and_zapped_as_recorded(tmp_path: Path, vmm: str, scenario: str) -> None:
    trace, own = recorded(vmm, tmp_path / "live.parquet", scenario)
    report = validate(trace.path)
    assert whole(report, own), render(report)
    for kind in ("kvm_mmu_get_page", "kvm_mmu_prepare_zap_page"):
        compared = sum(vm.tallies[kind].reproduced for vm in report.vms if vm.vm in own)
        assert compared == sum(row.kind == kind for vm in own for row in rows_of(trace, vm)) > 0
    if "mmu_load" not in trace.metadata.kinds:
        assert any("mmu_load" in note and "not compared" in note for note in report.notes)


@pytest.mark.parametrize("scenario", ["roots", "wp-toggle", "slot-delete"])
def test_a_response_that_is_missing_doubled_or_altered_is_found(tmp_path: Path, vmm: str, scenario: str) -> None:
    trace, (vm,) = recorded(vmm, tmp_path / "live.parquet", scenario)
    rows = [row for row in rows_of(trace, vm) if "paging_element" not in row.kind]
    assert run(trace, vm, rows) is not None
    dice, tried = random.Random(scenario), 0
    while tried < HARMS:
        harm = harms(trace, rows, dice)
        if harm is not None:
            tried += 1
            assert run(trace, vm, harmed(rows, *harm)) is None, f"{harm[1]} of {rows[harm[0]]} was not found"
