# SPDX-License-Identifier: Apache-2.0
"""Compiled probes kept between recordings, so that only the first one on a kernel needs bcc, clang and headers.

A file's name comes from what its probes were compiled from (the C text, which contains this kernel's offsets, and the
kernel's BTF) and from the version of bcc. The kernel runs the instructions as root: a file is read only if nobody but
root or this user could have written it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import sys
import tempfile
from pathlib import Path
from typing import Final

from tracer.probing import compiled
from tracer.probing.btf import kernel_btf
from tracer.probing.compiled import Compiled, bcc_version, compile_text
from traces.errors import ENVIRONMENT, Problem

VARIABLE: Final = "KVMTRACE_PROBES"
DIRECTORY: Final = Path("/var/cache/kvmtrace/probes")
BUILD: Final = "kvmtrace probes build"
SUFFIX: Final = ".probes"
MOST_FILES: Final = 64  # files, of half a megabyte each; the oldest are removed
_MOST_BYTES: Final = 16 << 20
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def directory() -> Path:
    """Return the directory of kept probes: $KVMTRACE_PROBES, else the system's cache."""
    return Path(os.environ.get(VARIABLE) or DIRECTORY)


def key(text: str) -> str:
    """Return the name of the files for this C text on this kernel, without bcc's version."""
    return hashlib.sha256(f"{kernel_btf().digest()}\n{text}".encode()).hexdigest()[:32]


def get(text: str) -> Compiled:
    """Return the probes of a C text: kept ones, or else compiled now and kept. Raises Problem as compiling does."""
    found = find(text)
    if isinstance(found, Compiled):
        return found
    if found:
        print(f"kvmtrace: kept probes are not used: {found}", file=sys.stderr)
    if not bcc_version():
        raise Problem(
            f"no probes for this kernel are kept in {directory()}, and bcc, which compiles them, is not installed: "
            f"{compiled.INSTALL_BCC}, or bring what `{BUILD}` makes elsewhere",
            ENVIRONMENT,
        )
    made = compile_text(text)
    try:
        keep(text, made)
    except Problem as problem:
        print(f"kvmtrace: the compiled probes are not kept: {problem}", file=sys.stderr)
    return made


def find(text: str) -> Compiled | str:
    """Return the kept probes of a C text, or why those that exist are not used; empty where none exist.

    They must be made by the bcc that is installed; where none is installed, any will do.
    """
    base, version = key(text), bcc_version()
    wanted, named = [file_name(base, version)] if version else [], re.compile(rf"{base}-[\w.+~-]+{re.escape(SUFFIX)}")
    try:
        names = wanted or sorted(path.name for path in directory().iterdir() if named.fullmatch(path.name))
        return compiled.read(_trusted(directory() / names[-1])) if names else ""
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{error.filename or directory()}: {error.strerror}"
    except ValueError as error:
        return f"{directory() / names[-1]}: {error}"


def file_name(base: str, version: str) -> str:
    """Return the name of a file of probes: `base` from `key`, and bcc's version."""
    return f"{base}-{version}{SUFFIX}"


def _trusted(path: Path) -> bytes:
    """Return a file's contents. Raises ValueError where others could have written it, OSError as reading does."""
    place = _trusted_directory(path.parent)
    with os.fdopen(
        os.open(place / path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb"
    ) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("not a regular file")
        if _foreign(facts):
            raise ValueError("others own it or can write it: it must be root's, mode 644 or less")
        if facts.st_size > _MOST_BYTES:
            raise ValueError("too large")
        return file.read(_MOST_BYTES)


def _trusted_directory(path: Path) -> Path:
    """Return a directory, links resolved. Raises ValueError where others could put another file there."""
    place = path.resolve(strict=True)
    for each in (place, *place.parents):
        facts = each.stat()
        # In a sticky directory, such as /tmp, nobody can move away what is ours.
        if _foreign(facts) and not (each != place and facts.st_uid == 0 and facts.st_mode & stat.S_ISVTX):
            raise ValueError(f"others own {each} or can write in it")
    return place


def _foreign(facts: os.stat_result) -> bool:
    return facts.st_uid not in (0, os.geteuid()) or bool(facts.st_mode & _OTHERS_WRITE)


def keep(text: str, made: Compiled) -> Path:
    """Keep compiled probes for this kernel and return the file. Raises Problem where it cannot be written."""
    path = write(directory(), file_name(key(text), bcc_version()), made.document())
    try:
        place = _trusted_directory(path.parent)
    except ValueError as error:
        raise Problem(str(error), ENVIRONMENT) from None
    with contextlib.suppress(OSError):
        for old in sorted(place.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime)[:-MOST_FILES]:
            old.unlink()
    return path


def write(into: Path, name: str, document: bytes) -> Path:
    """Write a file of probes into a directory, atomically, and return it. Raises Problem where that is impossible."""
    try:
        into.mkdir(0o755, parents=True, exist_ok=True)
        fd, made = tempfile.mkstemp(prefix=".", dir=into)
        try:
            with os.fdopen(fd, "wb") as file:
                os.fchmod(fd, 0o644)
                file.write(document)
            Path(made).replace(into / name)
        except BaseException:
            Path(made).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise Problem(f"{error.filename or into}: {error.strerror}", ENVIRONMENT) from None
    return into / name
