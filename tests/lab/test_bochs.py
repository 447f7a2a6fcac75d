# SPDX-License-Identifier: Apache-2.0
"""The Intel machine: what Bochs is given, what comes back, and a real kernel's EPT recorded in it."""

from __future__ import annotations

import gzip
import lzma
import os
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tracer import vmm
from tracer.lab import bochs, bzimage, closure, lab_kernels, prebuilt
from tracer.lab.bochs import BochsMachine, Emulator
from tracer.lab.cli import app
from tracer.lab.lab_cpus import CPUS
from tracer.lab.modules import Directory
from tracer.lab.qemu import Ending
from traces.errors import Problem
from traces.reader import Trace

SEGMENTS = ((0x1000000, b"text" * 300, 1200), (0x1002000, b"data" * 10, 5000))  # address, contents, size in memory
FAST = Emulator("bochs", "3.0", has_debugger=False, fills_memory=True)
DEBIANS = Emulator("bochs-bin", "2.7", has_debugger=True, fills_memory=False)


def elf() -> bytes:
    headers, contents = b"", b""
    for address, data, size in SEGMENTS:
        offset = 64 + 56 * len(SEGMENTS) + len(contents)
        headers += struct.pack("<IIQQQQQQ", 1, 5, offset, 0xFFFFFFFF80000000 + address, address, len(data), size, 4096)
        contents += data
    start = b"\x7fELF" + bytes(20) + struct.pack("<QQ", 0xFFFFFFFF81000100, 64) + bytes(16)
    return start + struct.pack("<H", len(SEGMENTS)) + bytes(6) + headers + contents


def bzimage_of(payload: bytes) -> bytes:
    image = bytearray(1024)  # the boot sector and one of setup
    image[0x1F1], image[0x201] = 1, 0x6A
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 0, len(payload))
    return bytes(image) + payload


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes() + len(data).to_bytes(4, "little")


def xz(data: bytes) -> bytes:
    return lzma.compress(data) + len(data).to_bytes(4, "little")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage_of(lzma.compress(elf())))
    return path


@pytest.mark.parametrize("pack", [xz, zstd, gzip.compress])
def test_a_kernel_is_unpacked(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage_of(pack(elf())))
    kernel = bzimage.unpack(path)
    assert (kernel.base, kernel.entry, kernel.end) == (0x1000000, 0x1000100, 0x1002000 + 5000)
    for address, data, _ in SEGMENTS:
        assert kernel.image[address - kernel.base :].startswith(data)
    assert kernel.header[0x202 - 0x1F1 :].startswith(b"HdrS")
    assert len(kernel.header) == 0x202 + 0x6A - 0x1F1


@given(st.integers(0, 2000))
def test_a_cut_kernel_is_a_problem(length: int) -> None:
    whole = bzimage_of(lzma.compress(elf()))
    path = Path(os.devnull)

    class Cut:
        def read_bytes(self) -> bytes:
            return whole[: min(length, len(whole) - 40)]

        def __str__(self) -> str:
            return str(path)

    with pytest.raises(Problem):
        bzimage.unpack(Cut())  # type: ignore[arg-type]


def pieces(disk: bytes) -> list[tuple[int, bytes]]:
    """(address, contents) of what the boot sector's table says, then (entry, b"")."""
    found = []
    for place in range(0x1C0, 0x1FE, 12):
        lba, sectors, address = struct.unpack_from("<III", disk, place)
        found.append((address, disk[lba * 512 : (lba + sectors) * 512]))
        if not sectors:
            return found
    raise AssertionError("the table does not end")


