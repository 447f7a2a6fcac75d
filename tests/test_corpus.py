# SPDX-License-Identifier: Apache-2.0
"""The recordings we ship: whole, what their table says, and each kernel's root policy as the recorder saw it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import polars as pl
import pytest

from tests.corpus import CORPUS, RECORDINGS, each
from tracer.lab.lab_kernels import KERNELS
from tracer.lab.matrix import (
    DIRECT,
    EPT,
    KINDS,
    MMUS,
    PAGING,
    PAGING_ON_INTEL,
    PROVENANCE,
    TDP,
    Cell,
    MatrixRow,
    cells,
    provenance,
    worth,
)  # fmt: skip
from traces.reader import Trace

ROWS = provenance(CORPUS)
LIMIT = 19_000_000
LIMIT_INTEL = 6_000_000
OLD = ("sync", "async")


def _mmu(row: MatrixRow) -> str:
    """Which of a kernel's MMUs a recording is of, by its name."""
    names = {f"{Cell(row.scenario, row.arguments, row.kernel, mmu).name}.parquet": mmu for mmu in MMUS}
    return names[row.file]


def rows(name: str) -> pl.LazyFrame:
    return pl.scan_parquet(CORPUS / f"{name}.parquet").with_columns(pl.col("kind").cast(pl.String)).sort("seq")


def test_all_of_it_and_nothing_else() -> None:
    files = {path.name for path in CORPUS.glob("*.parquet")}
    assert files == {row.file for row in ROWS}
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) <= LIMIT
    assert {row.kernel for row in ROWS} == set(KERNELS)
    everywhere = [row for row in ROWS if Cell(row.scenario, row.arguments, row.kernel).what not in KINDS]
    scenarios = {row.scenario for row in everywhere}
    for kernel in KERNELS:
        assert {row.scenario for row in everywhere if row.kernel == kernel and "ept" not in row.file} == scenarios
    for kernel in (name for name in KERNELS if not KERNELS[name].variant):
        assert {row.scenario for row in ROWS if row.file.endswith(f"-{kernel}-ept.parquet")} == scenarios
    stock = {name: worth(kernel, ("amd",)) for name, kernel in KERNELS.items() if not kernel.variant}
    assert {f"{cell.name}.parquet" for cell in cells(stock)} <= files, "`kvmtrace lab corpus` would make others"
    intel = {name: worth(kernel, ("intel",)) for name, kernel in KERNELS.items()}
    shipped = {row.file for row in ROWS if MMUS[_mmu(row)].cpu != "amd"}
    assert shipped == {f"{cell.name}.parquet" for cell in cells(intel)}, "it would make others"
    assert sum((CORPUS / name).stat().st_size for name in shipped) <= LIMIT_INTEL
    assert json.loads((CORPUS / PROVENANCE).read_text())["schema"] == 1


@pytest.mark.parametrize("path", each(RECORDINGS))
def test_each_is_what_its_table_says(path: Path) -> None:
    (row,) = [row for row in ROWS if row.file == path.name]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == row.sha256
    trace = Trace.open(path)
    assert trace.counts() == row.kinds
    assert trace.metadata.raw["complete"] is True
    assert trace.metadata.lost == row.lost == 0
    assert trace.metadata.policy == row.policy
    assert trace.metadata.raw["missed"] == {}, "no probe was skipped by the kernel"
    mmu = _mmu(row)
    assert row.parameters[len(KERNELS[row.kernel].parameters) :] == MMUS[mmu].parameters
    assert row.policy == ("shadow" if mmu in (DIRECT, PAGING, PAGING_ON_INTEL) else KERNELS[row.kernel].policy)
    intel = MMUS[mmu].cpu != "amd"
    assert trace.metadata.raw["host"]["vendor"] == ("GenuineIntel" if intel else "AuthenticAMD")
    assert (row.emulator.startswith("Bochs ") and row.cpu == MMUS[mmu].cpu) or not intel


