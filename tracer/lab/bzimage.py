# SPDX-License-Identifier: Apache-2.0
"""Unpacks a kernel image for a boot sector that has no room to do so: the kernel itself, and its boot header.

The kernel's own unpacking of XZ takes some three billion instructions; here it takes a second.
"""

from __future__ import annotations

import gzip
import lzma
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from traces.errors import Problem

_LOAD: Final = 1  # PT_LOAD
_MAP_BASE: Final = 0x80000000  # __START_KERNEL_map, of which the entry's address is a part


@dataclass(frozen=True)
class UnpackedKernel:
    """An unpacked kernel: `image` belongs at physical address `base`, and takes memory up to `end`.

    `entry` is its 64-bit entry. `header` is the setup header (Documentation/arch/x86/boot.rst), to be put at 0x1f1 of
    the boot parameters.
    """

    image: bytes
    base: int
    end: int
    entry: int
    header: bytes


def unpack(path: Path) -> UnpackedKernel:
    """Unpack a bzImage. Raises Problem where it is damaged, or compressed in a way that is not known here."""
    packed = path.read_bytes()
    try:
        setup = ((packed[0x1F1] or 4) + 1) * 512
        offset, length = struct.unpack_from("<II", packed, 0x248)
        elf = _decompress(packed[setup + offset : setup + offset + length], path)
        entry, headers = struct.unpack_from("<QQ", elf, 24)
        (count,) = struct.unpack_from("<H", elf, 56)
        rows = [struct.unpack_from("<IIQQQQQQ", elf, headers + 56 * i) for i in range(count)]
    except (struct.error, IndexError, OSError, EOFError, lzma.LZMAError) as error:
        raise Problem(f"{path}: cannot be unpacked ({error})") from None
    # (physical address, offset in the file, bytes there, bytes in memory)
    segments = [(row[4], row[2], row[5], row[6]) for row in rows if row[0] == _LOAD]
    if not segments or any(place + size > len(elf) for _, place, size, _ in segments):
        raise Problem(f"{path}: no kernel in it, or only a part")
    base = min(segment[0] for segment in segments)
    image = bytearray(max(address + size for address, _, size, _ in segments) - base)
    for address, place, size, _ in segments:
        image[address - base : address - base + size] = elf[place : place + size]
    return UnpackedKernel(
        bytes(image),
        base,
        max(address + size for address, _, _, size in segments),
        entry % _MAP_BASE,
        packed[0x1F1 : 0x202 + packed[0x201]],
    )


def _decompress(payload: bytes, path: Path) -> bytes:
    """Return the ELF image of a compressed kernel. Its size follows the data, except with gzip, which contains it."""
    if payload.startswith(b"\xfd7zXZ\0"):
        return _whole(lzma.LZMADecompressor(), payload)
    if payload.startswith(b"\x1f\x8b"):
        return gzip.decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow as pa

        data: bytes = pa.CompressedInputStream(pa.BufferReader(payload[:-4]), "zstd").read()
        return data
    raise Problem(f"{path}: compressed neither with xz, gzip nor zstd")


def _whole(unpacker: lzma.LZMADecompressor, payload: bytes) -> bytes:
    data = unpacker.decompress(payload)
    if not unpacker.eof:
        raise EOFError("it ends too early")
    return data
