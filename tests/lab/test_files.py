# SPDX-License-Identifier: Apache-2.0
"""What a lab boots from: the initramfs, modules, kernel images and the table of kernels."""

from __future__ import annotations

import gzip
import lzma
import stat
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lab.synthetic import TREE, bzimage
from tracer.lab import initramfs, lab_kernels, modules, session
from traces.errors import Problem
from traces.kernels import at
from traces.kernels.policies import POLICIES


def read_newc(archive: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """Name: (mode, data, device) of a newc archive, read by the format's own rules."""
    entries: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        name = archive[at + 110 : at + 110 + fields[11]]
        assert name.endswith(b"\0")
        begin = (at + 110 + fields[11] + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            return entries
        entries[name[:-1].decode()] = (fields[1], archive[begin : begin + fields[6]], (fields[9], fields[10]))
        at = (begin + fields[6] + 3) // 4 * 4


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


# initramfs


@given(st.dictionaries(st.text("abc/.-", min_size=1, max_size=9), st.binary(max_size=40), max_size=6))
def test_archive_reads_back(files: dict[str, bytes]) -> None:
    archive = initramfs.Archive()
    for name, data in files.items():
        archive.add(name, stat.S_IFREG | 0o644, data)
    assert read_newc(archive.contents()) == {name: (stat.S_IFREG | 0o644, data, (0, 0)) for name, data in files.items()}


def test_initramfs_has_init_console_and_modules_with_parameters() -> None:
    contents = read_newc(initramfs.build(TREE, {"kvm": "tdp_mmu=1 mmio_caching=0"}, b"\x7fELFinit"))
    assert contents["init"][:2] == (stat.S_IFREG | 0o755, b"\x7fELFinit")
    assert contents["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
    lines = contents["modules"][1].decode().splitlines()
    assert "/modules.d/kvm.ko tdp_mmu=1 mmio_caching=0" in lines
    assert [line.split()[0] for line in lines] == [f"/{name}" for name in contents if name.startswith("modules.d/")]
    assert contents["modules.d/kvm.ko"][1] == TREE["kvm"]
    assert "modules.d/unused.ko" not in contents


# modules


@pytest.mark.parametrize(
    ("filename", "name"),
    [("kvm-amd.ko", "kvm_amd"), ("9p.ko.xz", "9p"), ("overlay.ko.zst", "overlay"), ("kvm.ko.bak", None), ("x.c", None)],
)
def test_module_name(filename: str, name: str | None) -> None:
    assert modules.module_name(filename) == name


def test_load_order_puts_dependencies_first_and_takes_only_what_is_needed() -> None:
    order = modules.load_order(TREE)
    assert sorted(order) == ["ccp", "irqbypass", "kvm", "kvm_amd", "rng_core"]
    for user, dependency in [("kvm_amd", "kvm"), ("kvm_amd", "ccp"), ("ccp", "rng_core"), ("kvm", "irqbypass")]:
        assert order.index(dependency) < order.index(user)


def test_missing_dependency_is_named() -> None:
    with pytest.raises(Problem, match="kvm needs irqbypass"):
        modules.load_order({"kvm": TREE["kvm"]})


@pytest.mark.parametrize("pack", [bytes, lzma.compress, gzip.compress, zstd])
def test_packed_modules(pack: Callable[[bytes], bytes]) -> None:
    assert modules.decompressed(pack(TREE["kvm"]), "kvm.ko") == TREE["kvm"]


@pytest.mark.parametrize(
    "data", [b"", b"text", lzma.compress(b"text"), lzma.compress(TREE["kvm"])[:-20], b"\x28\xb5\x2f\xfdx"]
)
def test_no_module_is_a_problem(data: bytes) -> None:
    with pytest.raises(Problem, match=r"^bad\.ko: "):
        modules.decompressed(data, "bad.ko")


# The last 24 bytes are fields of the last section header that are not read.
@given(st.integers(0, len(TREE["kvm"]) - 25))
def test_cut_module_is_a_problem(length: int) -> None:
    with pytest.raises(Problem, match=r"^cut\.ko: "):
        modules.modinfo(TREE["kvm"][:length], "cut.ko")


def test_directory_prefers_the_last_root(tmp_path: Path) -> None:
    for root, text in (("a", b"1"), ("b", b"2")):
        (tmp_path / root / "kernel").mkdir(parents=True)
        (tmp_path / root / "kernel" / "kvm.ko").write_bytes(text)
    (tmp_path / "a" / "kvm-amd.ko").write_bytes(b"3")
    tree = modules.Directory(tmp_path / "a", tmp_path / "b")
    assert dict(tree) == {"kvm": b"2", "kvm_amd": b"3"}
    with pytest.raises(Problem, match="no such directory"):
        modules.Directory(tmp_path / "none")


# kernels


def test_the_table_is_complete() -> None:
    policies = {kernel.policy for kernel in lab_kernels.KERNELS.values()}
    assert policies == {"sync", "async", "preserve"} < set(POLICIES)
    for name, kernel in lab_kernels.KERNELS.items():
        if not kernel.variant:
            version = f"{kernel.series}.x" if "." not in kernel.series else kernel.series
            assert at(version).policy == kernel.policy, name
    for name, kernel in lab_kernels.KERNELS.items():
        assert kernel.name == name
        assert bool(kernel.suites) != bool(kernel.variant)
        assert session._by_module(kernel.parameters) is not None
    assert lab_kernels.KERNELS["5.10"].parameters == ("kvm.tdp_mmu=1",)


def test_image_version(tmp_path: Path) -> None:
    image = tmp_path / "bzImage"
    image.write_bytes(bzimage("6.1.0-56-amd64 (builder@host) #1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-11-16)"))
    kernel = lab_kernels.own(image, None)
    assert (kernel.name, kernel.release) == ("6.1.0-56-amd64", "6.1.0-56-amd64")
    assert kernel.package == "linux-image-6.1.0-56-amd64 6.1.192-2"
    image.write_bytes(bzimage("6.9.0-mine (me@here) #3 SMP"))
    assert lab_kernels.own(image, None).package == ""


@pytest.mark.parametrize("contents", [b"", b"#!/bin/sh\n", bytes(0x300)])
def test_no_kernel_image(tmp_path: Path, contents: bytes) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(contents)
    with pytest.raises(Problem, match="not an x86 kernel image"):
        lab_kernels.own(image, None)
