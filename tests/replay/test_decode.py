# SPDX-License-Identifier: Apache-2.0
"""Decoding: each rule on a few rows, and whole recordings in batches of any size."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay import plan, run
from replay.decode.capabilities import _SEEN, Capabilities
from replay.decode.cases import Case
from replay.decode.inputs import HIDDEN, NO_STATE, TRIGGER
from replay.decode.specialize import Specialization
from replay.decode.vm_inputs import VmInputs
from replay.simulate.operations import RESETS, Cause, Op
from tests.profiles import examples
from tests.replay.recording import OLD_ROLE, OLD_WP, ROLE, SMM_ROLE, Guest
from traces.errors import Problem
from traces.kernels import roles
from traces.kernels.triggers import Trigger
from traces.reader import Trace

CORPUS = Path(__file__).parents[2] / "traces" / "corpus"
HVA = 0x7F0000000000
BATCHED = (
    "smi-both-5.10",
    "huge-6.1-async",
    "mmio-5.10-shadow",
    "dirty-log-huge-7.x",
    "wp-toggle-5.10",
    "roots-6.1-shadow",
)

Row = tuple[str, int, Any]


def rows(capabilities: Capabilities, size: int = 1 << 16) -> list[Row]:
    """All inputs as (what, vCPU, argument); of a trigger its name, of a range its bounds."""
    found: list[Row] = []
    for vm in capabilities.trace.metadata.vms:
        for part in VmInputs(capabilities, vm, size=size):
            for op, gfn in zip(part.op.tolist(), part.gfn.tolist(), strict=True):
                found.append(_row(op, gfn, part.ranges.rows))
    return found


def _row(op: int, gfn: int, ranges: list[tuple[int, int]]) -> Row:
    kind, vcpu = op & 15, op >> 16
    if kind == TRIGGER:
        return Trigger(gfn & 255).name, vcpu, gfn >> 8
    if kind in (Op.ZAP, Op.SPLIT):
        return Op(kind).name, op >> 4 & 7, ranges[gfn]
    marks = ("+resets" if op & RESETS else "") + ("+hidden" if op & HIDDEN else "")
    return Op(kind).name + marks, vcpu, gfn


def names(capabilities: Capabilities) -> list[str]:
    return [name for name, _, _ in rows(capabilities)]


@cache
def _whole(name: str) -> tuple[Capabilities, list[Row]]:
    capabilities = Capabilities(Trace.open(CORPUS / f"{name}.parquet"))
    return capabilities, rows(capabilities)


@examples(25)
@given(st.sampled_from(BATCHED), st.integers(12, 400))
def test_batches_of_any_size_say_the_same(name: str, size: int) -> None:
    """A row is explained by rows of its own batch or of the next: between a reset and its load lie some ten."""
    capabilities, whole = _whole(name)
    assert rows(capabilities, size) == whole


def test_a_fault_on_a_present_leaf_is_a_fix(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    guest.fault(7)
    guest.fault(7, code=7)
    guest.fault(8, code=7, installs=False, enter=False)
    guest.of("fast_page_fault", w0=8 << 12, w1=7, w2=0x865, w3=0x867, n=4)
    guest.of("kvm_entry")
    assert [row for row in rows(guest.write(tmp_path / "t.parquet")) if row[0] in ("TOUCH", "FIX")] == [
        ("TOUCH", 0, 7), ("FIX", 0, 7), ("FIX", 0, 8)
    ]  # fmt: skip


def test_mmio_exits_once_with_or_without_its_spte(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    guest.fault(9, installs=False, enter=False)
    guest.of("mark_mmio_spte", w0=9, root=guest.root)
    guest.of("kvm_mmu_set_spte", w0=9, level=1, root=guest.root)
    guest.of("kvm_entry")
    assert names(guest.write(tmp_path / "t.parquet")) == ["ROLE", "ENTER", "FIX"]


def test_a_huge_page_where_the_first_page_was_mmio_is_a_leaf_of_its_own(tmp_path: Path) -> None:
    """A memslot was added meanwhile. Only in one fault do both events tell of one MMIO SPTE."""
    guest = Guest()
    guest.load()
    guest.fault(512, installs=False, enter=False)
    guest.of("mark_mmio_spte", w0=512, root=guest.root)
    guest.of("kvm_entry")
    guest.fault(512, level=2)
    capabilities = guest.write(tmp_path / "t.parquet")
    assert names(capabilities) == ["ROLE", "ENTER", "FIX", "TOUCH"]
    (check,) = run.replay(plan.make(capabilities, [capabilities.own.name])).checks
    both = next(reading for reading in check.readings if reading.event == "kvm_mmu_set_spte")
    assert (both.replayed, both.low) == (2, 2)


SET_MEMORY = 0x4020AE46


def deleting_a_slot() -> Guest:
    """A guest with gfn 17 mapped, of which a thread is taking the slot away."""
    guest = Guest()
    guest.slot(16, 8, 0x7F0000000000)
    guest.load()
    guest.fault(17)
    guest.vm("ioctl", w0=SET_MEMORY)
    guest.vm("memslot", w0=16, w1=0x7F0000000000, w2=0)
    return guest


@pytest.mark.parametrize(("kernel", "zaps"), [("6.12.50", True), ("6.1.100", False)])
@pytest.mark.parametrize("shown", [True, False])
def test_a_slot_that_goes_alone_takes_its_leaves_along(tmp_path: Path, kernel: str, zaps: bool, shown: bool) -> None:
    """KVM_X86_QUIRK_SLOT_ZAP_ALL off: no row says so but the lack of kvm_mmu_zap_all_fast. Leaves need not be there."""
    guest = deleting_a_slot()
    if shown:
        guest.vm("kvm_tdp_mmu_spte_changed", w0=17, level=1, w1=0xE67)
    guest.fault(30)
    guest.vm("ioctl_end", w0=SET_MEMORY)
    found = names(guest.write(tmp_path / "t.parquet", kernel=kernel, policy="preserve"))
    after = ["ZAP", "TOUCH"] if shown else ["TOUCH", "ZAP"]
    assert found == ["ROLE", "ENTER", "TOUCH", *(after if zaps else ["TOUCH"])]


def test_a_slot_that_takes_the_roots_along_takes_nothing_else(tmp_path: Path) -> None:
    guest = deleting_a_slot()
    guest.vm("kvm_mmu_zap_all_fast")
    guest.vm("kvm_tdp_mmu_spte_changed", w0=17, level=1, w1=0xE67)
    guest.vm("ioctl_end", w0=SET_MEMORY)
    found = names(guest.write(tmp_path / "t.parquet", kernel="6.12.50", policy="preserve"))
    assert found == ["ROLE", "ENTER", "TOUCH", "INVALIDATE"]


@pytest.mark.parametrize(("kernel", "spaces"), [("6.12.50", [0, 1]), ("6.1.100", [1])])
def test_a_range_zap_is_of_one_address_space_or_of_all(tmp_path: Path, kernel: str, spaces: list[int]) -> None:
    guest = Guest()
    guest.load()
    guest.fault(0xFEE00)
    guest.vm("zap_leafs", w0=0xFEE00, w1=0xFEE01, as_id=0 if len(spaces) > 1 else 1)
    found = rows(guest.write(tmp_path / "t.parquet", kernel=kernel, policy="preserve"))
    assert [row[1:] for row in found if row[0] == "ZAP"] == [(space, (0xFEE00, 0xFEE01)) for space in spaces]


def test_what_the_shadow_mmu_installs_unasked_is_hidden(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    guest.fault(9, enter=False)
    for gfn in (8, 10):
        guest.of("kvm_mmu_set_spte", w0=gfn, level=1, root=guest.root)
    guest.of("kvm_entry")
    found = rows(guest.write(tmp_path / "t.parquet", policy="shadow"))
    assert [row for row in found if row[0].startswith("TOUCH")] == [
        ("TOUCH", 0, 9), ("TOUCH+hidden", 0, 8), ("TOUCH+hidden", 0, 10)
    ]  # fmt: skip


def test_a_reset_in_a_fault_belongs_to_the_touch(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    guest.fault(9, enter=False)
    guest.of("mmu_reset", role=guest.role)
    guest.load()
    guest.fault(9)
    found = names(guest.write(tmp_path / "t.parquet"))
    assert found == ["ROLE", "ENTER", "TOUCH+resets", "ROLE", "ENTER", "TOUCH"]


def test_a_guest_that_every_exit_resets_gets_on_only_with_roots_that_stay(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    for gfn in range(20):
        guest.fault(gfn, enter=False)
        guest.of("mmu_reset", role=guest.role)
        guest.load()
    capabilities = guest.write(tmp_path / "t.parquet")
    old, new = run.replay(plan.make(capabilities, ["async", "preserve"])).outcomes
    assert old.stuck[0] is not None
    assert old.counts()["faults"] == 1
    assert new.stuck == [None]
    assert new.counts()["faults"] == 20
    assert new.counts()["creations"] == 1


def test_smi_and_rsm_are_named_whatever_the_order(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    guest.exit(0x60)
    guest.of("kvm_smm_transition", flags=1)
    guest.of("mmu_reset", role=guest.role)
    guest.of("mmu_reset", role=SMM_ROLE)
    guest.load(role=SMM_ROLE)
    guest.exit(0x73)
    guest.of("mmu_reset", role=SMM_ROLE)  # 5.10 resets before it says that it leaves SMM
    guest.of("kvm_smm_transition", flags=0)
    guest.of("mmu_reset")
    guest.load(role=0x3784)
    found = rows(guest.write(tmp_path / "t.parquet"))
    usual = roles.USUAL
    assert found == [
        ("ROLE", 0, usual), ("ENTER", 0, 0),
        ("SMI", 0, usual | roles.SMM), ("ROLE", 0, usual | roles.SMM), ("ENTER", 0, 0),
        ("RSM", 0, NO_STATE), ("RSM", 0, usual), ("ROLE", 0, usual), ("ENTER", 0, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("exit_code", "fields", "trigger"),
    [(0x7C, {"w2": 1}, "EFER"), (0x7C, {"w2": 0}, "EXIT"), (0x14, {}, "CR4"), (0x60, {}, "EXIT"), (0x10, {}, "CR0")],
)
def test_a_reset_is_named_by_the_exit_before_it(
    tmp_path: Path, exit_code: int, fields: dict[str, int], trigger: str
) -> None:
    guest = Guest()
    guest.load()
    guest.exit(exit_code, **fields)
    guest.of("mmu_reset", role=guest.role)
    guest.load()
    found = [name for name in names(guest.write(tmp_path / "t.parquet")) if name not in ("ROLE", "ENTER")]
    # What 6.1 does not unload for, the same exit may yet have been.
    assert found[-1] == trigger
    assert set(found[:-1]) <= {"CR4_SILENT", "CR0_SILENT"}


def test_userspace_resets_by_ioctl(tmp_path: Path) -> None:
    guest = Guest()
    guest.of("ioctl", w0=0x4138AE84)
    guest.of("mmu_reset")
    guest.load()
    assert names(guest.write(tmp_path / "t.parquet")) == ["SREGS", "ROLE", "ENTER"]


@pytest.mark.parametrize(("flip", "trigger"), [(OLD_WP, "CR0_WP"), (0, "CR0")])
def test_words_of_old_kernels_tell_wp_from_the_rest(tmp_path: Path, flip: int, trigger: str) -> None:
    guest = Guest(OLD_ROLE)
    guest.load()
    guest.exit(0x10)
    guest.of("mmu_reset", role=OLD_ROLE)
    guest.load(role=OLD_ROLE ^ flip)
    assert trigger in names(guest.write(tmp_path / "t.parquet", kernel="5.10.200", policy="sync"))


def test_values_of_control_registers_decide(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    for value in (0x80010031, 0x80000031, 0x80000031, 0x80000039):
        guest.exit(0x10)
        guest.of("kvm_cr", w0=0, w1=value, flags=1)
        guest.of("kvm_entry")
    found = rows(guest.write(tmp_path / "t.parquet"))
    triggers = [row for row in found if row[0].startswith("CR0")]
    # Of the first it is not known what it changed; the last two leave WP alone.
    assert triggers == [
        ("CR0_SILENT", 0, roles.USUAL | roles.MAYBE_WP),
        ("CR0_WP", 0, roles.USUAL & ~roles.WP | roles.MAYBE_WP),
    ]
    assert [row[0] for row in found].count("ENTER") == 3


def test_a_reset_says_that_a_first_write_was_of_a_role_bit(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    guest.exit(28, w2=0x04)
    guest.of("kvm_cr", w0=4, w1=0x100020, flags=1)
    guest.of("mmu_reset", role=guest.role)
    guest.load(created=False)
    capabilities = guest.write(tmp_path / "t.parquet", host={"kernel": "6.1.55", "vendor": "GenuineIntel"})
    assert names(capabilities)[2:6] == ["CR4_SILENT", "CR4", "ROLE", "ENTER"]


NESTED_ROLE, SHADOW_ROLE = 0x23784, 0x23704  # of the TDP MMU; of the tables that a nested guest has from its host


def test_a_nested_guest_without_nested_paging_keeps_its_host_s_root(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    guest.fault(5)
    for created in (True, False):
        guest.of("kvm_nested_vmenter")
        guest.of("new_pgd", role=NESTED_ROLE)
        if created:
            guest.load(role=NESTED_ROLE)
            guest.fault(5)
        guest.of("kvm_nested_vmexit")
        guest.of("new_pgd", role=ROLE)
    capabilities = guest.write(tmp_path / "t.parquet", policy="preserve", kernel="6.1.100")
    nested = roles.USUAL | roles.GUEST
    assert [row for row in rows(capabilities) if row[0] in ("SWITCH", "ROLE")] == [
        ("ROLE", 0, roles.USUAL), ("SWITCH", 0, nested), ("ROLE", 0, nested),
        ("SWITCH", 0, roles.USUAL), ("SWITCH", 0, nested), ("SWITCH", 0, roles.USUAL),
    ]  # fmt: skip
    replayed = run.replay(plan.make(capabilities, []))
    assert not [line for line in replayed.missing if "nested" in line]
    counts = replayed.outcomes[0].counts()
    assert (counts["creations"], counts["loads"], counts["faults"]) == (2, 2, 2)


def test_faults_in_the_shadow_of_a_host_s_tables_are_no_accesses_of_its_own(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    guest.fault(5)
    own = guest.root
    guest.of("kvm_nested_vmenter")
    guest.of("new_pgd", role=SHADOW_ROLE)
    guest.root = own + 1
    guest.of("kvm_mmu_get_page", root=guest.root, role=SHADOW_ROLE, level=4, w1=guest.root, flags=1)
    guest.of("mmu_load", root=guest.root, role=SHADOW_ROLE)
    guest.fault(0x900)
    capabilities = guest.write(tmp_path / "t.parquet")
    assert [row for row in rows(capabilities) if row[0] == "TOUCH"] == [("TOUCH", 0, 5)]
    assert names(capabilities).count("ROLE") == 1
    assert any("1 entries of nested guests" in line for line in run.replay(plan.make(capabilities, [])).missing)


def test_notifiers_reach_guest_frames_through_the_memslots_of_their_time(tmp_path: Path) -> None:
    guest = Guest()
    guest.slot(0, 16, HVA)
    guest.vm("memslot", w0=100, w1=HVA, w2=16, n=0, as_id=1)
    guest.vm("ioctl_end", w0=0x4020AE46)
    guest.load()
    guest.vm("kvm_unmap_hva_range", w0=HVA + 0x2000, w1=HVA + 0x4001)
    guest.slot(50, 16, HVA)
    guest.vm("kvm_unmap_hva_range", w0=HVA, w1=HVA + 0x1000)
    guest.vm("kvm_unmap_hva_range", w0=HVA - 0x5000, w1=HVA)
    found = [row for row in rows(guest.write(tmp_path / "t.parquet")) if row[0] == "ZAP"]
    assert sorted(found[:2]) == [("ZAP", 0, (2, 5)), ("ZAP", 1, (102, 105))]
    assert sorted(found[2:]) == [("ZAP", 0, (50, 51)), ("ZAP", 1, (100, 101))]


def test_groups_end_with_their_slot(tmp_path: Path) -> None:
    guest = Guest()
    guest.slot(10, 3, HVA)
    guest.load()
    for gfn in (11, 40):
        guest.fault(gfn)
    capabilities = guest.write(tmp_path / "t.parquet")
    (part,) = VmInputs(capabilities, capabilities.trace.metadata.vms[0])
    touches = part.op[part.op & 15 == Op.TOUCH]
    assert [(op >> 7 & 7, op >> 10 & 7) for op in touches.tolist()] == [(2, 4), (0, 0)]


def test_dirty_logging_splits_and_collapses(tmp_path: Path) -> None:
    guest = Guest()
    guest.slot(512, 512, HVA)
    guest.slot(512, 512, HVA, flags=1)
    guest.vm("memslot", w0=512, w1=HVA, w2=512, w3=0, n=0)
    guest.vm("kvm_tdp_mmu_spte_changed", w0=512, level=2, w1=0x827, w2=0x5A0)
    guest.vm("kvm_tdp_mmu_spte_changed", w0=512, level=1, w1=0xE65, w2=0x5A0)
    guest.vm("ioctl_end", w0=0x4020AE46)
    guest.vm("kvm_tdp_mmu_spte_changed", w0=1024, level=2, w1=0x827, w2=0x5A0)
    guest.load()
    found = rows(guest.write(tmp_path / "t.parquet"))
    assert [row for row in found if row[0] in ("SPLIT", "COLLAPSE")] == [
        ("SPLIT", 0, (512, 1024)),
        ("COLLAPSE", 0, 512),
    ]


def test_an_invalidation_may_make_each_vcpu_load(tmp_path: Path) -> None:
    guest = Guest()
    guest.load(0)
    guest.load(1, created=False)
    guest.vm("kvm_mmu_zap_all_fast")
    for vcpu in (1, 0, 1):
        guest.exit(0x60, vcpu)
        guest.of("kvm_entry", vcpu, root=guest.root)
    guest.vm("vm_destroy")
    guest.of("kvm_entry", 0)
    found = rows(guest.write(tmp_path / "t.parquet"))
    assert found[4:] == [("INVALIDATE", 0, 0), ("ENTER", 1, 0), ("ENTER", 0, 0), ("END", 0, 0)]


def _unmapped(tmp_path: Path, guest: Guest) -> list[Row]:
    lacking = ("kvm_unmap_hva_range", "kvm_tdp_mmu_spte_changed")
    capabilities = guest.write(tmp_path / "t.parquet", kernel="5.10.200", policy="sync", lacking=lacking)
    return [row for row in rows(capabilities) if row[0] in ("ZAP", "TOUCH")]


def test_a_page_faulted_in_again_was_removed(tmp_path: Path) -> None:
    guest = Guest(OLD_ROLE)
    guest.load()
    for gfn in (5, 6, 5):
        guest.fault(gfn)
    assert _unmapped(tmp_path, guest) == [("TOUCH", 0, 5), ("TOUCH", 0, 6), ("ZAP", 0, (5, 6)), ("TOUCH", 0, 5)]


def test_the_page_that_a_table_was_built_anew_for_may_be_removed_too(tmp_path: Path) -> None:
    """As when a guest reads its first page, and then writes to it: the host copies it (COW)."""
    guest = Guest(OLD_ROLE)
    guest.load()
    guest.fault(5)
    guest.of("kvm_exit", w0=0x400)
    guest.of("kvm_page_fault", w0=5 << 12, w1=6, root=guest.root, role=guest.role)
    guest.of("kvm_mmu_spte_requested", w0=5, level=1, root=guest.root)
    guest.of("kvm_mmu_get_page", w0=0, level=2, role=OLD_ROLE, flags=1)
    guest.of("kvm_mmu_set_spte", w0=5, level=1, root=guest.root, w1=0xE67)
    guest.of("kvm_entry", root=guest.root)
    guest.fault(5)
    assert _unmapped(tmp_path, guest) == [
        ("TOUCH", 0, 5), ("ZAP", 0, (0, 512)), ("TOUCH", 0, 5), ("ZAP", 0, (5, 6)), ("TOUCH", 0, 5)
    ]  # fmt: skip


def test_two_vcpus_that_fault_at_once_remove_nothing(tmp_path: Path) -> None:
    guest = Guest(OLD_ROLE)
    guest.load()
    guest.load(1, created=False)
    guest.fault(5, 1, installs=False, enter=False)
    guest.fault(5, 0)
    guest.of("kvm_mmu_set_spte", 1, w0=5, level=1, root=guest.root)
    assert _unmapped(tmp_path, guest) == [("TOUCH", 0, 5), ("TOUCH", 1, 5)]


def test_an_emptied_root_has_nothing_to_remove(tmp_path: Path) -> None:
    guest = Guest(OLD_ROLE)
    guest.load()
    guest.fault(5)
    guest.vm("kvm_mmu_zap_all_fast")
    guest.fault(5)
    assert _unmapped(tmp_path, guest) == [("TOUCH", 0, 5), ("TOUCH", 0, 5)]


def test_states_become_the_words_of_the_kernel_replayed(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    guest.exit(0x60)
    guest.of("kvm_smm_transition", flags=1)
    guest.load(role=SMM_ROLE)
    capabilities = guest.write(tmp_path / "t.parquet")
    (part,) = VmInputs(capabilities, capabilities.trace.metadata.vms[0])
    specialized = Specialization(capabilities.kernel, Case(), False, 1)
    block = specialized.block(part)
    assert [Op(int(op) & 15).name for op in block.op] == ["ROLE", "ENTER", "UNLOAD", "ROLE", "ROLE", "ENTER"]
    assert [specialized.words[i].word for i in block.gfn[[0, 3, 4]]] == [0x3784, SMM_ROLE, SMM_ROLE]
    assert block.gfn[2] == Cause.SMI
    assert np.array_equal(block.seq, np.sort(block.seq))


def test_what_cannot_be_replayed_is_refused_in_one_line(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    for number, (options, words) in enumerate(
        [
            ({"lacking": ("kvm_mmu_set_spte", "kvm_page_fault")}, "leaf installs, page faults are not recorded"),
            ({"modules": {"kvm_amd": {"npt": "N"}}}, "nested paging was off"),
            ({"kernel": ""}, "which kernel"),
            ({"policy": "unknown"}, "root policy"),
        ]
    ):
        with pytest.raises(Problem, match=words) as problem:
            guest.write(tmp_path / f"{number}.parquet", **options)
        assert "\n" not in str(problem.value)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    guest = Guest()
    guest.load()
    guest.fault(5)
    guest.of("kvm_nested_vmenter")
    capabilities = guest.write(tmp_path / "t.parquet", lacking=("kvm_smm_transition",), missed={"x": 3})
    missing = run.replay(plan.make(capabilities, [])).missing
    for words in ("SMIs are not recorded", "skipped 3 runs", "still running at the end", "1 entries of nested guests"):
        assert any(words in line for line in missing), words


@pytest.mark.parametrize(
    ("exit_code", "fields", "trigger"),
    [
        (28, {"w2": 0x00}, "CR0"),
        (28, {"w2": 0x04}, "CR4"),
        (28, {"w2": 0x03}, "EXIT"),
        (17, {}, "RSM"),
        (32, {}, "EFER"),
        (48, {}, "EXIT"),
    ],
)
def test_exits_of_intel(tmp_path: Path, exit_code: int, fields: dict[str, int], trigger: str) -> None:
    guest = Guest()
    guest.load()
    guest.exit(exit_code, **fields)
    guest.of("mmu_reset", role=guest.role)
    guest.load()
    capabilities = guest.write(tmp_path / "t.parquet", host={"kernel": "6.1.55", "vendor": "GenuineIntel"})
    assert [name for name in names(capabilities) if name not in ("ROLE", "ENTER")][-1] == trigger


@pytest.mark.parametrize(("qualification", "name"), [(0x182, "TOUCH"), (0x18A, "FIX"), (0x1BA, "FIX")])
def test_what_was_present_for_intel_is_in_the_qualification(tmp_path: Path, qualification: int, name: str) -> None:
    guest = Guest()
    guest.load()
    guest.fault(9, code=qualification)
    capabilities = guest.write(tmp_path / "t.parquet", host={"kernel": "6.1.55", "vendor": "GenuineIntel"})
    assert names(capabilities)[-1] == name


def test_a_vm_that_ran_before_is_entered_with_the_root_it_has(tmp_path: Path) -> None:
    guest = Guest()
    guest.rows.clear()
    for vcpu in (0, 1):
        guest.of("kvm_page_fault", vcpu, root=guest.root, role=SMM_ROLE)
        guest.of("kvm_entry", vcpu, root=guest.root)
        guest.of("kvm_entry", vcpu, root=guest.root)
    capabilities = guest.write(tmp_path / "t.parquet")
    assert [row for row in rows(capabilities) if row[0] != "TOUCH"] == [
        ("ROLE", 0, roles.USUAL | roles.SMM), ("ENTER", 0, 0), ("ROLE", 1, roles.USUAL | roles.SMM), ("ENTER", 1, 0)
    ]  # fmt: skip
    assert any("was running before" in line for line in run.replay(plan.make(capabilities, [])).missing)


def test_without_function_probes_entries_show_the_loads(tmp_path: Path) -> None:
    """Tracepoints only: SMM transitions unload, and the next entry loads; the root it has tells the word."""
    guest = Guest()
    for role, entering in ((0x3784, None), (SMM_ROLE, 1), (0x3784, 0)):
        if entering is not None:
            guest.exit(0x73)
            guest.of("kvm_smm_transition", flags=entering)
        guest.root += 1
        guest.of("kvm_mmu_get_page", root=guest.root, role=role, level=4, w1=guest.root, flags=1)
        guest.of("kvm_entry", root=guest.root)
        guest.role = role
        guest.fault(5)
    old, new = run.replay(plan.make(guest.write(tmp_path / "t.parquet"), ["async", "preserve"])).outcomes
    assert (old.counts()["creations"], old.counts()["faults"]) == (3, 3)
    assert (new.counts()["creations"], new.counts()["faults"], new.counts()["hits"]) == (2, 2, 1)


def test_metadata_may_say_anything(tmp_path: Path) -> None:
    """Numbers beyond what a machine has are cut; a vCPU that no row can name is refused."""
    guest = Guest()
    guest.load()
    guest.fault(9)
    guest.vm("kvm_unmap_hva_range", w0=0, w1=(1 << 64) - 1)
    guest.of("kvm_mmu_set_spte", w0=10, level=1, root=guest.root + 100)
    capabilities = guest.write(tmp_path / "t.parquet")
    most = (1 << 64) - 1
    slot = {"slot": 1, "as_id": most, "gfn": most, "pages": most, "hva": 0, "flags": "x", "since": most, "until": "y"}
    slots = [slot, dict(slot, since=None, until=None)]
    vm = dict(capabilities.trace.metadata.vms[0], slots=slots)
    found = [name for part in VmInputs(capabilities, vm) for name in part.op & 15]
    assert found.count(Op.TOUCH) == 2
    with pytest.raises(Problem, match="no row can name"):
        VmInputs(capabilities, dict(vm, vcpus=[{"id": 1 << 20, "tid": 1}]))


def test_a_trace_in_which_no_vcpu_did_anything_is_refused() -> None:
    """As live recordings of software KVM are: roots come and go, but no entry, fault or load is shown."""
    trace = Trace.open(CORPUS / "steady-6.1.parquet")
    quiet = {kind: rows for kind, rows in trace.metadata.kinds.items() if kind not in _SEEN}
    trace.metadata = replace(trace.metadata, kinds=quiet)
    with pytest.raises(Problem, match="no entry into a guest, no fault and no load of a root"):
        Capabilities(trace)
