# SPDX-License-Identifier: Apache-2.0
"""The question what removed and protected a VM's pages, which `analysis.passes.removals` answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

import polars as pl

from analysis.passes.last_mappings import roots_of
from analysis.passes.removal_causes import causes_of
from analysis.passes.removal_totals import FIELDS
from analysis.passes.removals import COLUMNS, Removals
from analysis.reading.rows import KIND, DecodedRows
from traces.kernels.kernel import Kernel
from traces.reader import Trace

SCHEMA: Final = {"vm": pl.Int64, **dict.fromkeys(FIELDS, pl.Int64)}
_RECOVERY: Final = "kvm-nx-lpage"  # how the names of NX huge page recovery's threads begin
_NAMES: Final = [name for name in COLUMNS if name not in ("kind", "vcpu", "gfn")]


@dataclass(frozen=True, eq=False)
class RemovalQuestion:
    """Counts removals by VM, cause and thread; the answer has the columns `vm` and FIELDS."""

    trace: Trace
    kernel: Kernel
    name: str = "what removed pages"
    columns: frozenset[str] = frozenset({*_NAMES, KIND, "vcpu", "gfn"})

    def begin(self) -> _Counting:
        return _Counting(self.trace, self.kernel)


class _Counting:
    def __init__(self, trace: Trace, kernel: Kernel) -> None:
        meta = trace.metadata
        self._kernel = kernel
        self._vms: dict[int, Mapping[str, Any]] = {int(vm["id"]): vm for vm in meta.vms}
        self._causes = causes_of(kernel)
        self._roots = roots_of(meta.root_count, meta.uncreated_roots)
        self._recovery = [
            each["tid"]
            for each in meta.threads
            if isinstance(each.get("tid"), int) and str(each.get("comm", "")).startswith(_RECOVERY)
        ]
        self._shows = bool(meta.kinds.get("kvm_tdp_mmu_spte_changed"))
        self._removals: dict[int, Removals] = {}

    def feed(self, vm: int, rows: DecodedRows) -> None:
        if vm not in self._vms:
            return
        if vm not in self._removals:
            slots = [
                (slot["slot"], slot.get("flags", 0))
                for slot in self._vms[vm]["slots"]
                if slot["pages"] and not isinstance(slot.get("since"), int)
            ]
            self._removals[vm] = Removals(self._kernel, self._causes, self._roots, slots, self._recovery, self._shows)
        columns = {name: rows[name] for name in _NAMES}
        self._removals[vm].feed(SimpleNamespace(kind=rows[KIND], vcpu=rows["vcpu"], gfn=rows["gfn"], **columns))

    def answer(self) -> pl.DataFrame:
        found = [
            (vm, *row)
            for vm, removals in self._removals.items()
            for row in removals.totals.table[: removals.totals.count].tolist()
        ]
        return pl.DataFrame(found, schema=SCHEMA, orient="row")
