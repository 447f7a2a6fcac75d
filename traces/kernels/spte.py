# SPDX-License-Identifier: Apache-2.0
"""SPTEs: which bits a kernel uses for what.

BTF does not say: KVM names these bits with constants and writes the masks at load time. A test compares every field
that recordings show with the corpus.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

LARGE: Final = 1 << 7  # a leaf above level 1: the processor's own bit, with NPT and with EPT
WRITABLE: Final = 1 << 1  # the processor's own bit, with NPT and with EPT
_PFN: Final = (1 << 52) - (1 << 12)
_MMIO_TYPE: Final = 3  # of the type field, before there was a bit for "present"
_WORD: Final = 1 << 64


@dataclass(frozen=True)
class SpteLayout:
    """Masks, and the words of absent and frozen entries; all are unsigned 64-bit numbers.

    `host_writable` and `mmu_writable` are pairs: with NPT, with EPT.
    """

    present: int  # 0: no bit of its own (5.10)
    type_shift: int  # lowest bit of the two-bit type: A/D bits on, off, write-protection only, MMIO
    nonpresent: int  # an entry that maps nothing
    frozen: int | None  # an entry whose table is being removed; None: not used
    host_writable: tuple[int, int]
    mmu_writable: tuple[int, int]

    def is_present(self, spte: int) -> bool:
        """Whether an entry maps something; an MMIO SPTE does not."""
        if self.present:
            return bool(spte & self.present)
        return bool(spte) and spte >> self.type_shift & 3 != _MMIO_TYPE

    @property
    def some_mmio(self) -> int:
        """An entry that is neither absent nor present: it stands for an MMIO SPTE whose word is not recorded."""
        return 1 if self.present else _MMIO_TYPE << self.type_shift

    def to_dict(self) -> dict[str, Any]:
        """Return the layout in the form of a trace's `layout.spte`: bits as [lowest, width]."""
        npt, ept = (
            {"host_writable": _bit(self.host_writable[at]), "mmu_writable": _bit(self.mmu_writable[at])}
            for at in (0, 1)
        )
        return {
            "large": _bit(LARGE),
            "pfn": [12, 40],
            "present": _bit(self.present) if self.present else None,
            "ad_type": [self.type_shift, 2],
            "nonpresent": self.nonpresent,
            "frozen": self.frozen,
            "npt": npt,
            "ept": ept,
        }


def pfn(spte: int) -> int:
    """Return the page frame number in an SPTE."""
    return (spte & _PFN) >> 12


def layout_of(document: Any, otherwise: SpteLayout) -> SpteLayout | None:
    """Return the layout that a trace's `layout.spte` says; None where it cannot be used.

    The bits by which SPTEs are writable are taken from `otherwise`: recordings of 5.10 made before format 1.1 name
    other bits than their rows have.
    """
    if not isinstance(document, Mapping):
        return None
    present: Any = document.get("present")
    kind: Any = document.get("ad_type")
    nonpresent: Any = document.get("nonpresent")
    frozen: Any = document.get("frozen")
    if not _is_place(kind) or not (present is None or _is_place(present)) or not _is_word(nonpresent):
        return None
    if not (frozen is None or _is_word(frozen)):
        return None
    return SpteLayout(
        0 if present is None else 1 << present[0],
        kind[0],
        nonpresent,
        frozen,
        otherwise.host_writable,
        otherwise.mmu_writable,
    )


def _bit(mask: int) -> list[int]:
    return [mask.bit_length() - 1, 1]


def _is_place(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(part, int) and not isinstance(part, bool) for part in value)
        and 0 <= value[0] < 64
        and 0 < value[1] <= 64 - value[0]
    )


def _is_word(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _WORD
