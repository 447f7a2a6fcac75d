# SPDX-License-Identifier: Apache-2.0
"""What an Intel CPU does by the description of vendors, compared with the recordings of one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from tests.corpus import CORPUS
from traces.kernels.exit_names import exit_name
from traces.kernels.roles import has_ad_disabled
from traces.kernels.vendors import VMX
from traces.reader import Trace

ALL = sorted(CORPUS.glob("*-ept.parquet"))


def rows(path: Path) -> pl.DataFrame:
    return pl.read_parquet(path).with_columns(pl.col("kind").cast(pl.String)).sort("seq")


def exits(path: Path) -> Counter[str]:
    codes = rows(path).filter(pl.col("kind") == "kvm_exit")["code"].to_list()
    return Counter(exit_name(VMX, code) for code in codes)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem, marks=pytest.mark.corpus) for path in ALL])
def test_every_exit_has_a_name_and_every_fault_its_own(path: Path) -> None:
    seen = exits(path)
    assert not [name for name in seen if name.startswith("0x")]
    kinds = Trace.open(path).metadata.kinds
    assert seen["EPT_VIOLATION"] == kinds["kvm_page_fault"]
    assert seen["EPT_MISCONFIG"] == kinds.get("handle_mmio_page_fault", 0), "MMIO SPTEs that are there do not fault"
    assert seen["PML_FULL"] == 0, "Haswell has no PML"


def test_a_misconfiguration_is_of_a_page_that_was_marked() -> None:
    """The first access is a violation, for which KVM makes an entry that VMX refuses; each later one meets that."""
    of_mmio = rows(CORPUS / "mmio-6.1-ept.parquet")
    marked = of_mmio.filter(pl.col("kind") == "mark_mmio_spte")["gfn"].to_list()
    exited = of_mmio.filter(pl.col("kind") == "kvm_exit", pl.col("code").is_in(list(VMX.mmio)))
    assert len(exited) == 64, "sixteen pages, once in each of four passes after the first"
    assert len(marked) == len(set(marked)) == 16
    assert set(of_mmio.filter(pl.col("kind") == "handle_mmio_page_fault")["gfn"].to_list()) == set(marked)


@pytest.mark.parametrize(("name", "leaves"), [("cr4-toggle", 5), ("efer-toggle", 5), ("wp-toggle", 0),
                                              ("cr4-toggle-bit-pge", 0)])  # fmt: skip
def test_what_unloads_on_intel(name: str, leaves: int) -> None:
    """CR0.WP and CR4.PGE are the guest's own with EPT on 6.1: no exit; CR4.SMEP and EFER.NX exit, and unload."""
    told = rows(CORPUS / f"{name}-6.1-ept.parquet")
    exited = told.filter(pl.col("kind") == "kvm_exit")
    registers = exited.filter((pl.col("code") == VMX.cr) | pl.col("code").is_in(list(VMX.msr_write)))
    assert len(registers) == leaves
    assert len(told.filter(pl.col("kind") == "mmu_reset")) == leaves + 1


def test_with_pml_no_write_to_a_logged_page_faults() -> None:
    """The processor logs it; without, each is a fault that fast_page_fault repairs. KVM changes SPTEs alike."""
    logged, faulted = (Trace.open(CORPUS / f"dirty-log-6.1-{mmu}.parquet").metadata for mmu in ("pml", "ept"))
    assert (logged.raw["modules"]["kvm_intel"]["pml"], faulted.raw["modules"]["kvm_intel"]["pml"]) == ("Y", "N")
    assert "fast_page_fault" not in logged.kinds
    mended = faulted.kinds["fast_page_fault"]
    assert mended == 1536
    assert faulted.kinds["kvm_page_fault"] == logged.kinds["kvm_page_fault"] + mended
    assert faulted.kinds["kvm_tdp_mmu_spte_changed"] == logged.kinds["kvm_tdp_mmu_spte_changed"]


def test_without_accessed_and_dirty_bits_every_fault_tries_the_fast_way() -> None:
    """An access that KVM tracks by taking rights away would look like it; the first of a page is not repaired by it."""
    told = rows(CORPUS / "smi-storm-6.1-eptad0.parquet")
    tried = told.filter(pl.col("kind") == "fast_page_fault")
    assert len(tried) == len(told.filter(pl.col("kind") == "kvm_page_fault")) == 514
    assert (tried["old"] == 0).all()
    words = told.filter(pl.col("kind") == "mmu_load")["role"].unique().to_list()
    assert all(has_ad_disabled(word) for word in words)
    leaves = told.filter(pl.col("kind") == "kvm_mmu_set_spte")["new"]
    assert not any(leaf & (VMX.accessed | VMX.dirty) for leaf in leaves.to_list())
