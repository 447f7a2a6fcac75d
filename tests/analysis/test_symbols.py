# SPDX-License-Identifier: Apache-2.0
"""Names of a guest's addresses: three kinds of file, and KASLR, which is found or said to be unknown."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kvmtrace
from analysis.reading.symbols import Symbols, load
from tests.traces.making import event, stream, trace
from traces.errors import Problem

TEXT = 0xFFFFFFFF81000000
MAP = {"_text": TEXT, "startup_64": TEXT, "default_idle": TEXT + 0xA00100, "acpi_idle_enter": TEXT + 0xB12300,
       "copy_page": TEXT + 0x912340, "native_write_msr": TEXT + 0x1000, "_etext": TEXT + 0x1000000}  # fmt: skip


def system_map(path: Path, moved: int = 0) -> Path:
    lines = [f"{address + moved:016x} T {name}\n" for name, address in sorted(MAP.items(), key=lambda item: item[1])]
    path.write_text("".join([f"{0:016x} D __per_cpu_start\n", *lines, f"{TEXT + moved:016x} d not_text\n"]))
    return path


def test_the_nearest_symbol_below_names_an_address(tmp_path: Path) -> None:
    symbols = load(system_map(tmp_path / "System.map")).moved(0, ())
    assert symbols.named(MAP["copy_page"]) == "copy_page"
    assert symbols.named(MAP["copy_page"] + 0x1F) == "copy_page+0x1f"
    assert symbols.named(TEXT + (64 << 20)) == ""  # far from any
    assert symbols.named(0x401000) == ""  # a program's
    assert symbols.named(TEXT - 1) == ""


@pytest.mark.parametrize("moved", [0, 2 << 20, 0x1A000000, (1 << 30) - (2 << 20)])
def test_kaslr_is_found_where_hlt_exits_leave_one_offset(tmp_path: Path, moved: int) -> None:
    halted = [MAP["default_idle"] + moved + 0xB, MAP["acpi_idle_enter"] + moved + 5, 0x4000]
    symbols = load(system_map(tmp_path / "System.map")).moved(None, halted)
    assert symbols.offset == moved
    assert f"{moved:#x}" in symbols.how
    assert symbols.named(MAP["copy_page"] + moved) == "copy_page"


def test_kaslr_that_is_not_known_names_nothing(tmp_path: Path) -> None:
    given_map = load(system_map(tmp_path / "System.map"))
    for halted in ([], [0x4000], [TEXT + 0x500000]):
        symbols = given_map.moved(None, halted)
        assert symbols.offset is None
        assert symbols.named(MAP["copy_page"]) == ""
        assert "--kaslr-offset" in symbols.how


def test_kallsyms_of_a_moved_kernel_need_no_offset(tmp_path: Path) -> None:
    path = system_map(tmp_path / "kallsyms", moved=0x1A000000)
    path.write_text(path.read_text() + f"{TEXT + 0x1B000000:016x} t kvm_exit\t[kvm]\n")
    symbols = load(path).moved(None, ())
    assert symbols.named(MAP["copy_page"] + 0x1A000000 + 3) == "copy_page+0x3"
    assert symbols.named(TEXT + 0x1B000004) == "kvm_exit [kvm]+0x4"


def elf(path: Path) -> Path:
    source = "".join(f".globl f{n}\n.type f{n}, @function\nf{n}: ret\n" for n in range(5))
    subprocess.run(["as", "--64", "-o", f"{path}.o", "-"], input=f".text\n{source}", text=True, check=True)
    subprocess.run(["ld", "-Ttext", f"{TEXT:#x}", "-e", "f0", "-o", path, f"{path}.o"], check=True)
    return path


def test_an_elf_file_says_what_nm_says(tmp_path: Path) -> None:
    path = elf(tmp_path / "vmlinux")
    symbols = load(path)
    told = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout.split("\n")
    for address, kind, name in (line.split() for line in told if line):
        if kind == "T" and name.startswith("f"):
            assert symbols.moved(0, ()).named(int(address, 16)) == name


@given(st.binary(max_size=200), st.integers(0, 4000), st.integers(0, 4000))
def test_whatever_a_file_holds_it_is_symbols_or_one_line(tmp_path_factory: pytest.TempPathFactory, junk: bytes,
                                                          at: int, cut: int) -> None:  # fmt: skip
    base = tmp_path_factory.getbasetemp() / "elf"
    if not base.exists():
        elf(base)
    data = bytearray(base.read_bytes())
    data[at : at + len(junk)] = junk
    for content in (bytes(data), bytes(data[: len(data) - cut]), junk, b"\x7fELF\x02\x01" + junk):
        path = base.with_suffix(".bad")
        path.write_bytes(content)
        assert refused(path).isprintable()


def refused(path: Path) -> str:
    """Why a file is no symbols; nothing if it is."""
    try:
        assert isinstance(load(path), Symbols)
    except Problem as problem:
        return str(problem)
    return ""


def test_an_elf_header_of_nothing_is_one_line(tmp_path: Path) -> None:
    for content in (b"", b"hello\n", b"\x7fELF", b"\x7fELF\x02\x01" + struct.pack("<60Q", *[1 << 62] * 60)):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(Problem):
            load(tmp_path / "x")


def test_rips_are_named_in_export_and_report(tmp_path: Path) -> None:
    place = {"kvm": 1, "tgid": 100, "tid": 101, "vcpu": 0}
    rows = [event("vm_create", kvm=1, tgid=100, tid=100)]
    for _ in range(3):
        rows += [event("kvm_entry", **place), event("kvm_exit", w0=0x78, w1=MAP["default_idle"] + (2 << 20), **place)]
        rows += [event("kvm_page_fault", w0=0x5000, w2=MAP["copy_page"] + (2 << 20) + 8, **place)]
    path = tmp_path / "a.parquet"
    trace(path, stream(rows), {"host": {"kernel": "6.1.0", "vendor": "AuthenticAMD"}})
    names = system_map(tmp_path / "System.map")
    runner = CliRunner()
    done = runner.invoke(kvmtrace.app, ["export", str(path), "--csv", "rips", "--symbols", str(names)])
    assert done.exit_code == 0, done.exception
    assert "copy_page+0x8" in done.stdout
    assert "KASLR offset 0x200000" in done.stderr
    done = runner.invoke(kvmtrace.app, ["report", str(path), "--no-replay", "--symbols", str(names)])
    assert "copy_page+0x8" in done.stdout
    done = runner.invoke(
        kvmtrace.app,
        ["report", str(path), "--no-replay", "--symbols", str(names), "--kaslr-offset", "0x400000"],
    )
    assert "copy_page+0x8" not in done.stdout
    assert "as given" in " ".join(done.stdout.split())
