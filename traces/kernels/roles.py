# SPDX-License-Identifier: Apache-2.0
"""Role words: a vCPU's state, the word that a kernel makes of it, and back.

A state is a number of five bits, the same for every kernel: those parts of a vCPU's state that any kernel puts into a
root's role word. Layouts are those of union kvm_mmu_page_role (docs/kvm-mmu.md, "Role words"); a recording contains the
layout of its kernel, from BTF.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

LEVEL5: Final = 1
SMM: Final = 2
GUEST: Final = 4
WP: Final = 8
NX: Final = 16
STATES: Final = 32
MAYBE_WP: Final = 32  # CR0.WP was flipped, if writes of CR0 whose value was not recorded were such
USUAL: Final = WP | NX  # 4 levels, no SMM, CR0.WP and EFER.NX set

_LEVEL: Final = 0xF
_AD_DISABLED: Final = 1 << 16
_GUEST_MODE: Final = 1 << 17
_SMM: Final = 1 << 24
_WORD_BITS: Final = 32


@dataclass(frozen=True)
class Word:
    """A root's role word as the model sees it. `as_id` is 1 in SMM; `level` is that of the root table, 4 or 5."""

    word: int
    level: int = 4
    as_id: int = 0


@dataclass(frozen=True)
class RoleLayout:
    """Where a kernel keeps the fields of a role word: (name, lowest bit, width), in the kernel's own names."""

    fields: tuple[tuple[str, int, int], ...]
    guest_bits: bool  # CR0.WP and EFER.NX are the guest's; else both are always set in the words of TDP roots

    @cached_property
    def shifts(self) -> dict[str, tuple[int, int]]:
        """The lowest bit and the width of each field, by name."""
        return {name: (shift, width) for name, shift, width in self.fields}

    def mask(self, name: str) -> int:
        """Return the mask of a field; 0 where the kernel does not have it."""
        shift, width = self.shifts.get(name, (0, 0))
        return ((1 << width) - 1) << shift

    @cached_property
    def wp(self) -> int:
        """The bit of the guest's CR0.WP."""
        return self.mask("cr0_wp")

    @cached_property
    def nx(self) -> int:
        """The bit of the guest's EFER.NX, `nxe` until 5.14."""
        return self.mask("efer_nx") or self.mask("nxe")

    @cached_property
    def constant(self) -> int:
        """The bits that are set in every direct root's word: direct, access, and 5.10's "entries have 8 bytes"."""
        return self.mask("direct") | self.mask("access") | self.mask("gpte_is_8_bytes")

    @cached_property
    def invalid(self) -> int:
        """The bit of roots that were invalidated."""
        return self.mask("invalid")

    @cached_property
    def smm(self) -> int:
        """The lowest bit of the field `smm`."""
        return 1 << self.shifts["smm"][0]


def fields_of(layout: Any) -> tuple[tuple[str, int, int], ...] | None:
    """Return the fields of a trace's `layout.role` ({name: [lowest bit, width]}); None where it cannot be used."""
    if not isinstance(layout, Mapping):
        return None
    fields = []
    for name, place in layout.items():
        if not (isinstance(name, str) and isinstance(place, list | tuple) and len(place) == 2):
            return None
        if not all(isinstance(part, int) and not isinstance(part, bool) for part in place):
            return None
        shift, width = place
        if not (0 <= shift < _WORD_BITS and 0 < width <= _WORD_BITS - shift):
            return None
        fields.append((name, shift, width))
    names = {name for name, _, _ in fields}
    needed = {"level", "direct", "access", "invalid", "cr0_wp", "smm"}
    if not needed <= names or not names & {"efer_nx", "nxe"}:
        return None
    return tuple(fields)


def states(role: NDArray[np.uint32], layout: RoleLayout) -> NDArray[np.int64]:
    """Return the state in each role word; where words have no guest bits, WP and NX are set."""
    word = role.astype(np.int64)
    state: NDArray[np.int64] = (
        (word & _LEVEL == 5) * LEVEL5 + (word >> 24 != 0) * SMM + (word & _GUEST_MODE != 0) * GUEST
    )
    guest = (word & layout.wp != 0) * WP + (word & layout.nx != 0) * NX
    return state + (guest if layout.guest_bits else USUAL)


@lru_cache
def _words(layout: RoleLayout, ad_disabled: bool) -> tuple[tuple[Word, ...], NDArray[np.int64]]:
    found: dict[int, Word] = {}
    index = np.zeros(STATES, np.int64)
    # The usual state comes first: index 0 is what a vCPU has before anything is known of it.
    for state in sorted(range(STATES), key=lambda s: s ^ USUAL):
        level = 5 if state & LEVEL5 else 4
        word = level | layout.constant | (_AD_DISABLED if ad_disabled else 0)
        word |= (_GUEST_MODE if state & GUEST else 0) | (_SMM if state & SMM else 0)
        word |= layout.wp if state & WP or not layout.guest_bits else 0
        word |= layout.nx if state & NX or not layout.guest_bits else 0
        found.setdefault(word, Word(word, level, 1 if state & SMM else 0))
        index[state] = list(found).index(word)
    index.flags.writeable = False
    return tuple(found.values()), index


def words(layout: RoleLayout, ad_disabled: bool) -> tuple[list[Word], NDArray[np.int64]]:
    """Return every word that roots can have under a layout, and for each state the index of its word."""
    found, index = _words(layout, ad_disabled)
    return list(found), index


def has_ad_disabled(role: int) -> bool:
    """Whether a word says that accessed and dirty bits are off: a property of the loaded module."""
    return bool(role & _AD_DISABLED)
