# SPDX-License-Identifier: Apache-2.0
"""Files of this machine for a guest that cannot see its file system, each with the links and directories above it."""

from __future__ import annotations

import importlib.util
import marshal
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Final

from traces.errors import ENVIRONMENT, Problem

Entries = dict[str, tuple[int, bytes]]  # by absolute path: mode with the file's type; contents, or where a link leads

# What the dynamic loader reads before any code of ours runs.
_LOADER: Final = (
    "/lib",
    "/lib64",
    "/lib64/ld-linux-x86-64.so.2",
    "/etc/ld.so.cache",
    "/usr/lib/locale/C.utf8/LC_CTYPE",
)
_UNCHECKED: Final = (1).to_bytes(4, "little") + bytes(8)  # a .pyc that is not to be compared with its source


def of_recorder() -> list[Path]:
    """Return every file that recording reads in this interpreter's environment. Raises Problem where unknown."""
    command = [sys.executable, "-m", "tracer.lab.exercise"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise Problem(f"which files recording reads cannot be found out: {said}", ENVIRONMENT)
    return [Path(line) for line in done.stdout.splitlines()]


def of_program(program: Path) -> list[Path]:
    """Return a program and the shared libraries that it is linked with."""
    done = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False)
    return [program, *map(Path, re.findall(r"(/\S+) \(0x", done.stdout))]


def gather(paths: Iterable[Path]) -> Entries:
    """Return these files with all that leads to them, what the loader needs, and Python's modules compiled."""
    entries: Entries = {}
    for path in (*paths, *map(Path, _LOADER)):
        _collect(entries, str(path))
        if ".so" in path.name:
            for link in _links(path.parent).get(path.resolve(), ()):
                _collect(entries, link)
    for name in [name for name in entries if name.endswith(".py")]:
        cached = importlib.util.cache_from_source(name)
        entries[str(Path(cached).parent)] = (stat.S_IFDIR | 0o755, b"")
        entries[cached] = (stat.S_IFREG | 0o644, _code(name, entries[name][1], Path(cached)))
    return entries


@lru_cache
def _links(directory: Path) -> dict[Path, list[str]]:
    """Return the links in a directory by target: programs ask for libelf.so.1, and map libelf-0.188.so."""
    found: dict[Path, list[str]] = {}
    for link in directory.iterdir():
        if link.is_symlink():
            found.setdefault(link.resolve(), []).append(str(link))
    return found


def _collect(entries: Entries, path: str) -> None:
    """Add a file or a directory without its contents, and every link on the way; add no more where one is missing."""
    place, pending = Path("/"), path.split("/")
    while pending:
        part = pending.pop(0)
        if part in ("", "."):
            continue
        each = place.parent if part == ".." else place / part
        try:
            facts = each.lstat()
            if stat.S_ISLNK(facts.st_mode):
                target = str(each.readlink())
                entries[str(each)] = (stat.S_IFLNK | 0o777, os.fsencode(target))
                pending = target.split("/") + pending
                place = Path("/") if target.startswith("/") else place
            elif stat.S_ISDIR(facts.st_mode):
                if each.name:
                    entries[str(each)] = (stat.S_IFDIR | 0o755, b"")
                place = each
            elif stat.S_ISREG(facts.st_mode) and str(each) not in entries:
                entries[str(each)] = (stat.S_IFREG | 0o444 | facts.st_mode & 0o111, each.read_bytes())
        except OSError:
            return


def _code(name: str, source: bytes, cached: Path) -> bytes:
    """Return a module's .pyc that is valid whatever its source's date: in an initramfs all dates may be zero."""
    try:
        made = cached.read_bytes()
        if made[:4] == importlib.util.MAGIC_NUMBER and cached.stat().st_mtime >= Path(name).stat().st_mtime:
            return made[:4] + _UNCHECKED + made[16:]
    except OSError:
        pass
    code = compile(source, name, "exec", dont_inherit=True)
    return importlib.util.MAGIC_NUMBER + _UNCHECKED + marshal.dumps(code)


def beside(directory: str, files: Iterable[Path]) -> Entries:
    """Return these files placed in one directory of the guest, with the directories above it."""
    entries: Entries = {str(above): (stat.S_IFDIR | 0o755, b"") for above in Path(directory, "x").parents if above.name}
    for file in files:
        entries[f"{directory}/{file.name}"] = (stat.S_IFREG | 0o644, file.read_bytes())
    return entries
