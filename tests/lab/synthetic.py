# SPDX-License-Identifier: Apache-2.0
"""Kernel images, modules and archives made up for tests."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path


def elf(*strings: str) -> bytes:
    """A module image with nothing but a .modinfo section."""
    info = b"".join(text.encode() + b"\0" for text in strings)
    names = b"\0.modinfo\0.shstrtab\0"
    table = 64 + len(info) + len(names)
    header = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    )
    sections = [(0, 0, 0, 0, 0, 0), (1, 1, 0, 0, 64, len(info)), (10, 3, 0, 0, 64 + len(info), len(names))]
    return header + info + names + b"".join(struct.pack("<IIQQQQIIQQ", *one, 0, 0, 0, 0) for one in sections)


def bzimage(version: str) -> bytes:
    """A file with the boot protocol's header and a version line."""
    head = bytearray(0x1000)
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x20E, 0x400)
    head[0x600 : 0x600 + len(version)] = version.encode()
    return bytes(head)


TREE = {
    "kvm_amd": elf("depends=ccp,kvm", "name=kvm_amd"),
    "kvm_intel": elf("depends=kvm", "name=kvm_intel"),
    "kvm": elf("license=GPL", "depends=irqbypass"),
    "irqbypass": elf("depends="),
    "ccp": elf("depends=rng-core"),
    "rng_core": elf("depends="),
    "unused": elf("depends=nowhere"),
}


def add_archive(store: Path, members: dict[str, bytes], name: str = "6.1.0-56-amd64.tar.xz") -> None:
    with tarfile.open(store / name, "w:xz") as tar:
        for path, data in members.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def whole_kernel() -> dict[str, bytes]:
    image = bzimage("6.1.0-56-amd64 (b@h) #1 SMP Debian 6.1.192-2 (2026-11-16)")
    return {"k/boot/vmlinuz-6.1.0-56-amd64": image} | {
        f"k/lib/modules/v/{name}.ko": data for name, data in TREE.items()
    }


def program(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
