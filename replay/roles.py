"""Role words: a vCPU's state, the word that a kernel makes of it, and back.

A state is a number of five bits, the same for every kernel: what of a vCPU any kernel puts in a root's word. Layouts
are those of union kvm_mmu_page_role (reference/kvm-mmu.md, section 1); a recording brings its own from BTF.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.simulate.operations import Word

LEVEL5: Final = 1
SMM: Final = 2
GUEST: Final = 4
WP: Final = 8
NX: Final = 16
STATES: Final = 32
MAYBE_WP: Final = 32  # CR0.WP was flipped, if writes of CR0 whose value was not recorded were such
USUAL: Final = WP | NX  # 4 levels, no SMM, CR0.WP and EFER.NX set

_LEVEL: Final = 0xF
_DIRECT: Final = 1 << 7
_AD_DISABLED: Final = 1 << 16
_GUEST_MODE: Final = 1 << 17
_SMM: Final = 1 << 24


@dataclass(frozen=True)
class Layout:
    """Where a kernel keeps the bits that differ between versions. `constant`: set in every direct root's word."""

    wp: int
    nx: int
    constant: int
    guest_bits: bool  # CR0.WP and EFER.NX are the guest's; else both are always set


OLD: Final = Layout(wp=1 << 13, nx=1 << 12, constant=1 << 4 | _DIRECT | 7 << 8, guest_bits=True)  # to 5.16
GUEST_BITS: Final = Layout(wp=1 << 13, nx=1 << 12, constant=_DIRECT | 7 << 8, guest_bits=True)  # 5.17, 5.18
FIXED: Final = Layout(wp=1 << 13, nx=1 << 12, constant=_DIRECT | 7 << 8, guest_bits=False)  # 5.19 and later
WIDE: Final = Layout(wp=1 << 14, nx=1 << 13, constant=_DIRECT | 15 << 8, guest_bits=False)  # 7.x: access of 4 bits


def recorded(layout: Mapping[str, Any], otherwise: Layout) -> Layout:
    """The layout of a trace's metadata (`layout.role`: {field: [shift, bits]}); `otherwise` where it has none."""
    fields = layout.get("role")
    if not isinstance(fields, dict):
        return otherwise
    try:
        wp, nx = fields["cr0_wp"][0], fields["efer_nx" if "efer_nx" in fields else "nxe"][0]
        access, direct = fields["access"], fields["direct"][0]
        wide = 1 << 4 if "gpte_is_8_bytes" in fields else 0
        constant = wide | 1 << direct | ((1 << access[1]) - 1) << access[0]
        return Layout(1 << wp, 1 << nx, constant, otherwise.guest_bits)
    except (KeyError, TypeError, IndexError, ValueError):
        return otherwise


def states(role: NDArray[np.uint32], layout: Layout) -> NDArray[np.int64]:
    """The state in each role word; where words have no guest bits, WP and NX are set."""
    word = role.astype(np.int64)
    state: NDArray[np.int64] = (
        (word & _LEVEL == 5) * LEVEL5 + (word >> 24 != 0) * SMM + (word & _GUEST_MODE != 0) * GUEST
    )
    guest = (word & layout.wp != 0) * WP + (word & layout.nx != 0) * NX
    return state + (guest if layout.guest_bits else USUAL)


def words(layout: Layout, ad_disabled: bool) -> tuple[list[Word], NDArray[np.int64]]:
    """Every word that roots can have under a layout, and for each state the index of its word."""
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
    return list(found.values()), index


def has_ad_disabled(role: int) -> bool:
    """Whether a word says that accessed and dirty bits are off: a property of the loaded module."""
    return bool(role & _AD_DISABLED)
