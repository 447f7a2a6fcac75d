# SPDX-License-Identifier: Apache-2.0
"""Kernel modules as files: what they depend on, decompressed, and in the order they must be loaded.

A Debian package ships no modules.dep (depmod makes it at installation), so dependencies come from each module itself:
the `depends=` string in its .modinfo section.
"""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from traces.errors import Problem

# What lab guests load, on AMD under QEMU and on Intel under Bochs; each pulls in what it depends on. Kernels have some
# of them built in, and which differs by version (netfs and fscache were modules in 6.1, overlay is built into some), so
# a name that is nowhere is skipped here and missed in the guest, where the failing mount or the missing /dev/kvm names
# it.
WANTED: Final = ("virtio_pci", "9p", "9pnet_virtio", "overlay", "kvm", "kvm_amd")
WANTED_ON_INTEL: Final = ("kvm", "kvm_intel")

_SUFFIXES: Final = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")


def module_name(filename: str) -> str | None:
    """Return the kernel's name of a module file (`kvm_amd` for `kvm-amd.ko.xz`); None for a file that is no module."""
    for suffix in _SUFFIXES:
        if filename.endswith(suffix):
            return filename.removesuffix(suffix).replace("-", "_")
    return None


def decompressed(data: bytes, where: str) -> bytes:
    """Return the ELF image of a module as packaged: plain, xz (Debian since 6.12), gzip or zstd, by its first bytes.

    Raises Problem when it is none of these or is damaged.
    """
    try:
        if data.startswith(b"\xfd7zXZ\x00"):
            data = lzma.decompress(data)
        elif data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        elif data.startswith(b"\x28\xb5\x2f\xfd"):
            import pyarrow as pa

            data = pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise Problem(f"{where}: cannot be decompressed ({error})") from None
    if not data.startswith(b"\x7fELF"):
        raise Problem(f"{where}: not a kernel module (no ELF header)")
    return data


def modinfo(image: bytes, where: str) -> dict[str, str]:
    """Return the `key=value` strings of a module's .modinfo section; of a key that repeats (alias, parm), the last.

    Raises Problem when the ELF image (64-bit, little-endian) has no such section or ends too early.
    """
    try:
        (table,) = struct.unpack_from("<Q", image, 0x28)
        size, count, names = struct.unpack_from("<3H", image, 0x3A)
        sections = [struct.unpack_from("<IIQQQQ", image, table + index * size) for index in range(count)]
        strings = sections[names][4]
        for name, _type, _flags, _address, offset, length in sections:
            if image.startswith(b".modinfo\0", strings + name):
                pairs = image[offset : offset + length].split(b"\0")
                return dict(pair.decode().split("=", 1) for pair in pairs if b"=" in pair)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise Problem(f"{where}: damaged module ({error})") from None
    raise Problem(f"{where}: no .modinfo section: not a kernel module")


def load_order(tree: Mapping[str, bytes], wanted: Iterable[str] = WANTED) -> list[str]:
    """Return the names of `wanted` modules and of all they depend on, dependencies first.

    `tree` maps module names to file contents; a wanted name that is not in it counts as built in. Raises Problem when a
    dependency is missing: `depends=` names only what the kernel does not have built in.
    """
    order: list[str] = []

    def visit(name: str, user: str) -> None:
        if name in order:
            return
        if name not in tree:
            raise Problem(f"module {user} needs {name}, which is not there: give the kernel's whole module directory")
        depends = modinfo(decompressed(tree[name], name), name).get("depends", "")
        for dependency in filter(None, depends.split(",")):
            visit(dependency.replace("-", "_"), name)
        order.append(name)

    for name in wanted:
        if name in tree:
            visit(name, name)
    return order


class Directory(Mapping[str, bytes]):
    """The modules below a directory (a /lib/modules/VERSION tree or a flat one), read when asked for."""

    def __init__(self, *roots: Path) -> None:
        """Find the modules below `roots`; the last root that has one counts. Raises Problem if one is no directory."""
        self.paths: dict[str, Path] = {}
        for root in roots:
            if not root.is_dir():
                raise Problem(f"{root}: no such directory of kernel modules")
            for path in sorted(root.rglob("*.ko*")):
                if name := module_name(path.name):
                    self.paths[name] = path

    def __getitem__(self, name: str) -> bytes:
        return self.paths[name].read_bytes()

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)
