# SPDX-License-Identifier: Apache-2.0
"""Memory types of leaves: each leaf of Intel's extended page tables has one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import polars as pl

from analysis.queries.registry import query
from analysis.reading.rows import Question, Tally
from analysis.reading.sources import Recording
from traces.errors import Problem
from traces.kernels.vendors import OFF, VMX, vendor_of
from traces.untrusted import object_at, text_at

# Bits 5:3 of an EPT leaf are its memory type; bit 6 says that the guest's PAT is ignored (SDM 3, "EPT and memory
# typing").
_TYPES: Final = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB"}
_TYPE: Final = pl.col("new") // 8 % 8
_PAT_IGNORED: Final = pl.col("new") // 64 % 2
_READS: Final = pl.col("new") % 8 != 0  # an entry without any of these bits maps nothing


def have_types(recording: Recording) -> bool:
    """Return whether leaf SPTEs of this recording's host contain a memory type."""
    raw = recording.metadata.raw
    modules = object_at(object_at(raw, "modules"), VMX.module)
    return vendor_of(text_at(object_at(raw, "host"), "vendor")) is VMX and modules.get(VMX.paging) not in OFF


def _types() -> Tally:
    return Tally(
        "memory types",
        where=(pl.col("kind") == "kvm_mmu_set_spte") & _READS,
        by={"type": _TYPE, "ignores_pat": _PAT_IGNORED},
        least={"low_gfn": pl.col("gfn")},
        most={"high_gfn": pl.col("gfn")},
    )


def _asked(recording: Recording) -> Iterator[Question]:
    if have_types(recording):
        yield _types()


@query(Recording, needs=("kvm_mmu_set_spte",), asks=_asked)
def memory_types(recording: Recording) -> pl.LazyFrame:
    """Leaves by memory type (EPT), such as WB for RAM and UC for uncached, and whether the guest's PAT has a say.

    `leaves` counts installs. Where `ignores_pat` is true the type applies as it is; else the guest's own PAT is
    combined with it. Raises Problem on AMD, whose leaves have no memory type: there the guest's PAT and the host's
    MTRRs decide.
    """
    if not have_types(recording):
        raise Problem(f"{recording.path}: query memory_types: leaves have a memory type in Intel's EPT only")
    (counted,) = recording.ask(_types())
    return (
        counted.lazy()
        .select(
            "vm",
            type=pl.col("type").replace_strict(_TYPES, default="reserved", return_dtype=pl.String),
            ignores_pat=pl.col("ignores_pat") == 1,
            leaves="rows",
            low_gfn="low_gfn",
            high_gfn="high_gfn",
        )
        .sort("leaves", "vm", "type", "ignores_pat", descending=[True, False, False, False])
    )
