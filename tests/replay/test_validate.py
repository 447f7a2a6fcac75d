# SPDX-License-Identifier: Apache-2.0
"""The model against real kernels: every response of every recording, and that a wrong one is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kvmtrace
from replay.validate.compare import machine_of, validate
from replay.validate.row_tuples import RowTuple, rows_of
from replay.validate.tdp_driver import ConformanceCheck
from replay.validate.threads import RESPONSES
from replay.validate.validate_text import render
from tests.corpus import CORPUS, REPLAYED, each
from tests.profiles import examples
from traces import kernels
from traces.errors import Problem
from traces.kernels.vendors import SVM, VMX
from traces.reader import Trace

# One of each kernel and policy, with SMM, memslots, notifiers, dirty logging, huge pages and several vCPUs among them.
CHOSEN = (
    "smi-storm-5.10",
    "slot-delete-5.10",
    "smi-one-6.1-async",
    "slot-move-6.1",
    "dirty-log-huge-6.1",
    "notifier-6.12",
    "smi-both-7.x",
    "dirty-log-huge-7.x",
    "smi-one-5.10-ept",
    "slot-move-6.1-async-ept",
    "mmio-6.1-ept",
    "dirty-log-6.1-pml",
    "notifier-6.1-eptad0",
    "smi-one-7.x-ept",
)
# Columns that a response cannot have otherwise; a leaf's own flags and a root's frame it may.
TELLING = {
    "kvm_mmu_get_page": ("role", "gfn", "level", "flags"),
    "kvm_mmu_prepare_zap_page": ("role", "gfn", "level", "table"),
    "kvm_tdp_mmu_spte_changed": ("gfn", "level", "as_id", "old"),
    "kvm_mmu_set_spte": ("gfn", "level"),
    "root_get": ("role", "refs"),
    "root_put": ("role", "refs"),
    "mmu_load": ("role",),
    "table_free": ("role", "level", "table"),
    "zap_root_begin": ("role",),
    "mmu_free_roots": ("root",),
}


def run(rows: list[RowTuple], trace: Trace) -> bool:
    """Whether every response is as predicted and nothing is left."""
    kernel = kernels.recorded(trace.metadata)
    machine = machine_of(kernel, kernel.parameters(), trace.metadata.raw.get("modules"))
    check = ConformanceCheck(machine)
    check.run(rows)
    check.finish()
    clean = all(not tally.mismatched and not tally.missing for tally in check.tallies.values())
    return clean and not machine.removed and not machine.roots


@pytest.mark.parametrize("path", each(REPLAYED))
def test_every_response_of_every_recording_is_predicted(path: Path) -> None:
    report = validate(path)
    assert report.matched == report.expected > 0, render(report)
    assert report.left == 0
    assert not any(vm.skipped or vm.until for vm in report.vms)
    met = set(Trace.open(path).counts()) & set(RESPONSES)
    assert met <= set(report.tallies), "a kind of response that was recorded was not compared"


def test_the_corpus_has_every_kernel() -> None:
    assert {path.stem.removesuffix("-shadow").split("-", 1)[1][-5:] for path in REPLAYED} >= {"async"}
    assert len(REPLAYED) >= 177


@pytest.mark.slow
@pytest.mark.parametrize(("name", "policy"), [
    ("smi-storm-6.1", "async"), ("smi-storm-6.1", "sync"), ("smi-storm-6.1", "shadow"),
    ("smi-storm-6.1-async", "preserve"), ("smi-storm-6.1-async", "sync"), ("smi-storm-5.10", "preserve"),
    ("slot-delete-6.1", "async"), ("smi-storm-6.1-shadow", "preserve"),
])  # fmt: skip
def test_another_policy_does_not_match_it(name: str, policy: str) -> None:
    report = validate(CORPUS / f"{name}.parquet", policy)
    assert not report.holds
    assert any(vm.first is not None for vm in report.vms)


@pytest.fixture(scope="module")
def chosen() -> list[tuple[Trace, list[RowTuple]]]:
    found = []
    for name in CHOSEN:
        trace = Trace.open(CORPUS / f"{name}.parquet")
        found.append((trace, list(rows_of(trace, 1))))
        assert run(found[-1][1], trace)
    return found


@pytest.mark.slow
@examples(60)
@given(data=st.data())
def test_a_response_that_is_missing_doubled_or_altered_is_found(data: st.DataObject, chosen) -> None:  # type: ignore[no-untyped-def]
    trace, rows = chosen[data.draw(st.integers(0, len(chosen) - 1))]
    kind = data.draw(st.sampled_from([k for k in TELLING if any(row.kind == k for row in rows)]))
    places = [i for i, row in enumerate(rows) if row.kind == kind and (kind != "mmu_free_roots" or row.root)]
    at = places[data.draw(st.integers(0, len(places) - 1))]
    row = rows[at]
    # What follows of a free of roots is predicted; itself it is what happens.
    whole = () if kind == "mmu_free_roots" else ("drop", "double")
    mutation = data.draw(st.sampled_from([*whole, *TELLING[kind]]))
    # A processor with PML marks pages dirty by itself: which are to be cleaned, and how often, nothing predicts.
    cleaned = kind == "kvm_tdp_mmu_spte_changed" and row.old ^ row.new == kernels.recorded(trace.metadata).vendor.dirty
    assume(not (cleaned and mutation in whole))
    if mutation == "drop":
        mutated = [*rows[:at], *rows[at + 1 :]]
    elif mutation == "double":
        mutated = [*rows[: at + 1], row, *rows[at + 1 :]]
    else:
        value = getattr(row, mutation) or 0
        changed = value ^ 0x10000 if mutation == "old" else value + 1
        mutated = [*rows[:at], row._replace(**{mutation: changed}), *rows[at + 1 :]]
    assert not run(mutated, trace), f"{mutation} of {row} was not found"


def test_the_command_says_how_much_and_where(tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(kvmtrace.app, ["validate", str(CORPUS / "smi-storm-6.1.parquet"), "--json"])
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["schema"] == 3
    assert document["not_modelled"] == {"responses": 0, "vms": [], "kinds": {}}
    assert document["share"] == 1
    assert document["kinds"]["root_get"] == {"matched": 9, "mismatched": 0, "missing": 0}
    done = runner.invoke(kvmtrace.app, ["validate", str(CORPUS / "smi-storm-6.1.parquet"), "--policy", "async"])
    assert done.exit_code == 1
    assert not done.stdout.startswith("100 %")
    assert "first divergence at row" in done.stdout
    assert "refs 1 expected, 2 recorded" in done.stdout


def test_a_share_is_not_rounded_up_to_all() -> None:
    from replay.validate.validate_text import _share

    assert _share(999_999, 1_000_000) == "99.99 %"
    assert _share(5, 5) == "100 %"


def altered(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Path:
    """A recording whose metadata says otherwise."""
    path = CORPUS / "smi-storm-6.1.parquet"
    opened = Trace.open(path)
    opened.metadata = replace(opened.metadata, **changes)
    monkeypatch.setattr(Trace, "open", classmethod(lambda cls, path, *given: opened))
    return path


def test_after_a_loss_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(rows_of(Trace.open(CORPUS / "smi-storm-6.1.parquet"), 1))
    gap = {"cpu": 0, "lost": 3, "kinds": [], "since": rows[2000].time, "until": rows[2010].time}
    report = validate(altered(monkeypatch, gaps=(gap,), gap_count=1))
    assert report.holds
    assert not report.complete
    assert report.expected < 2000
    assert any("up to the first loss" in note for note in report.notes)
    assert not render(report).startswith("100 %:")


def test_after_kinds_were_left_out_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(rows_of(Trace.open(CORPUS / "smi-storm-6.1.parquet"), 1))
    stretch = {"kinds": ["mmu_load"], "since": rows[2000].time, "until": rows[2010].time, "level": 1}
    report = validate(altered(monkeypatch, left_out=(stretch,)))
    assert report.holds
    assert not report.complete
    assert report.expected < 2000
    assert any("the recorder left out kinds of event" in note for note in report.notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_a_recording_that_ends_at_any_moment_holds_up_to_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As a dump of a flight does: what a thread is in the middle of shows the rest after the end."""
    trace = Trace.open(CORPUS / f"{name}.parquet")
    rows = [row for row in rows_of(trace, 1) if row.kind != "vm_destroy"]
    random = Random(name)
    places = sorted(random.sample(range(100, len(rows)), 12))
    monkeypatch.setattr(Trace, "open", classmethod(lambda cls, path, *given: trace))
    for at in places:
        monkeypatch.setattr("replay.validate.compare.rows_of", lambda *_, at=at: iter(rows[:at]))
        report = validate(trace.path)
        assert report.holds, (at, render(report))
        assert report.vms[0].until.startswith("the VM was not destroyed")


