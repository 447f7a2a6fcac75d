# SPDX-License-Identifier: Apache-2.0
"""The model of shadow paging against real kernels, made-up rows where those show too little, and mutated rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kvmtrace
from replay.decode.capabilities import Capabilities
from replay.validate.compare import validate
from replay.validate.row_tuples import RowTuple, rows_of
from replay.validate.shadow_driver import COMPARED, Paged, is_paged
from replay.validate.steps.shadow_model import Pages
from replay.validate.steps.shadow_state import CREATED, UNSYNC
from replay.validate.validate_text import render
from tests.corpus import CORPUS, PAGED, each
from tests.profiles import examples
from tests.replay.paging import draw_mutation, mutated, run, unwatched
from traces.errors import Problem
from traces.reader import Trace

# On each kernel; switches of page tables, recycled pages, SMM, invalidation, two role words among them.
CHOSEN = (
    "roots-5.10-npt0", "smi-storm-6.1-npt0", "slot-delete-6.12-npt0", "wp-toggle-7.x-npt0", "roots-7.x-npt0",
    "slot-delete-5.10-npt0", "roots-6.1-ept0", "slot-delete-6.1-ept0",
)  # fmt: skip


@pytest.mark.parametrize("path", each(PAGED))
def test_every_response_of_every_recording_is_predicted(path: Path) -> None:
    report = validate(path)
    assert report.matched == report.expected > 0, render(report)
    assert report.complete
    assert report.left == 0
    trace = Trace.open(path)
    compared = {kind: sum((t.matched, t.mismatched, t.missing)) for kind, t in report.tallies.items()}
    assert {kind: n for kind, n in trace.counts().items() if kind in COMPARED} == {
        kind: n for kind, n in compared.items() if kind in COMPARED
    }, "each row of a kind that is compared is one response"
    assert any("lookups" in note for note in report.notes)


@pytest.mark.parametrize("path", each(PAGED))
def test_replay_refuses_it_and_says_why(path: Path) -> None:
    with pytest.raises(Problem, match="nested paging was off: roots then follow the guest's page tables"):
        Capabilities(Trace.open(path))


def test_every_kernel_has_its_recordings() -> None:
    for kernel in ("5.10", "6.1", "6.12", "7.x"):
        assert len([path for path in PAGED if path.stem.endswith(f"-{kernel}-npt0")]) == 8


Chosen = tuple[Trace, list[RowTuple]]


@pytest.fixture(scope="module")
def chosen() -> list[Chosen]:
    found = []
    for name in CHOSEN:
        trace = Trace.open(CORPUS / f"{name}.parquet")
        found.append((trace, list(rows_of(trace, 1))))
        assert run(found[-1][0], 1, found[-1][1])
    return found


@pytest.mark.slow
@examples(80)
@given(data=st.data())
def test_a_response_that_is_missing_doubled_or_altered_is_found(data: st.DataObject, chosen: list[Chosen]) -> None:
    trace, rows = chosen[data.draw(st.integers(0, len(chosen) - 1))]
    at, mutation = draw_mutation(data, trace, rows)
    assert run(trace, 1, mutated(rows, at, mutation)) is None, f"{mutation} of {rows[at]} was not found"


@examples(40)
@given(data=st.data())
def test_mutations_are_found_where_loads_and_puts_are_not_recorded(data: st.DataObject, blinded: Chosen) -> None:
    """As on a machine without kprobes: the same rows, but for those that need them."""
    trace, rows = blinded
    at, mutation = draw_mutation(data, trace, rows, but="kvm_mmu_set_spte")
    assert run(trace, 1, mutated(rows, at, mutation)) is None, f"{mutation} of {rows[at]} was not found"


@pytest.fixture(scope="module")
def blinded() -> Chosen:
    return _blinded("roots-6.1-npt0")


def _blinded(name: str) -> Chosen:
    trace = Trace.open(CORPUS / f"{name}.parquet")
    blind = ("mmu_load", "mmu_free_roots", "mmu_free_obsolete_roots", "root_put", "new_pgd", "vm_destroy", "mmu_unload")
    for kind in blind:
        unwatched(trace, kind)
    return trace, [row for row in rows_of(trace, 1) if row.kind not in blind]


@pytest.mark.parametrize("path", each(PAGED))
def test_without_kprobes_less_is_compared_and_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, rows = _blinded(path.stem)
    found = run(trace, 1, rows)
    assert found is not None
    assert set(found.tallies) <= {
        "kvm_mmu_get_page",
        "kvm_mmu_prepare_zap_page",
        "kvm_mmu_set_spte",
        "kvm_mmu_zap_all_fast",
    }
    assert any("last put" in what for what in found.taken)
    assert any("references" in what for what in found.taken)


def test_the_verdict_names_what_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace.open(CORPUS / "slot-delete-6.1-npt0.parquet")
    for kind in ("root_put", "vm_destroy"):
        unwatched(trace, kind)
    monkeypatch.setattr(Trace, "open", classmethod(lambda cls, path, *given: trace))
    report = validate(CORPUS / "slot-delete-6.1-npt0.parquet")
    assert "not observable in this recording, hence not compared: root_put, vm_destroy" in report.notes


def test_without_zaps_there_is_nothing_to_validate(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = unwatched(Trace.open(CORPUS / "slot-delete-6.1-npt0.parquet"), "kvm_mmu_prepare_zap_page")
    monkeypatch.setattr(Trace, "open", classmethod(lambda cls, path, *given: trace))
    with pytest.raises(Problem, match=r"kvm_mmu_prepare_zap_page not recorded \(CONFIG_KPROBES is off\)"):
        validate(CORPUS / "slot-delete-6.1-npt0.parquet")


@pytest.mark.parametrize("policy", ["async", "preserve", "sync"])
def test_another_policy_does_not_match_it(policy: str) -> None:
    report = validate(CORPUS / "roots-6.1-npt0.parquet", policy)
    assert not report.holds
    assert report.matched < report.expected
    assert any(vm.first is not None for vm in report.vms)


def test_the_command_says_what_it_took() -> None:
    done = CliRunner().invoke(kvmtrace.app, ["validate", str(CORPUS / "roots-6.1-npt0.parquet")])
    assert done.exit_code == 0
    assert done.stdout.startswith("100 %: 2,003 of 2,003 responses matched")
    assert "taken from the recording, not predicted: 631 lookups" in done.stdout


@pytest.mark.parametrize(
    ("modules", "policy", "paged"),
    [
        ({"kvm": {"tdp_mmu": "Y"}, "kvm_amd": {"npt": "N"}}, "shadow", True),
        ({"kvm": {"tdp_mmu": "N"}, "kvm_intel": {"ept": "0"}}, "shadow", True),
        ({"kvm": {"tdp_mmu": "N"}}, "shadow", True),  # software KVM: no vendor's module at all
        ({"kvm": {"tdp_mmu": "N"}, "kvm_amd": {"npt": "Y"}}, "shadow", False),
        ({"kvm": {"tdp_mmu": "Y"}, "kvm_amd": {"npt": "Y"}}, "async", False),
        ({}, "shadow", False),
        (None, "shadow", False),
        ({"kvm": {}, "kvm_amd": 3}, "shadow", True),
    ],
)
def test_which_recordings_are_of_shadow_paging(modules: Any, policy: str, paged: bool) -> None:
    meta = Trace.open(CORPUS / "smi-storm-6.1.parquet").metadata
    assert is_paged(replace(meta, raw=meta.raw | {"modules": modules, "policy": {"name": policy, "why": ""}})) is paged


# What no scenario makes a guest do: write to its page tables.

ROOT, UPPER, LEAF = 0x3704, 0x3302, 0x3301


class Guest:
    """Rows of one vCPU with a root, made up as 6.1 (or with `old` 5.10) would show them, and the model they are for."""

    def __init__(self, old: bool = False, counted: bool = False) -> None:
        self.pages = Pages(invalid_bit=1 << 11, direct_bit=1 << 7, guest_bits=~0x407FF, counted=counted, old=old)
        self.rows: list[RowTuple] = []
        self.last = 0

    def row(self, kind: str, role: int = 0, gfn: int = 0, table: int = 0, **more: Any) -> Guest:
        empty = RowTuple(len(self.rows), 0, 0, 0, 7, kind, 0, role, role & 15, 0, gfn, 0, 0, table, *(0,) * 8)
        self.rows.append(empty._replace(**more))
        return self

    def get(self, role: int, gfn: int, table: int, flags: int = CREATED, **more: Any) -> Guest:
        self.last = len(self.rows)
        return self.row("kvm_mmu_get_page", role, gfn, table, flags=flags, **more)

    def zap(self, role: int, gfn: int, table: int, flags: int = 0, **more: Any) -> Guest:
        return self.row("kvm_mmu_prepare_zap_page", role, gfn, table, flags=flags, **more)

    def sync(self, role: int, gfn: int, table: int) -> Guest:
        return self.row("kvm_mmu_sync_page", role, gfn, table, flags=UNSYNC)

    def unsync(self, role: int, gfn: int, table: int) -> Guest:
        return self.row("kvm_mmu_unsync_page", role, gfn, table)

    def fault(self) -> Guest:
        self.last = len(self.rows)
        return self.row("kvm_page_fault")

    def ends(self) -> Guest:
        self.last = len(self.rows)
        return self.row("kvm_userspace_exit")

    def why(self) -> str:
        """The first thing that is not as predicted; empty if all is."""
        check = Paged(self.pages, self.last, shows_end=False)
        check.run(self.rows)
        check.finish()
        return check.first.why if check.first is not None else ""


def two_levels(**given: bool) -> Guest:
    """A root of gfn 1 in table 1, and under it pages 2 (level 2) and 3 (level 1, out of sync)."""
    guest = Guest(**given).get(ROOT, 1, 1).fault().get(UPPER, 2, 2).get(LEAF, 3, 3)
    return guest.fault().unsync(LEAF, 3, 3)


def test_in_and_out_of_sync() -> None:
    assert not two_levels().sync(LEAF, 3, 3).fault().unsync(LEAF, 3, 3).why()
    assert "nothing expected" in two_levels().sync(LEAF, 3, 3).sync(LEAF, 3, 3).why()
    assert "flags 2 expected, 0 recorded" in two_levels().unsync(LEAF, 3, 3).why()
    assert "nothing expected" in two_levels().unsync(UPPER, 2, 2).why(), "only pages of the last level go out of sync"
    assert "nothing expected" in two_levels().unsync(LEAF, 4, 4).why(), "only pages that are there"


def test_a_lookup_finds_an_unsync_page_as_it_is() -> None:
    assert not two_levels().fault().get(LEAF, 3, 3, UNSYNC).why()
    assert "flags 2 expected, 0 recorded" in two_levels().fault().get(LEAF, 3, 3, 0).why()
    assert "flags 2 expected, 1 recorded" in two_levels().fault().get(LEAF, 3, 3, CREATED).why()


def test_an_unsync_page_does_not_outlive_a_lookup_of_its_gfn_for_an_upper_level() -> None:
    """6.1 zaps it, 5.10 syncs it."""
    zapped = two_levels().fault().zap(LEAF, 3, 3, UNSYNC).sync(LEAF, 3, 3)
    assert not zapped.get(UPPER, 3, 4).why()
    assert "kvm_mmu_prepare_zap_page expected" in two_levels().fault().get(UPPER, 3, 4).why()
    assert not two_levels(old=True).fault().sync(LEAF, 3, 3).get(UPPER, 3, 4).why()
    assert "kvm_mmu_sync_page expected" in two_levels(old=True).fault().get(UPPER, 3, 4).why()


def test_a_page_that_is_found_leaves_unsync_pages_made_before_it_alone() -> None:
    """6.1 walks the hash chain, newest first, up to the page it looks for; 5.10 syncs only for a page it creates."""
    for old in (False, True):
        guest = Guest(old=old).get(ROOT, 1, 1).fault().get(LEAF, 3, 3).fault().get(UPPER, 3, 4)
        assert not guest.fault().unsync(LEAF, 3, 3).fault().get(UPPER, 3, 4, 0).why()
    newer = Guest().get(ROOT, 1, 1).fault().get(UPPER, 3, 4).fault().get(LEAF, 3, 3).unsync(LEAF, 3, 3)
    assert "kvm_mmu_prepare_zap_page expected" in newer.fault().get(UPPER, 3, 4, 0).why()


def test_unsync_pages_go_with_the_page_above_them() -> None:
    children = two_levels().fault().zap(UPPER, 2, 2).zap(LEAF, 3, 3, UNSYNC).sync(LEAF, 3, 3)
    assert not children.get(LEAF, 3, 3).why()
    alone = two_levels().fault().zap(UPPER, 2, 2)
    assert not alone.get(LEAF, 3, 3, UNSYNC).why(), "which are below it the recording does not tell"
    forgotten = two_levels().fault().zap(UPPER, 2, 2).zap(LEAF, 3, 3, UNSYNC).get(LEAF, 3, 3)
    assert "kvm_mmu_sync_page expected, kvm_mmu_get_page recorded" in forgotten.why()


def test_a_page_table_that_is_in_sync_is_never_mapped_writable() -> None:
    leaf = {"new": 0x9000 | 1 << 11 | 2, "level": 1}
    assert not two_levels().fault().row("kvm_mmu_set_spte", gfn=3, table=3, **leaf).why()
    mapped = two_levels().sync(LEAF, 3, 3).fault().row("kvm_mmu_set_spte", gfn=3, table=3, **leaf)
    assert "contradict" in mapped.why()
    assert not two_levels().sync(LEAF, 3, 3).row("kvm_mmu_set_spte", gfn=3, table=3, **leaf | {"new": 0x9801}).why()


def test_obsolete_pages_are_never_found_again() -> None:
    guest = two_levels().row("kvm_mmu_zap_all_fast", value=3).zap(ROOT, 1, 1).zap(UPPER, 2, 2)
    assert not guest.zap(LEAF, 3, 3, UNSYNC).sync(LEAF, 3, 3).fault().get(LEAF, 3, 5).why()
    found = two_levels().row("kvm_mmu_zap_all_fast", value=3).get(LEAF, 3, 3, UNSYNC)
    assert "kvm_mmu_prepare_zap_page expected, kvm_mmu_get_page recorded" in found.why()
    order = two_levels().row("kvm_mmu_zap_all_fast", value=3).zap(UPPER, 2, 2)
    assert "gfn 1 expected, 2 recorded" in order.why(), "the oldest first"


def test_pages_of_a_vm_that_ends_go_the_newest_first() -> None:
    guest = two_levels().ends().zap(LEAF, 3, 3, UNSYNC).sync(LEAF, 3, 3).zap(UPPER, 2, 2)
    assert not guest.zap(ROOT, 1, 1, refs=1).zap(ROOT | 1 << 11, 1, 1).why()
    twice = two_levels().ends().zap(LEAF, 3, 3, UNSYNC).sync(LEAF, 3, 3).zap(UPPER, 2, 2).zap(UPPER, 2, 2)
    assert "gfn 1 expected, 2 recorded" in twice.why()
    assert "gfn 3 expected, 2 recorded" in two_levels().ends().zap(UPPER, 2, 2).why()


def test_the_oldest_pages_make_room() -> None:
    """64 pages are the least a VM has; below 5 free ones the 21 oldest go, but for those that are roots."""

    def full(counted: bool) -> Guest:
        guest = Guest(counted=counted).get(ROOT, 1, 1)
        if counted:
            guest.row("mmu_load", ROOT)
        for gfn in range(2, 61):
            guest.fault().get(LEAF, gfn, gfn)
        return guest.fault()

    for counted in (False, True):
        guest = full(counted)
        for gfn in range(2, 23):
            guest.zap(LEAF, gfn, gfn)
        assert not guest.get(LEAF, 100, 100).why()
        assert "kvm_mmu_prepare_zap_page expected" in full(counted).get(LEAF, 100, 100).why()
        fewer = full(counted)
        for gfn in range(2, 22):
            fewer.zap(LEAF, gfn, gfn)
        assert "kvm_mmu_prepare_zap_page expected, kvm_mmu_get_page recorded" in fewer.get(LEAF, 100, 100).why()
        assert full(counted).zap(LEAF, 3, 3).why(), "not the oldest"


def test_a_fault_looks_up_downwards_and_under_its_root() -> None:
    guest = Guest(counted=True).get(ROOT, 1, 1).row("mmu_load", ROOT)
    assert not guest.fault().get(UPPER, 2, 2).get(LEAF, 3, 3).why()
    guest = Guest(counted=True).get(ROOT, 1, 1).row("mmu_load", ROOT)
    assert "a level below 1 expected" in guest.fault().get(LEAF, 3, 3).get(UPPER, 2, 2).why()
    guest = Guest(counted=True).get(ROOT, 1, 1).row("mmu_load", ROOT)
    assert "a word of root 0x3704 expected" in guest.fault().get(0x1302, 2, 2).why(), "its EFER.NX is another"


def test_recent_page_tables_are_kept_in_slots() -> None:
    """Four root slots, rotated at each switch: the fifth page table puts the first, one of the four needs no load."""

    def loaded(*pgds: int) -> Guest:
        guest = Guest(counted=True)
        for number, pgd in enumerate(pgds):
            if number:
                guest.row("new_pgd", ROOT, value=pgd << 12).row("mmu_free_roots", ROOT, value=1)
            guest.get(ROOT, pgd, pgd, root=pgd).row("mmu_load", ROOT, root=pgd)
        return guest

    four = (1, 2, 3, 4)
    assert not loaded(*four).why()
    for pgd in four:
        assert not loaded(*four).row("new_pgd", ROOT, value=pgd << 12).row("kvm_entry").why()
    fifth = loaded(*four).row("new_pgd", ROOT, value=5 << 12)
    assert not fifth.row("mmu_free_roots", ROOT, value=1, root=1).row("root_put", ROOT, table=1, root=1, refs=1).why()
    wrong = loaded(*four).row("new_pgd", ROOT, value=5 << 12).row("mmu_free_roots", ROOT, value=1, root=2)
    assert "root 1 expected, 2 recorded" in wrong.why()
    none = loaded(*four).row("new_pgd", ROOT, value=5 << 12).row("kvm_entry")
    assert "mmu_free_roots value=slots 0x1 expected" in none.why().replace("root=1 ", "")
    # 3 is current from now on, 4, 2 and 1 come after it; then 5 takes the place of 1.
    again = loaded(*four).row("new_pgd", ROOT, value=3 << 12).row("new_pgd", ROOT, value=5 << 12)
    assert not again.row("mmu_free_roots", ROOT, value=1, root=1).row("root_put", ROOT, table=1, root=1, refs=1).why()
