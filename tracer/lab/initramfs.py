# SPDX-License-Identifier: Apache-2.0
"""The initramfs of a lab guest: PID 1 and the modules it loads, as an uncompressed newc cpio archive.

The kernel's own parser reads it (Documentation/driver-api/early-userspace/buffer-format.rst); neither cpio nor root is
needed to write it.
"""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from tracer.lab.modules import WANTED, decompressed, load_order
from traces.errors import ENVIRONMENT, Problem


@dataclass
class Archive:
    """A newc cpio archive in the making. Every entry is root's and dated 0, so equal contents are equal bytes."""

    entries: list[bytes] = field(default_factory=list)

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """Add one entry: `mode` with its file type, `data` for a regular file, `device` (major, minor) for a node."""
        inode = len(self.entries) + 1
        path = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % value for value in fields)
        self.entries.append(_padded(header + path) + _padded(data))

    def contents(self) -> bytes:
        """Return the whole archive, with the trailer entry that ends a cpio archive."""
        end = Archive()
        end.add("TRAILER!!!", 0)
        return b"".join((*self.entries, *end.entries))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def build(
    tree: Mapping[str, bytes],
    parameters: Mapping[str, str],
    init: bytes,
    wanted: Sequence[str] = WANTED,
    files: Mapping[str, tuple[int, bytes]] = MappingProxyType({}),
) -> bytes:
    """Return the archive for a guest: `init` as PID 1, the `wanted` modules of `tree`, and files by absolute path.

    `parameters` maps a module's name to its parameters ("tdp_mmu=1 npt=0"): they are given at loading, since a module
    loaded by finit_module() does not see the `kvm.tdp_mmu=1` of the kernel's command line.
    """
    archive = Archive()
    for directory in ("dev", "modules.d"):
        archive.add(directory, stat.S_IFDIR | 0o755)
    for path in sorted(files):  # directories come before what is in them
        mode, data = files[path]
        archive.add(path.lstrip("/"), mode, data)
    # The kernel opens it as PID 1's standard streams before anything is mounted.
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("init", stat.S_IFREG | 0o755, init)
    lines = []
    for name in load_order(tree, wanted):
        archive.add(f"modules.d/{name}.ko", stat.S_IFREG | 0o644, decompressed(tree[name], name))
        lines.append(f"/modules.d/{name}.ko {parameters.get(name, '')}\n")
    archive.add("modules", stat.S_IFREG | 0o644, "".join(lines).encode())
    return archive.contents()


def compiled(name: str, into: Path) -> bytes:
    """Return a static PID 1, compiled from NAME.c in this package; the program is made in `into` (0.2 s).

    Raises Problem (environment) when there is no compiler or no static C library.
    """
    program = into / name
    command = ["gcc", "-static", "-O1", "-Wall", "-o", str(program), str(Path(__file__).with_name(f"{name}.c"))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Problem("no C compiler for the lab's init: apt-get install gcc libc6-dev", ENVIRONMENT) from None
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise Problem(f"the lab's init does not compile ({cause}): apt-get install gcc libc6-dev", ENVIRONMENT)
    return program.read_bytes()