def test_runs_of_probes_that_the_kernel_skipped_are_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = Trace.open(CORPUS / "smi-storm-6.1.parquet").metadata.raw
    report = validate(altered(monkeypatch, raw={**raw, "missed": {"on_kvm_exit": 170, "on_kvm_entry": 5}}))
    assert report.notes[0].startswith("the kernel skipped 175 runs of probes")


def test_a_loss_that_nobody_can_date_leaves_nothing_to_validate(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = {"root_put": {"emitted": {"0": 5}, "lost": {"0": 5}, "stored": {}}}
    with pytest.raises(Problem, match="events were lost"):
        validate(altered(monkeypatch, loss=loss))


def test_a_vm_that_was_running_before_is_not_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    vms = tuple({**vm, "origin": "snapshot"} for vm in Trace.open(CORPUS / "smi-storm-6.1.parquet").metadata.vms)
    with pytest.raises(Problem, match="running before the recording began"):
        validate(altered(monkeypatch, vms=vms))


def test_without_the_functions_of_a_root_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = ({"kind": "root_put", "point": "", "how": "none", "why": "CONFIG_KPROBES is off"},)
    kinds = {k: n for k, n in Trace.open(CORPUS / "smi-storm-6.1.parquet").metadata.kinds.items() if k != "root_put"}
    with pytest.raises(Problem, match=r"root_put not recorded \(CONFIG_KPROBES is off\)"):
        validate(altered(monkeypatch, probes=probes, kinds=kinds))


def test_an_unknown_policy_is_one_clear_line() -> None:
    with pytest.raises(Problem, match="root policy none-such"):
        validate(CORPUS / "smi-storm-6.1.parquet", "none-such")


RECORDINGS_HERE = Path(__file__).parents[1] / "recordings"
QUALIFIED = 3 << 7  # a guest address goes with the fault, and it was its final page


def in_intels_codes(row: RowTuple) -> RowTuple | None:
    """A row of an AMD recording as VMX would have reported it; None where VMX has no such event."""
    if row.kind == "kvm_page_fault":
        if row.code & 8:
            return None
        present = 5 << 3 if row.code & 1 else 0  # readable and executable
        return row._replace(code=QUALIFIED | present | (row.code & 2) | (4 if row.code & 16 else 0))
    if row.kind == "kvm_exit" and row.code == 0x400:
        return row._replace(code=49 if row.value & 8 else 48)
    return row


@pytest.mark.parametrize("name", ["smi-storm-6.1-ept", "steady-6.1-ept", "smi-storm-6.1-sync", "field-6.1"])
def test_recordings_of_other_vendors_and_modified_kernels(name: str) -> None:
    report = validate(RECORDINGS_HERE / f"{name}.parquet")
    assert report.matched == report.expected > 200, render(report)
    assert report.holds
    assert report.policy == ("sync" if name.endswith("sync") else "preserve")


@pytest.mark.parametrize("name", ["mmio-6.1", "dirty-log-6.1", "smi-both-7.x"])
def test_faults_and_mmio_by_intels_codes(name: str) -> None:
    trace = Trace.open(CORPUS / f"{name}.parquet")
    (number,) = {vm["id"] for vm in trace.metadata.vms}
    told = list(rows_of(trace, number))
    rows = [other for row in told if (other := in_intels_codes(row)) is not None]
    # The codes are Intel's; the bits of its SPTEs are still those of NPT.
    kernel = replace(kernels.recorded(trace.metadata), vendor=replace(VMX, paging="npt"))
    check = ConformanceCheck(machine_of(kernel, kernel.parameters()))
    check.run(rows)
    check.finish()
    assert check.first is None, check.first
    answers = sum(tally.matched for kind, tally in check.tallies.items() if kind in check.responses)
    assert answers == sum(row.kind in check.responses for row in told)
    # Read by AMD's codes they would not come out, but for recordings without MMIO and dirty logging.
    wrong = ConformanceCheck(machine_of(replace(kernel, vendor=SVM), kernel.parameters()))
    wrong.run(rows)
    wrong.finish()
    assert (wrong.first is None) == (name == "smi-both-7.x")
