"""Where a TDP SPTE keeps what, by kernel version: the dated table for the trace's `layout.spte`. Dated 2026-11.

BTF cannot tell: KVM names these bits with constants and writes the masks at load time. Present, large and frame bits
and the empty and frozen values are checked against the corpus by a test.
"""

from __future__ import annotations

from typing import Any

from tracer.probes import Version

_FRAME = {"large": [7, 1], "pfn": [12, 40]}  # [shift, width]; a leaf has level 1 or the large bit
_WRITABLE = {  # host_writable and mmu_writable: low bits under NPT, high ones under EPT
    "npt": {"host_writable": [9, 1], "mmu_writable": [10, 1]},
    "ept": {"host_writable": [57, 1], "mmu_writable": [58, 1]},
}
_NO_PRESENT_VALUE = 1 << 63  # x86-64's non-present SPTE from 6.9 on (suppress #VE), 0 before

# (first version, layout): the last whose version is not newer than the kernel holds
_TABLE: tuple[tuple[Version, dict[str, Any]], ...] = (
    # 5.10: no bit of its own says present; anything that is neither 0 nor an MMIO SPTE is
    ((5, 10), {**_FRAME, "present": None, "ad_type": [52, 2], "nonpresent": 0, "frozen": None, **_WRITABLE}),
    ((5, 12), {**_FRAME, "present": [11, 1], "ad_type": [52, 2], "nonpresent": 0, "frozen": 0x5A0, **_WRITABLE}),
    ((6, 9), {**_FRAME, "present": [11, 1], "ad_type": [52, 2], "nonpresent": _NO_PRESENT_VALUE,
              "frozen": _NO_PRESENT_VALUE | 0x5A0, **_WRITABLE}),
    ((7, 3), {**_FRAME, "present": [11, 1], "ad_type": [60, 2], "nonpresent": _NO_PRESENT_VALUE,
              "frozen": _NO_PRESENT_VALUE | 0x1A0, "npt": _WRITABLE["npt"],
              "ept": {"host_writable": [53, 1], "mmu_writable": [55, 1]}}),
)  # fmt: skip


def spte_layout(version: Version) -> dict[str, Any]:
    """Bit positions as [shift, width] and the values of empty and frozen entries; `source` says where they are from."""
    entry = next(layout for since, layout in reversed(_TABLE) if since <= max(version, _TABLE[0][0]))
    return {**entry, "source": "dated table of 2026-11: BTF does not name SPTE bits"}
