# SPDX-License-Identifier: Apache-2.0
"""A file that is no trace is named for what it is, with what takes it: one line, exit code 2, in every verb."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.thinned import thinned
from tests.traces.making import numbered, write
from tests.verbs import TALKERS, WRITERS, Files, Verb, invoke, kvmtrace
from tests.waiting import PATIENCE
from traces.errors import BAD_INPUT, Problem
from traces.reader import Trace
from traces.recording.segment_writer import MANIFEST, segment_name

TRACE_PIPE = """\
           CPU 0/KVM-4711    [003] d..1.  1234.567890: kvm_exit: vcpu 0 reason EPT_VIOLATION rip 0xfff0 info1 0x184
           CPU 0/KVM-4711    [003] .....  1234.567900: kvm_page_fault: vcpu 0 rip 0xfff0 address 0xfee00000
"""
TEXTS = {
    "trace": ("# tracer: nop\n#\n# entries-in-buffer/entries-written: 2/2   #P:8\n" + TRACE_PIPE, "ftrace"),
    "trace_pipe": (TRACE_PIPE, "ftrace"),
    "2.6.3x": ("     qemu-kvm-2133  [001]  5051.271840: kvm_entry: vcpu 0\n", "ftrace"),
    "with tgid": ("  CPU 0/KVM-4711  (   4700) [003] d..1. 12.567890: kvm_entry: vcpu 0, rip 0x0\n", "ftrace"),
    "quoted": ("".join(f"> {line}\n" for line in TRACE_PIPE.splitlines()), "ftrace"),
    "trace-cmd report": ("cpus=8\n" + TRACE_PIPE.replace(" d..1.", "").replace(" .....", ""), "trace-cmd report"),
    "with a version": ("version = 7\nCPU 3 is empty\ncpus=4\n" + TRACE_PIPE, "trace-cmd report"),
    "perf script": (
        "       CPU 0/KVM  4711 [003]  1234.567890:                 kvm:kvm_exit: reason EPT_VIOLATION rip 0xfff0\n",
        "perf script",
    ),
    "perf script with tids": (" qemu 4700/4711 [003]  1234.567890: 1 kvm:kvm_entry: vcpu 0, rip 0x0\n", "perf script"),
    "perf trace": ("     0.000 (         ): CPU 0/KVM/4711 kvm:kvm_entry(rip: 0)\n", "perf trace"),
    "json": ('{"a": 1}', "JSON"),
    "text": ("A mail about a hang.\n", "text of no kind"),
    "html": ("<!doctype html><title>x</title>", "HTML"),
    "empty": ("", "an empty file"),
}


def _gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"x"))


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        file.add(__file__)


def _zstd(path: Path) -> None:
    path.write_bytes(bytes(pa.compress(b"x" * 100, "zstd", asbytes=True)))


def _lz4(path: Path) -> None:
    with pa.CompressedOutputStream(str(path), "lz4") as out:
        out.write(b"x")


def _parquet(path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), path)


def _feather(path: Path) -> None:
    with pa.ipc.new_file(str(path), pa.schema([("a", pa.int8())])):
        pass


def _stream(path: Path) -> None:
    with pa.ipc.new_stream(str(path), pa.schema([("a", pa.int8())])):
        pass


BINARIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "trace.dat 6": (lambda path: path.write_bytes(b"\x17\x08Dtracing6\0\0\x08"), "trace.dat, version 6"),
    "trace.dat 7": (lambda path: path.write_bytes(b"\x17\x08Dtracing7\0\0\x08"), "trace.dat, version 7"),
    "perf.data": (lambda path: path.write_bytes(b"PERFILE2" + bytes(96)), "perf.data"),
    "of a big-endian machine": (lambda path: path.write_bytes(b"2ELIFREP" + bytes(96)), "perf.data"),
    "gzip": (_gzip, "gunzip"),
    "xz": (lambda path: path.write_bytes(lzma.compress(b"x")), "unxz"),
    "bzip2": (lambda path: path.write_bytes(bz2.compress(b"x")), "bunzip2"),
    "zstd": (_zstd, "unzstd"),
    "lz4": (_lz4, "unlz4"),
    "tar": (_tar, "tar -x"),
    "elf": (lambda path: shutil.copy("/bin/sh", path), "ELF"),
    "parquet": (_parquet, "a Parquet file that kvmtrace did not write"),
    "feather": (_feather, "an Arrow file"),
    "arrow stream": (_stream, "an Arrow file"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 20), "a file of no kind"),
    "directory": (Path.mkdir, "a directory"),
    "pipe": (os.mkfifo, "not a file"),
}


@pytest.mark.parametrize("name", [*TEXTS, *BINARIES])
def test_what_is_no_trace_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if name in TEXTS:
        path.write_text(TEXTS[name][0])
        expected = TEXTS[name][1]
    else:
        BINARIES[name][0](path)
        expected = BINARIES[name][1]
    with pytest.raises(Problem, match=r"^[^\n]*$") as caught:
        Trace.open(path)
    assert caught.value.code == BAD_INPUT
    assert str(caught.value).startswith(f"{path}: not a kvmtrace trace")
    assert expected in str(caught.value)


@pytest.mark.slow
def test_what_perf_writes_here_is_known(tmp_path: Path) -> None:
    if not shutil.which("perf"):
        pytest.skip("no perf here")
    file = tmp_path / "perf.data"
    record = ["perf", "record", "-o", str(file), "-e", "dummy", "true"]
    if subprocess.run(record, capture_output=True, check=False).returncode or not file.exists():
        pytest.skip("perf records nothing here")
    with pytest.raises(Problem, match=r"perf's perf\.data"):
        Trace.open(file)


def test_a_trace_that_was_cut_is_a_trace_that_was_cut(files: Files, tmp_path: Path) -> None:
    whole = files.trace.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.parquet").write_bytes(whole[:size])
        with pytest.raises(Problem, match=r"cut\.parquet: damaged: the end of the Parquet file is missing"):
            Trace.open(tmp_path / "cut.parquet")


def test_what_a_recorder_left_is_for_recover(tmp_path: Path) -> None:
    left = write(tmp_path / "stall.kvmt", numbered(20))
    for given in (left, left / MANIFEST, left / segment_name(0), tmp_path / "stall.parquet"):
        with pytest.raises(Problem, match=rf"`kvmtrace recover {left}`"):
            Trace.open(given)


def test_recover_names_what_it_is_given(files: Files, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TRACE_PIPE)
    os.mkfifo(tmp_path / "pipe")
    given = {
        files.trace: rf"`kvmtrace info {files.trace}` takes it",
        tmp_path / "text": "ftrace",
        tmp_path / "pipe": "not even a file",
        tmp_path: "no recording in here",
    }
    for path, expected in given.items():
        with pytest.raises(Problem, match=expected):
            invoke(["recover", str(path), "-o", str(tmp_path / "out")])


READERS = [verb for verb in (*WRITERS, *TALKERS) if verb.input in ("trace", "result")]


@pytest.mark.parametrize(
    "verb", thinned(4, READERS), ids=lambda verb: f"{verb.name}-{'file' if verb.kind else 'stdout'}"
)
def test_every_verb_that_reads_names_it(verb: Verb, files: Files, tmp_path: Path) -> None:
    (tmp_path / "trace.dat").write_bytes(b"\x17\x08Dtracing6\0\0\x08" + bytes(100))
    given = replace(files, trace=tmp_path / "trace.dat", result=tmp_path / "trace.dat")
    with pytest.raises(Problem, match=r"^[^\n]*trace\.dat: [^\n]*trace-cmd's trace\.dat[^\n]*$") as caught:
        invoke(verb.words(given, tmp_path / "out"))
    assert caught.value.code == BAD_INPUT
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["info", "validate", "replay"])
def test_a_result_is_for_other_verbs(verb: str, files: Files) -> None:
    with pytest.raises(Problem, match="the result of a replay: `kvmtrace report`, `diff` and `export` take it"):
        invoke([verb, str(files.result)])


@pytest.mark.slow
def test_the_process_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_text(TRACE_PIPE)
    done = kvmtrace(["report", str(tmp_path / "x")])
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (BAD_INPUT, b"", 1)
    os.mkfifo(tmp_path / "pipe")
    for words in (
        ["report", str(tmp_path / "x"), "--fail-on", "faults > baseline", "--baseline", str(tmp_path / "pipe")],
        ["explore", "--replay", str(tmp_path / "pipe")],
    ):
        done = kvmtrace(words, timeout=PATIENCE)
        assert (done.returncode, done.stderr.count(b"\n")) == (BAD_INPUT, 1), done.stderr
