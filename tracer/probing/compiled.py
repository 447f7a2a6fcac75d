# SPDX-License-Identifier: Apache-2.0
"""The BPF programs as instructions: compiled by bcc, or read from what was compiled before.

In each instruction that loads a map, the immediate is the map's place in the list of maps; `Compiled.with_maps` puts a
descriptor there. Nothing else in the instructions depends on this boot or this machine.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from tracer.probing import libbpf
from tracer.probing.headers import headers
from traces.errors import ENVIRONMENT, Problem

DIST_PACKAGES: Final = "/usr/lib/python3/dist-packages"
INSTALL_BCC: Final = "apt-get install python3-bpfcc"
SCHEMA: Final = 1
MAPS: Final = ("ring", "rings", "threads", "counters", "settings", "wanted", "born")  # the maps of ebpf/state.c

_INSTRUCTION: Final = np.dtype([("code", "u1"), ("registers", "u1"), ("offset", "<i2"), ("immediate", "<i4")])
_LOAD_64, _FROM_MAP = 0x18, 1  # BPF_LD | BPF_IMM | BPF_DW; BPF_PSEUDO_MAP_FD as the source register
_MOST_INSTRUCTIONS: Final = 1_000_000  # of one program: the kernel's own limit
_NAME: Final = re.compile(r"\w{1,200}")


@dataclass(frozen=True)
class Compiled:
    """Compiled programs and the shapes of their maps.

    `maps` by name: (type, key size, value size, entries, flags). `programs` by name: instructions.
    """

    maps: Mapping[str, tuple[int, int, int, int, int]]
    programs: Mapping[str, bytes]

    def document(self) -> bytes:
        """Return the contents of a file that `read` reads."""
        programs = {name: base64.b64encode(code).decode() for name, code in self.programs.items()}
        return json.dumps({"schema": SCHEMA, "maps": self.maps, "programs": programs}).encode()

    def with_maps(self, name: str, descriptors: Mapping[str, int]) -> bytes:
        """Return a program's instructions with the descriptors of its maps in them."""
        code = np.frombuffer(self.programs[name], _INSTRUCTION).copy()
        wanted = _loads_of_maps(code)
        by_place = np.array([descriptors[each] for each in self.maps], dtype="i4")
        code["immediate"][wanted] = by_place[code["immediate"][wanted]]
        return code.tobytes()


def read(document: bytes) -> Compiled:
    """Return the programs that `Compiled.document` wrote. Raises ValueError, with what is wrong, for anything else."""
    try:
        raw = json.loads(document)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise ValueError("of another version of kvmtrace")
    maps, programs = raw.get("maps"), raw.get("programs")
    if not isinstance(maps, dict) or tuple(maps) != MAPS or not isinstance(programs, dict):
        raise ValueError("its maps or programs are not ours")
    shapes = {}
    for name, shape in maps.items():
        if (
            not isinstance(shape, list)
            or len(shape) != 5
            or not all(type(n) is int and 0 <= n < 1 << 32 for n in shape)
        ):
            raise ValueError(f"the map {name} has no shape")
        shapes[name] = (shape[0], shape[1], shape[2], shape[3], shape[4])
    codes = {}
    for name, text in programs.items():
        code = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        if not _NAME.fullmatch(name) or len(code) % 8 or not 0 < len(code) // 8 <= _MOST_INSTRUCTIONS:
            raise ValueError(f"{name[:40]!r} is no program")
        parsed = np.frombuffer(code, _INSTRUCTION)
        places = parsed["immediate"][_loads_of_maps(parsed)]
        if ((places < 0) | (places >= len(MAPS))).any():
            raise ValueError(f"{name} loads a map that there is not")
        codes[name] = code
    return Compiled(shapes, codes)


def _loads_of_maps(code: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return which instructions load a map; a 64-bit load takes two, of which the second is only data."""
    wide = code["code"] == _LOAD_64
    if (code["code"][1:][wide[:-1]] != 0).any() or (len(code) and wide[-1]):
        raise ValueError("a load of 64 bits that does not end")
    loads: np.ndarray[Any, Any] = np.flatnonzero(wide & (code["registers"] >> 4 == _FROM_MAP))
    return loads


def import_bcc() -> Any:
    """Return the distribution's bcc module, whose directory, outside a virtual environment, goes LAST on sys.path."""
    if os.environ.get("KVMTRACE_WITHOUT_BCC"):  # how a machine without it is tested
        raise Problem(f"bcc is not installed: {INSTALL_BCC}", ENVIRONMENT)
    if DIST_PACKAGES not in sys.path:
        sys.path.append(DIST_PACKAGES)
    try:
        import bcc
    except ImportError as error:
        raise Problem(f"bcc is not usable ({error}): {INSTALL_BCC}", ENVIRONMENT) from None
    if not hasattr(bcc, "BPF"):
        raise Problem(f"the `bcc` of PyPI is not iovisor's bcc: pip uninstall bcc, then {INSTALL_BCC}", ENVIRONMENT)
    return bcc


def bcc_version() -> str:
    """Return bcc's version, empty where it is not installed, without importing it: that loads clang and LLVM."""
    if os.environ.get("KVMTRACE_WITHOUT_BCC"):
        return ""
    try:
        text = (Path(DIST_PACKAGES) / "bcc" / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"__version__ = ['\"]([\w.+~-]+)", text)
    return found[1] if found else ""


def compile_text(text: str) -> Compiled:
    """Compile a C text (seconds). Raises Problem: no bcc, headers or privileges for the maps, or clang's error."""
    bcc = import_bcc()
    said: list[str] = []
    try:
        with quiet() as said, headers():
            module = bcc.BPF(text=text.encode(), cflags=["-w"])
    except Problem:
        raise
    except Exception as error:
        raise Problem(f"bcc could not compile the probes: {_last_line(said) or error}", ENVIRONMENT) from None
    try:
        descriptors = {name: int(bcc.lib.bpf_table_fd(module.module, name.encode())) for name in MAPS}
        place = {fd: number for number, fd in enumerate(descriptors.values())}
        programs = {}
        for number in range(bcc.lib.bpf_num_functions(module.module)):
            name = bcc.lib.bpf_function_name(module.module, number)
            code = np.frombuffer(module.dump_func(name), _INSTRUCTION).copy()
            for load in _loads_of_maps(code):
                code["immediate"][load] = place[int(code["immediate"][load])]
            programs[name.decode()] = code.tobytes()
        return Compiled({name: libbpf.map_info(fd) for name, fd in descriptors.items()}, programs)
    finally:
        module.cleanup()


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Catch what bcc's and clang's C code writes to standard error; the lines are in the list afterwards."""
    lines: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            sink.seek(0)
            lines.extend(sink.read().decode(errors="replace").splitlines())
            if os.environ.get("KVMTRACE_DEBUG"):
                sys.stderr.write("\n".join(lines) + "\n")


def _last_line(lines: list[str]) -> str:
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if "error:" in line or "not permitted" in line or "Failed" in line]
    return (errors or said or [""])[0]
