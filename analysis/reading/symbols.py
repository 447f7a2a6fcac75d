# SPDX-License-Identifier: Apache-2.0
"""Names of a guest's addresses, from its vmlinux (ELF), its System.map, or a copy of its /proc/kallsyms.

pyelftools would read ELF as well, but takes ten seconds for a vmlinux; the symbol table is an array of fixed records,
which numpy reads in a tenth of a second.
"""

from __future__ import annotations

import bisect
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from traces.errors import Problem
from traces.text import printable

_LINE: Final = re.compile(rb"([0-9a-fA-F]{8,16}) ([a-zA-Z]) (\S+)(?:\s+\[(\S+)\])?\s*")
_ALIGNED: Final = 2 << 20  # KASLR moves the kernel by multiples of CONFIG_PHYSICAL_ALIGN, 2 MiB at the least
_FARTHEST: Final = 1 << 30  # KASLR moves it by less than this (KERNEL_IMAGE_SIZE)
_LINKED_AT: Final = 0xFFFFFFFF81000000  # _text of every x86-64 kernel before KASLR moves it
_KERNEL: Final = 1 << 63  # addresses from here on are the kernel's
_IDLE: Final = re.compile(r"halt|idle")  # names of the functions in which a kernel halts
_IDLE_BYTES: Final = 4096  # no such function is longer
_FAR: Final = 1 << 20  # no function is so long: beyond it, the address is of something without a symbol
_SYMTAB: Final = 2
_SYMBOL: Final = np.dtype([("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"),
                           ("size", "<u8")])  # fmt: skip


@dataclass(frozen=True)
class Naming:
    """The file that names a guest's addresses, and how far KASLR moved its kernel (None: to be found)."""

    symbols: Path | None = None
    kaslr: int | None = None


NO_NAMING: Final = Naming()


@dataclass(frozen=True)
class Symbols:
    """Sorted addresses with their names; `offset` is how far KASLR has moved the guest, None where not known."""

    path: Path
    addresses: list[int]
    names: list[str]
    offset: int | None = None
    how: str = ""

    def named(self, address: int) -> str:
        """Return a name such as `native_safe_halt+0xb`; empty where there is no symbol, or no offset is known."""
        if self.offset is None:
            return ""
        found = self._at(address - self.offset)
        return "" if found is None else found

    def _at(self, address: int) -> str | None:
        at = bisect.bisect_right(self.addresses, address) - 1
        if at < 0 or address < _KERNEL or address - self.addresses[at] >= _FAR:
            return None
        past = address - self.addresses[at]
        return self.names[at] + (f"+{past:#x}" if past else "")

    def moved(self, offset: int | None, halted: Iterable[int]) -> Symbols:
        """Return these symbols with the KASLR offset that is given, or that is found by `halted`.

        `halted` are the RIPs at which the guest halted. An offset is found only if it is the only one at which all of
        them are in functions that halt or idle.
        """
        if offset is not None:
            return Symbols(self.path, self.addresses, self.names, offset, f"KASLR offset {offset:#x} as given")
        text = next((address for address, name in zip(self.addresses, self.names, strict=True)
                     if name in ("_text", "_stext")), _LINKED_AT)  # fmt: skip
        if text & ~(_ALIGNED - 1) != _LINKED_AT:
            how = "addresses are of a running kernel: KASLR is in them"
            return Symbols(self.path, self.addresses, self.names, 0, how)
        fit = self._fitting(halted)
        if len(fit) == 1:
            how = f"KASLR offset {fit[0]:#x}: the only one that has all HLT exits in functions that halt"
            return Symbols(self.path, self.addresses, self.names, fit[0], how)
        why = "no HLT exit in the kernel shows it" if not fit else f"{len(fit)} offsets fit the HLT exits"
        how = f"no names: KASLR offset not known, {why}: give --kaslr-offset (0 where the guest has nokaslr)"
        return Symbols(self.path, self.addresses, self.names, None, how)

    def _fitting(self, halted: Iterable[int]) -> list[int]:
        rips = [rip for rip in set(halted) if rip >= _KERNEL]
        ends = [*self.addresses[1:], self.addresses[-1] + 1]
        idle = [(begin, min(end, begin + _IDLE_BYTES))
                for begin, end, name in zip(self.addresses, ends, self.names, strict=True)
                if _IDLE.search(name)]  # fmt: skip
        fit: set[int] | None = None
        for rip in rips:
            mine = {
                offset
                for begin, end in idle
                for offset in range(max(-(-(rip - end + 1) // _ALIGNED), 0) * _ALIGNED, rip - begin + 1, _ALIGNED)
                if offset < _FARTHEST
            }
            fit = mine if fit is None else fit & mine
        return sorted(fit or ())


def load(path: Path) -> Symbols:
    """Read the symbols of a file of any of the three types. Raises Problem where it is none, or has no symbols."""
    try:
        with path.open("rb") as file:
            elf = file.read(4) == b"\x7fELF"
        found = _of_elf(path) if elf else _of_text(path)
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}") from None
    except (struct.error, ValueError, IndexError, OverflowError):
        raise Problem(f"{path}: not a whole ELF file") from None
    pairs = sorted((address, name) for address, name in found if address)
    if not pairs:
        raise Problem(
            f"{path}: no symbol with an address in it: give a vmlinux that is not stripped, a System.map, or what root "
            "reads in /proc/kallsyms"
        )
    return Symbols(path, [address for address, _ in pairs], [printable(name) for _, name in pairs])


def _of_text(path: Path) -> list[tuple[int, str]]:
    found = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            match = _LINE.fullmatch(line[:4096])
            if match is None:
                if number < 8:
                    raise Problem(f"{path}: neither ELF, nor lines of address, type and name as in System.map")
                continue
            if match[2] in b"TtWw":
                module = f" [{match[4].decode(errors='replace')}]" if match[4] else ""
                found.append((int(match[1], 16), match[3].decode(errors="replace") + module))
    return found


def _of_elf(path: Path) -> list[tuple[int, str]]:
    data = np.memmap(path, np.uint8, "r")
    if bytes(data[4:6]) != b"\x02\x01":
        raise Problem(f"{path}: not a 64-bit little-endian ELF file")
    (headers,) = struct.unpack("<Q", bytes(data[0x28:0x30]))
    size, count = struct.unpack("<HH", bytes(data[0x3A:0x3E]))
    places = range(headers, headers + size * count, size) if size else ()
    sections = [struct.unpack("<IIQQQQIIQQ", bytes(data[at : at + 64])) for at in places]
    for _, kind, _, _, offset, length, link, *_ in sections:
        if kind != _SYMTAB:
            continue
        texts = sections[link]
        strings = bytes(data[texts[4] : texts[4] + texts[5]])
        symbols = np.frombuffer(bytes(data[offset : offset + length // 24 * 24]), _SYMBOL)
        kept = symbols[(symbols["value"] != 0) & np.isin(symbols["info"] & 15, (0, 2)) & (symbols["section"] != 0)
                       & (symbols["section"] < 0xFF00)]  # fmt: skip
        return [
            (int(value), strings[name : strings.index(b"\0", name)].decode(errors="replace"))
            for name, value in zip(kept["name"].tolist(), kept["value"].tolist(), strict=True)
        ]
    return []
