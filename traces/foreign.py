# SPDX-License-Identifier: Apache-2.0
"""What a file is that is not a trace, by its first bytes, and which command takes it or what else to do with it."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Final

from traces import outputs
from traces.encoding import PARQUET_MAGIC
from traces.errors import Problem

_HEAD: Final = 1 << 16  # bytes looked at
_RECORD: Final = "`kvmtrace record` makes traces"
_IMPORT: Final = "`kvmtrace import` makes a trace of it"
_AS_IT_IS: Final = "of a text `kvmtrace import` takes it as it is"
_OURS: Final = "give the recording, or the result, that it was made of"

# A line of ftrace: task-pid, [cpu], perhaps flags, time, event; in mails behind a `>`. perf puts blanks and the system.
_TASK: Final = rb"^[> ]{0,8}[ \t]{0,30}\S.{0,40}?"
_FTRACE: Final = (
    _TASK + rb"-\d{1,9}[ \t]{1,9}(\([\d -]{1,9}\)[ \t]{1,9})?\[\d{2,4}\][ \t]{1,9}(\S{4,6}[ \t]{1,9})?\d+\.\d+: "
)
_PERF: Final = _TASK + rb"[ \t]\d{1,9}(/\d{1,9})?[ \t]{1,9}\[\d{2,4}\][ \t]{1,9}\d+\.\d+: .{0,40}?\w+:\w+:"

# In this order: (pattern in the first bytes, what it is, what to do).
_KNOWN: Final = [
    (re.compile(pattern, flags), what, advice)
    for pattern, flags, what, advice in (
        (rb"\A\x17\x08Dtracing6\0", 0, "trace-cmd's trace.dat, version 6", _IMPORT),
        (rb"\A\x17\x08Dtracing7\0", 0, "trace-cmd's trace.dat, version 7", _IMPORT),
        (rb"\A\x17\x08Dtracing", 0, "trace-cmd's trace.dat", _IMPORT),
        (rb"\A(?:PERFILE2|2ELIFREP|PERFFILE)", 0, "perf's perf.data", _IMPORT),
        (rb"\A\x1f\x8b", 0, "compressed by gzip", f"unpack it with gunzip; {_AS_IT_IS}"),
        (rb"\A\xfd7zXZ\0", 0, "compressed by xz", f"unpack it with unxz; {_AS_IT_IS}"),
        (rb"\A\x28\xb5\x2f\xfd", 0, "compressed by zstd", f"unpack it with unzstd; {_AS_IT_IS}"),
        (rb"\ABZh[1-9]", 0, "compressed by bzip2", f"unpack it with bunzip2; {_AS_IT_IS}"),
        (rb"\A\x04\x22\x4d\x18", 0, "compressed by lz4", "unpack it with unlz4"),
        (rb"\APK\x03\x04", 0, "a zip archive", "unpack it with unzip"),
        (rb"\A.{257}ustar", re.S, "a tar archive", "unpack it with tar -x"),
        (rb"\A\x7fELF", 0, "an ELF file, such as a program or a core dump", _RECORD),
        (rb"\AARROW1|\A\xff\xff\xff\xff.{4}\x10\0\0\0", re.S, "an Arrow file", _RECORD),
        *((kind.mark.pattern, kind.mark.flags, kind.name, _OURS) for kind in outputs.MARKED if kind.mark),
        (rb"^# tracer: \w+", re.M, "the text of ftrace's trace or trace_pipe", _IMPORT),
        (rb"\A(version = \d+\n)?(CPU \d+ is empty\n)*cpus=\d+$", re.M, "the text of trace-cmd report", _IMPORT),
        (_FTRACE, re.M, "the text of ftrace's trace_pipe or of trace-cmd report", _IMPORT),
        (_PERF, re.M, "the text of perf script", _IMPORT),
        (rb"^ {0,12}\d+\.\d{3} \(.{0,16}\): .{1,40}/\d{1,9} \w+:\w+\(", re.M, "the text of perf trace", _IMPORT),
        (rb"\A(?:\xef\xbb\xbf)?\s{0,99}[\[{]", 0, "JSON", _RECORD),
        (rb"\A(?:\xef\xbb\xbf)?\s{0,99}<", 0, "HTML or XML", _RECORD),
    )
]  # fmt: skip


def check_whole_parquet(path: Path, wanted: str) -> None:
    """Raise Problem unless `path` is a file that begins and ends as Parquet does.

    `wanted` is what the message says that it is not, such as "not a kvmtrace trace".
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise Problem(f"{path}: {wanted}, but {_directory(path)}")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise Problem(f"{path}: {wanted} (not a file)")
        with path.open("rb") as file:
            head = file.read(_HEAD)
            file.seek(max(status.st_size - len(PARQUET_MAGIC), 0))
            tail = file.read(len(PARQUET_MAGIC))
    except FileNotFoundError as error:
        left = path.with_suffix(".kvmt")
        hint = f": `kvmtrace recover {left}` makes it of what a recorder left" if left.is_dir() else ""
        raise Problem(f"{path}: {error.strerror}{hint}") from None
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}") from None
    if not head.startswith(PARQUET_MAGIC):
        raise Problem(f"{path}: {wanted}, but {_named(path, head)}")
    if tail != PARQUET_MAGIC or status.st_size < 3 * len(PARQUET_MAGIC):
        raise Problem(f"{path}: damaged: the end of the Parquet file is missing: was it copied whole?")


def of_parquet(path: Path) -> str:
    """Return what a whole Parquet file is that does not have the seal of a trace."""
    if outputs.kind_of_parquet(path) == outputs.RESULT:
        return "the result of a replay: `kvmtrace report`, `diff` and `export` take it"
    return f"a Parquet file that kvmtrace did not write: {_RECORD}"


def of_no_directory(path: Path) -> str:
    """Return what a path is that was taken for a directory in which a recorder left a recording."""
    if not path.is_file():
        return "not even a file"
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(PARQUET_MAGIC):
        return f"a whole file: `kvmtrace info {path}` takes it as it is"
    return _named(path, head)


def named(path: Path, head: bytes) -> str:
    """Return what a file is by its first bytes, and what to do with it."""
    return _named(path, head)


def _directory(path: Path) -> str:
    if _left_by_recorder(path):
        return f"what a recorder left: `kvmtrace recover {path}` makes a trace of it"
    return "a directory: give a file"


def _left_by_recorder(directory: Path) -> bool:
    return (directory / "manifest.json").exists() or any(directory.glob("seg-*.arrows"))


def _named(path: Path, head: bytes) -> str:
    if not head:
        return "an empty file"
    if path.resolve().parent.suffix == ".kvmt" and _left_by_recorder(path.resolve().parent):
        return f"a part of what a recorder left: `kvmtrace recover {path.resolve().parent}` makes a trace of it"
    for pattern, what, advice in _KNOWN:
        if pattern.search(head):
            return f"{what}: {advice}"
    return f"{'text' if _is_text(head) else 'a file'} of no kind that is known here: {_RECORD}"


def _is_text(head: bytes) -> bool:
    try:
        return "\0" not in head.decode(errors="strict" if len(head) < _HEAD else "replace")
    except UnicodeDecodeError:
        return False