@pytest.mark.parametrize("emulator", [FAST, DEBIANS], ids=["fast", "debian"])
def test_what_the_machine_boots_from(tmp_path: Path, image: Path, emulator: Emulator) -> None:
    initrd = b"initramfs" * 100
    machine = BochsMachine(image, initrd, 512, CPUS["intel"].model, ("kvm.tdp_mmu=0",))
    argv = machine.prepare(tmp_path, emulator)
    assert argv[:4] == [emulator.program, "-q", "-f", str(tmp_path / "bochsrc")]
    assert ("-rc" in argv) is emulator.has_debugger
    disk, text = (tmp_path / "disk").read_bytes(), (tmp_path / "bochsrc").read_text()
    assert disk[510:512] == b"\x55\xaa"
    *given_pieces, (entry, nothing) = pieces(disk)
    assert (entry, nothing) == (0x1000100, b"")
    parameters = dict(given_pieces)[0x10000]
    at, size, line = (*struct.unpack_from("<II", parameters, 0x218), struct.unpack_from("<I", parameters, 0x228)[0])
    assert size == len(initrd)
    assert dict(given_pieces)[line].rstrip(b"\0").endswith(b" clearcpuid=158,306 kvm.tdp_mmu=0")
    if emulator.fills_memory:
        assert len(given_pieces) == 2
        assert f"optramimage1: file={tmp_path}/memory1, address=0x1000000" in text
        assert f"optramimage2: file={tmp_path}/memory2, address={at:#x}" in text
        assert (tmp_path / "memory2").read_bytes() == initrd
    else:
        assert "optramimage" not in text
        assert dict(given_pieces)[at].startswith(initrd)
        assert dict(given_pieces)[0x1000000].startswith(SEGMENTS[0][1])
    assert "model=corei7_haswell_4770, count=1" in text
    assert "time0=1767225600" in text, "two runs see the same dates"


def test_too_little_memory_is_said(tmp_path: Path, image: Path) -> None:
    with pytest.raises(Problem, match="--memory 256: the guest's files alone take 300 MiB"):
        BochsMachine(image, bytes(300 << 20), 256, CPUS["intel"].model).prepare(tmp_path, FAST)


def sent(files: dict[str, bytes], code: int = 0) -> bytes:
    return (
        b"noise\n"
        + b"".join(b"\x01FILE %s %d\n%s" % (name.encode(), len(data), data) for name, data in files.items())
        + (b"\x01END %d\n" % code)
    )