@pytest.mark.parametrize(
    ("kernel", "mmu"),
    [(row.kernel, _mmu(row)) for row in ROWS if row.scenario == "smi-storm" and _mmu(row) in (TDP, EPT)],
)
def test_the_soft_hang_as_recorded(kernel: str, mmu: str) -> None:
    """Old policies build a root at every load and refill it; the new one finds the two roots it has."""
    trace = rows("-".join(filter(None, ("smi-storm", kernel, mmu))))
    loads = trace.filter(pl.col("kind") == "mmu_load").select("root", "role").collect()
    faults = trace.filter(pl.col("kind") == "kvm_page_fault").select(pl.len()).collect().item()
    assert len(loads) == 9, "one load to begin with, two for each of four SMIs"
    assert loads["role"].n_unique() == 2, "inside and outside SMM"
    if KERNELS[kernel].policy in OLD:
        assert loads["root"].n_unique() == len(loads)
        assert faults == 5 * 513 + 4
    else:
        assert loads["root"].n_unique() == 2
        assert faults == 513 + 1


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if KERNELS[kernel].policy.startswith("preserve")])
def test_reference_counts_of_a_preserved_root(kernel: str) -> None:
    """Two when loaded (the vCPU's and the VM's own), so a put sees two and a later load makes it two again."""
    trace = rows(f"smi-storm-{kernel}")
    got = trace.filter(pl.col("kind") == "root_get").select("refs").collect()["refs"]
    assert got.unique().to_list() == [2]
    puts = trace.filter(pl.col("kind") == "root_put", pl.col("vcpu") == 0).select("refs").collect()["refs"]
    assert puts.unique().to_list() == [2]


@pytest.mark.parametrize("name", ["smi-storm-6.1", "smi-storm-6.1-async", "slot-delete-6.12", "two-vms-7.x"])
def test_sptes_tables_and_roots_hang_together(name: str) -> None:
    """Each table that is linked is the one just allocated; present bits, empty and frozen values are the layout's."""
    layout = Trace.open(CORPUS / f"{name}.parquet").metadata.raw["layout"]
    spte = layout["spte"]
    assert layout["table_is_physical"] is True
    present = 1 << spte["present"][0]
    shift, width = spte["pfn"]
    changed = rows(name).filter(pl.col("kind") == "kvm_tdp_mmu_spte_changed").collect()
    absent = changed.filter(pl.col("old") & present == 0)["old"].unique().to_list()
    assert set(absent) <= {spte["nonpresent"], spte["frozen"]}
    pages = rows(name).filter(pl.col("kind") == "kvm_mmu_get_page", pl.col("root") == 0).collect()
    tables = set(pages["table"])
    linked = changed.filter(pl.col("level") > 1, pl.col("old") & present == 0, pl.col("new") & present != 0)
    frames = {(value >> shift) & ((1 << width) - 1) for value in linked["new"]}
    assert frames == tables
    assert set(linked["root"]) == set(rows(name).filter(pl.col("kind") == "root_get").collect()["root"])


@pytest.mark.parametrize("path", each(CORPUS / r.file for r in ROWS if r.policy in ("async", "preserve")))
def test_every_table_is_freed_once_and_by_the_vm_that_got_it(path: Path) -> None:
    """No leak, no event missing: RCU frees tables behind everybody's back, and each comes back to its VM."""
    trace = rows(path.stem)
    made = trace.filter(pl.col("kind") == "kvm_mmu_get_page").select("vm", "table").collect()
    freed = trace.filter(pl.col("kind") == "table_free").select("vm", "table").collect()
    assert sorted(freed.rows()) == sorted(made.rows())


def test_who_unloaded_and_why() -> None:
    """Every unload of a loaded root in smi-storm lies inside an SMM transition: the question of the first mail."""
    trace = rows("smi-storm-6.1").filter(pl.col("vcpu") == 0).collect()
    inside = trace.filter(pl.col("kind").is_in(["kvm_smm_transition", "mmu_reset", "mmu_free_roots", "mmu_load"]))
    kinds = inside.filter((pl.col("kind") != "mmu_free_roots") | (pl.col("root") > 0))["kind"].to_list()
    unloads = [i for i, kind in enumerate(kinds) if kind == "mmu_free_roots"]
    assert len(unloads) >= 8
    for i in unloads[:8]:
        assert kinds[i - 2 : i] == ["kvm_smm_transition", "mmu_reset"]
