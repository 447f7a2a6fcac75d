# SPDX-License-Identifier: Apache-2.0
"""What a text lacks and a user may tell: the kernel, threads' VMs, memory slots."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

from traces.errors import Problem

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_PAGE: Final = 12
_MOST: Final = 1 << 52  # bytes of guest-physical addresses


@dataclass(frozen=True)
class ToldSlot:
    """A memory slot as the user gave it: of the VM of that name (empty: of each), in frames; `hva` 0: not given."""

    vm: str
    gfn: int
    pages: int
    hva: int

    def to_dict(self, number: int) -> dict[str, Any]:
        """As a snapshot has it."""
        return {"slot": number, "as_id": 0, "gfn": self.gfn, "pages": self.pages, "hva": self.hva, "flags": 0}


@dataclass(frozen=True)
class ToldOfText:
    """`kernel` is a release such as 6.1.20, `vm_of` names VMs by threads of theirs."""

    kernel: str = ""
    vm_of: dict[int, str] = field(default_factory=dict)
    slots: tuple[ToldSlot, ...] = ()


def vm_of(given: list[str]) -> dict[int, str]:
    """`TID=NAME`, each. Raises Problem."""
    found = {}
    for text in given:
        tid, equals, name = text.partition("=")
        if not equals or not re.fullmatch(r"\d{1,9}", tid) or not name.isprintable() or not 0 < len(name) <= 100:
            raise Problem(f"--vm-of {text}: give it as TID=NAME, such as 5120=web1")
        found[int(tid)] = name
    return found


def slots(given: list[str]) -> tuple[ToldSlot, ...]:
    """`[NAME=]GPA+SIZE[@HVA]`, each. Raises Problem."""
    return tuple(map(_slot, given))


def _slot(text: str) -> ToldSlot:
    match = re.fullmatch(
        r"(?:([^=]{1,100})=)?(0x[0-9a-fA-F]{1,16}|\d{1,18})([KMGT]?)\+(0x[0-9a-fA-F]{1,16}|\d{1,18})([KMGT]?)"
        r"(?:@(0x[0-9a-fA-F]{1,16}))?",
        text,
    )
    if match is None:
        raise Problem(
            f"--memslot {text}: give it as GPA+SIZE, NAME=GPA+SIZE or GPA+SIZE@HVA, such as 0+3G@0x7f1200000000"
        )
    first, size = (int(match[n], 0) * _UNITS[match[n + 1]] for n in (2, 4))
    if first >> _PAGE << _PAGE != first or size >> _PAGE << _PAGE != size or not size or first + size > _MOST:
        raise Problem(f"--memslot {text}: address and size must be multiples of 4K, and below 4096T")
    return ToldSlot(match[1] or "", first >> _PAGE, size >> _PAGE, int(match[6] or "0", 16))