@given(st.dictionaries(st.text("ab", min_size=1, max_size=3), st.binary(max_size=50), max_size=3))
def test_what_a_guest_sends_arrives(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    """Whatever is in a file, also what looks like the next one's head."""
    share = tmp_path_factory.mktemp("share")
    files = {name: data + b"\x01FILE x 9\n" for name, data in files.items()}
    assert bochs.receive(sent(files), share) is Ending.ORDERLY
    assert {path.name: path.read_bytes() for path in share.iterdir()} == files


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out"])
def test_nothing_is_written_outside_of_the_share(tmp_path: Path, name: str) -> None:
    share = tmp_path / "share"
    share.mkdir()
    assert bochs.receive(sent({name: b"x"}), share) is None
    assert [path.name for path in tmp_path.rglob("*")] == ["share"]


def test_endings(tmp_path: Path) -> None:
    assert bochs.receive(sent({}, 1), tmp_path) is Ending.MODULE_REFUSED
    assert bochs.receive(sent({}, 9), tmp_path) is None
    assert bochs.receive(b"\x01FILE stdout 100\nshort", tmp_path) is None
    assert bochs.receive(b"", tmp_path) is None


@pytest.mark.parametrize(("script", "said"), [
    ("kill -KILL $$", "killed by SIGKILL before its guest had ended: nothing in its log"),
    ("echo 'PANIC: no such disk' > log; exit 1", "status 1 before its guest had ended: PANIC: no such disk"),
])  # fmt: skip
def test_an_emulator_that_ends_early_is_told_of(tmp_path: Path, script: str, said: str) -> None:
    (tmp_path / "console").write_text("kvmtrace-lab: ready\n")
    ending = bochs.run(["sh", "-c", f"cd {tmp_path}; {script}"], tmp_path, tmp_path, 60)
    assert ending is Ending.EMULATOR_FAILED
    assert (tmp_path / "console").read_text().splitlines()[-1] == said


def test_the_emulator_is_known_by_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bochs"
    program.write_text("#!/bin/sh\necho 'Bochs x86 Emulator 3.0'; echo ' -benchmark N'; echo \" $EXTRA\"\n")
    program.chmod(0o755)
    monkeypatch.setenv(bochs.VARIABLE, str(program))
    monkeypatch.setattr(bochs, "BIOS", (program,))
    assert bochs.emulator() == Emulator(str(program), "3.0", has_debugger=False, fills_memory=True)
    monkeypatch.setenv("EXTRA", "-rc filename")
    assert bochs.emulator().has_debugger
    monkeypatch.setattr(bochs, "BIOS", (tmp_path / "none",))
    with pytest.raises(Problem, match=r"no .*/none: apt-get install bochs") as caught:
        bochs.emulator()
    assert caught.value.code == 3
    monkeypatch.setenv(bochs.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(Problem, match=r"KVMTRACE_BOCHS: .*/none: No such file"):
        bochs.emulator()


def test_files_come_with_their_links_and_directories(tmp_path: Path) -> None:
    (tmp_path / "real/lib").mkdir(parents=True)
    (tmp_path / "real/lib/thing.py").write_text("answer = 42\n")
    (tmp_path / "real/lib/libx.so.1.2").write_bytes(b"library")
    (tmp_path / "real/lib/libx.so.1").symlink_to("libx.so.1.2")
    (tmp_path / "short").symlink_to("real/lib")
    (tmp_path / "up").symlink_to("../" + tmp_path.name + "/short")
    found = closure.gather([tmp_path / "up/thing.py", tmp_path / "real/lib/libx.so.1.2", tmp_path / "none"])
    assert found[str(tmp_path / "up")] == (stat.S_IFLNK | 0o777, f"../{tmp_path.name}/short".encode())
    assert found[str(tmp_path / "short")] == (stat.S_IFLNK | 0o777, b"real/lib")
    assert found[str(tmp_path / "real/lib/thing.py")] == (stat.S_IFREG | 0o444, b"answer = 42\n")
    assert found[str(tmp_path / "real/lib/libx.so.1")] == (stat.S_IFLNK | 0o777, b"libx.so.1.2")
    assert str(tmp_path / "none") not in found
    assert all(str(Path(path).parent) in found for path in found if path.count("/") > 1)
    (code,) = [data for path, (_, data) in found.items() if path.endswith(".pyc") and "thing" in path]
    assert code[4:16] == b"\1" + bytes(11), "not compared with its source's date"


@pytest.mark.slow
def test_a_recording_needs_these_files() -> None:
    paths = [str(path) for path in closure.of_recorder()]
    assert sys.executable in paths
    for name in ("libbpf.so", "tracer/recorder.py", "tracer/ebpf/state.c"):
        assert any(name in path for path in paths), name
    assert any("/lz4/" in path or "libarrow.so" in path for path in paths), "what compresses segments"
    # The version: where it is installed, or next to the sources where it was built from them.
    assert any(path.endswith(("/METADATA", "/PKG-INFO")) for path in paths)
    assert not any("libclang" in path or "libLLVM" in path for path in paths), "the guest compiles nothing"


def test_every_cpu_says_what_it_needs() -> None:
    assert [cpu for cpu in CPUS if CPUS[cpu].runs({"kvm", "kvm_amd"})] == ["amd", "amd-icount"]
    assert [cpu for cpu in CPUS if CPUS[cpu].runs({"kvm", "kvm_intel"})] == ["intel", "intel-pml"]
    assert all(cpu.runs(()) for cpu in CPUS.values()), "KVM may be built in"


@pytest.mark.lab
@pytest.mark.parametrize("lab_kernel", ["6.12"], indirect=True)
def test_ept_is_recorded_and_validates(lab_kernel: lab_kernels.Bootable, tmp_path: Path) -> None:
    """One boot under whichever Bochs there is: the distribution's in CI."""
    if "kvm_intel" not in Directory(*lab_kernel.modules):
        lab_kernel = _with_intel(lab_kernel)
    out = tmp_path / "steady.parquet"
    arguments = ["run", "--cpu", "intel", "--kernel", "6.12", "--scenario", "steady", "--loops", "2", "--pages", "32"]
    result = CliRunner().invoke(app, [*arguments, "-o", str(out), "--timeout", "3000"])
    assert result.exit_code == 0, (result.exception, result.output)
    metadata = Trace.open(out).metadata
    assert metadata.raw["host"]["vendor"] == "GenuineIntel"
    assert metadata.raw["modules"]["kvm_intel"]["ept"] == "Y"
    assert metadata.raw["lab"]["emulator"].startswith("Bochs ")
    assert metadata.lost == 0
    assert metadata.kinds["kvm_page_fault"] == 33, "as many as on AMD: each page once, and the guest's own"
    assert prebuilt.have(lab_kernel) is not None
    assert vmm.binary().is_file()


def _with_intel(kernel: lab_kernels.Bootable) -> lab_kernels.Bootable:
    """The kernel fetched anew: the cache is from before kvm-intel.ko was kept."""
    from tracer.lab import fetch

    return fetch.fetch(kernel.name, update=True)
