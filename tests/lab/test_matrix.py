# SPDX-License-Identifier: Apache-2.0
"""Which recordings the matrix makes, their names, and the table of where they come from."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tracer import vmm
from tracer.lab import fetch, matrix, qemu
from tracer.lab.cli import app
from tracer.lab.lab_kernels import KERNELS
from tracer.lab.matrix import DIRECT, EPT, NO_AD, PAGING, PAGING_ON_INTEL, PML, TDP, Cell, MatrixRow
from traces import durable
from traces.errors import ENVIRONMENT, Problem


def row(cell: Cell, **changes: object) -> MatrixRow:
    made = MatrixRow(
        file=f"{cell.name}.parquet", scenario=cell.scenario, arguments=cell.arguments, kernel=cell.kernel,
        package="linux-image-1 1-1", release="1", policy="sync", parameters=("kvm.tdp_mmu=1",), recorder="0.1.0",
        events=1234567, lost=0, roots=2, tables=9, faults=514, leaves=513, guest_ns=12_345_678,
        kinds={"kvm_page_fault": 514}, bytes=100, sha256="0" * 64,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (Cell("smi-storm", (), "5.10"), "smi-storm-5.10"),
        (Cell("smi-storm", (), "6.1", DIRECT), "smi-storm-6.1-shadow"),
        (Cell("smi-storm", (), "6.1", PAGING), "smi-storm-6.1-npt0"),
        (Cell("cr4-toggle", ("--bit", "pge"), "6.1-async"), "cr4-toggle-bit-pge-6.1-async"),
        (Cell("dirty-log", ("--huge",), "7.x", DIRECT), "dirty-log-huge-7.x-shadow"),
    ],
)
def test_names(cell: Cell, name: str) -> None:
    assert cell.name == name


def test_all_scenarios_on_all_kernels() -> None:
    amd = (TDP, DIRECT, PAGING)
    cells = matrix.cells({name: amd if name in ("5.10", "6.1") else (TDP,) for name in KERNELS})
    assert len({cell.name for cell in cells}) == len(cells)
    both = {(kernel, TDP) for kernel in KERNELS} | {("5.10", DIRECT), ("6.1", DIRECT)}
    for scenario in vmm.scenarios():
        made = {(cell.kernel, cell.mmu) for cell in cells if cell.scenario == scenario.name}
        on = {(kernel, TDP) for kernel in matrix.KINDS.get(scenario.name, ())} or both
        assert made - {("5.10", PAGING), ("6.1", PAGING)} == (on if scenario.name not in matrix._LEFT_OUT else set())
    assert {cell.kernel for cell in cells if cell.arguments == ("--how", "ring")} == {"6.1", "7.x"}
    assert {cell.what for cell in cells} >= set(matrix.KINDS)
    assert [cell.name for cell in matrix.cells({"6.1": (TDP,)}, ["storm"])] == ["storm-6.1"]
    assert [cell.name for cell in matrix.cells({"6.12": (TDP, DIRECT)}, ["ksm"])] == ["ksm-6.12"]
    paged = [cell for cell in cells if cell.mmu == PAGING]
    assert len(paged) == 2 * 8, "the telling ones only: what is shipped has its limit"
    assert not any(cell.arguments for cell in cells if cell.mmu != TDP)


def test_what_is_recorded_on_intel() -> None:
    """The same with EPT as with NPT; and on one kernel what only this CPU shows."""
    assert {name: matrix.worth(kernel, ("intel",)) for name, kernel in KERNELS.items()} == {
        "5.10": (EPT,), "6.1": (EPT, PML, NO_AD, PAGING_ON_INTEL), "6.1-async": (EPT,), "6.12": (EPT,), "7.x": (EPT,),
    }  # fmt: skip
    amd, intel = (matrix.cells(dict.fromkeys(KERNELS, (mmu,))) for mmu in (TDP, EPT))
    amd = [cell for cell in amd if cell.what not in matrix.KINDS]
    varied = matrix._VARIED_ON_INTEL
    stock = [cell for cell in amd if not KERNELS[cell.kernel].variant]
    assert {cell.name for cell in intel if not KERNELS[cell.kernel].variant} == {
        f"{cell.name}-ept" for cell in stock if not cell.arguments or cell.kernel in varied
    }
    assert {cell.what for cell in intel if KERNELS[cell.kernel].variant} == set(matrix._GIVING_UP)
    assert {cell.name for cell in matrix.cells({"6.1": (PML,)})} == {f"{name}-6.1-pml" for name in matrix._DIRTYING}
    assert {cell.scenario for cell in matrix.cells({"6.1": (PAGING_ON_INTEL,)})} == set(matrix._NO_EPT)


def test_unknown_scenario() -> None:
    with pytest.raises(Problem, match="none: no such scenario; there are smi-storm"):
        matrix.cells({"6.1": (TDP,)}, ["none"])


def test_a_failed_boot_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boots: list[list[str]] = []

    def record(group: list[Cell], directory: Path) -> tuple[list[MatrixRow], list[Problem]]:
        boots.append([cell.name for cell in group])
        made = [cell for cell in group if cell.scenario != "churn"]
        for cell in made:
            (directory / f"{cell.name}.parquet").write_bytes(b"")
        return [row(cell) for cell in made], [Problem("churn: panicked")] if made != group else []

    monkeypatch.setattr(matrix, "record", record)
    scenarios = ("steady", "churn", "huge")
    cells = [Cell(name, (), kernel) for name in scenarios for kernel in ("6.1", "5.10")]
    said: list[str] = []
    rows, problems = matrix.fill(cells, tmp_path, said.append)
    assert boots == [["steady-6.1", "churn-6.1", "huge-6.1"], ["steady-5.10", "churn-5.10", "huge-5.10"]]
    assert [one.file for one in rows] == [
        f"{name}.parquet" for name in ("steady-6.1", "steady-5.10", "huge-6.1", "huge-5.10")
    ]
    assert [str(one) for one in problems] == ["churn: panicked"] * 2
    assert sorted(line.split(" ", 1)[1] for line in said) == ["5.10: 2 recordings", "6.1: 2 recordings"]

    # Again: what is there is kept, what failed is tried again, what was deleted is made again.
    boots.clear()
    (tmp_path / "huge-6.1.parquet").unlink()
    rows, problems = matrix.fill(cells, tmp_path, said.append)
    assert boots == [["churn-6.1", "huge-6.1"], ["churn-5.10"]]
    assert len(rows) == 4


def test_provenance_reads_back_and_has_a_line_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(group: list[Cell], directory: Path) -> tuple[list[MatrixRow], list[Problem]]:
        for cell in group:
            (directory / f"{cell.name}.parquet").write_bytes(b"")
        return [row(cell) for cell in group], []

    monkeypatch.setattr(matrix, "record", record)
    cells = [Cell("steady", (), "6.1"), Cell("cr4-toggle", ("--bit", "pge"), "6.1", DIRECT)]
    matrix.fill(cells, tmp_path, lambda line: None)
    assert matrix.provenance(tmp_path) == [row(cells[1]), row(cells[0])]
    assert json.loads((tmp_path / matrix.PROVENANCE).read_text())["schema"] == 1
    lines = [line for line in (tmp_path / matrix.TABLE).read_text().splitlines() if line.startswith("| ")]
    assert lines[2] == "| steady-6.1 | linux-image-1 1-1 | sync | 0.1.0 | 1,234,567 | 0 | 2 | 9 | 514 | 513 | 12 |"


@pytest.mark.parametrize("call", ["write_all", "sync", "replace"])
def test_a_full_disk_leaves_the_provenance_that_was_there(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(group: list[Cell], directory: Path) -> tuple[list[MatrixRow], list[Problem]]:
        for cell in group:
            (directory / f"{cell.name}.parquet").write_bytes(b"")
        return [row(cell) for cell in group], []

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(matrix, "record", record)
    matrix.fill([Cell("steady", (), "6.1")], tmp_path, lambda line: None)
    before = {name: (tmp_path / name).read_bytes() for name in (matrix.PROVENANCE, matrix.TABLE)}
    monkeypatch.setattr(durable, call, fail)
    with pytest.raises(Problem, match=r"provenance\.json: cannot be written: No space left on device"):
        matrix.fill([Cell("churn", (), "6.1")], tmp_path, lambda line: None)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".parquet", ".parquet"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"recordings": [{}]}', '{"recordings": [{"file": "x"}]}', '{"recordings": 3}']
)
def test_damaged_provenance(tmp_path: Path, text: str) -> None:
    (tmp_path / matrix.PROVENANCE).write_text(text)
    with pytest.raises(Problem, match="not a table of provenance"):
        matrix.provenance(tmp_path)


def test_table_for_a_terminal() -> None:
    lines = matrix.render(
        [row(Cell(name, (), "6.1")) for name in ("steady", "churn", "roots", "mmio", "cr4-toggle")]
    ).splitlines()
    assert lines[0].split() == ["recording", "policy", "events", "lost", "roots", "tables", "faults", "leaves", "ms"]
    assert lines[1].split() == ["steady-6.1", "sync", "1,234,567", "0", "2", "9", "514", "513", "12"]
    assert len({len(line) for line in lines}) == 1
    assert max(map(len, lines)) <= 80


def test_no_kernel_here(store: Path) -> None:
    result = CliRunner().invoke(app, ["matrix"])
    assert isinstance(result.exception, Problem)
    assert (str(result.exception), result.exception.code) == ("no kernel is here: kvmtrace lab fetch 6.1", ENVIRONMENT)


def test_matrix_needs_its_directory(store: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["matrix", "--kernel", "6.1", "-o", str(tmp_path / "none")])
    assert isinstance(result.exception, Problem)
    assert str(result.exception).endswith("/none: no such directory")


def test_an_interrupt_does_not_wait_for_the_boots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endings: list[qemu.Ending] = []

    def record(group: list[Cell], directory: Path) -> tuple[list[MatrixRow], list[Problem]]:
        if group[0].kernel == "6.1":
            endings.append(qemu.run(["sh", "-c", f"echo > {tmp_path}/runs; exec sleep 600"], tmp_path / "serial", 600))
        while not (tmp_path / "runs").exists():
            time.sleep(0.01)
        return [], []

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(matrix, "record", record)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        matrix.fill([Cell("steady", (), "6.1"), Cell("steady", (), "5.10")], tmp_path, interrupt, jobs=2)
    assert time.monotonic() - begin < 300
    assert endings == [qemu.Ending.EMULATOR_FAILED]


def test_a_kernel_that_is_not_here_does_not_stop_the_others(store: Path, tmp_path: Path) -> None:
    rows, problems = matrix.fill([Cell("steady", (), "6.12")], tmp_path, lambda line: None)
    assert rows == []
    assert [str(problem) for problem in problems] == ["kernel 6.12 is not here: kvmtrace lab fetch 6.12"]


@pytest.mark.parametrize(("asked", "bochs", "cpus"), [
    ([], True, ("amd", "intel")), ([], False, ("amd",)), (["--cpu", "intel"], False, ("intel",)),
])  # fmt: skip
def test_the_corpus_is_of_both_cpus_and_without_the_kernel_that_is_in_no_package(
    asked: list[str], bochs: bool, cpus: tuple[str, ...], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emulator() -> None:
        if not bochs:
            raise Problem("no bochs-bin: apt-get install bochs", ENVIRONMENT)

    groups: list[tuple[str, str]] = []

    def record(group: list[Cell], directory: Path) -> tuple[list[MatrixRow], list[Problem]]:
        groups.append((group[0].kernel, group[0].mmu))
        return [], []

    monkeypatch.setattr(matrix, "record", record)
    monkeypatch.setattr("tracer.lab.bochs.emulator", emulator)
    monkeypatch.setattr(fetch, "fetch", lambda name, say, update: None)
    result = CliRunner().invoke(app, ["corpus", str(tmp_path / "corpus"), *asked])
    assert result.exit_code == 0, result.exception
    assert "kernel 6.1-async is in no package" in result.stderr
    assert ("; Intel's recordings are left as they are" in result.stderr) is (not asked and not bochs)
    assert sorted(groups) == sorted(
        (kernel, mmu) for kernel in ("5.10", "6.1", "6.12", "7.x") for mmu in matrix.worth(KERNELS[kernel], cpus)
    )
