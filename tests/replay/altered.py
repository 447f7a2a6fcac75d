# SPDX-License-Identifier: Apache-2.0
"""Recordings with rows that are missing, doubled or changed, in memory; and what rows show, counted one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa

from replay.decode.capabilities import Capabilities
from traces import kernels
from traces.kernels import Kernel
from traces.kernels.spte import LARGE
from traces.reader import BATCH_ROWS, Trace

# Of each kind what can be changed so that the row counts as something else; None: leave it out, "": have it twice.
MUTATIONS: dict[str, tuple[str | None, ...]] = {
    "kvm_mmu_get_page": (None, "", "flags"),
    "kvm_tdp_mmu_spte_changed": (None, "", "old", "new"),
    "kvm_mmu_set_spte": (None, ""),
    "kvm_mmu_spte_requested": (None,),
    "fast_page_fault": (None, ""),
    "root_get": (None, ""),
    "mmu_load": (None, "", "root"),
    "root_put": (None, "refs"),
}
_WAS: dict[str, Any] = {"flags": 0, "old": 0, "new": 0, "root": 0, "refs": 2}


class Rows:
    """A recording's first VM, as rows in memory."""

    def __init__(self, path: Path) -> None:
        self.trace = Trace.open(path)
        self.vm = self.trace.metadata.vms[0]
        self.trace.metadata = replace(self.trace.metadata, vms=(self.vm,))
        self.table = pa.Table.from_batches(list(self.trace.batches(vm=int(self.vm["id"]))))
        self.kinds: list[str] = self.table.column("kind").to_pylist()
        self.kernel = kernels.recorded(self.trace.metadata)
        self.listed = self.table.to_pylist()

    def places(self) -> dict[str, list[int]]:
        """Where rows of kinds are that can be changed."""
        found: dict[str, list[int]] = {}
        for at, kind in enumerate(self.kinds):
            if kind in MUTATIONS:
                found.setdefault(kind, []).append(at)
        return found


@dataclass(frozen=True)
class Mutation:
    """One row that is left out (None), there twice (""), or has something else in a column."""

    at: int
    kind: str
    what: str | None

    def rows(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """What becomes of the row."""
        return [] if self.what is None else [row, row] if not self.what else [{**row, self.what: _WAS[self.what]}]

    def table(self, table: pa.Table) -> pa.Table:
        row = table.slice(self.at, 1)
        if self.what:
            index = table.schema.get_field_index(self.what)
            changed = pa.array([_WAS[self.what]], table.schema.field(index).type)
            row = row.set_column(index, table.schema.field(index), changed)
        own = [] if self.what is None else [row, row] if not self.what else [row]
        return pa.concat_tables([table.slice(0, self.at), *own, table.slice(self.at + 1)])


def mutations(rows: Rows, random: Random) -> Iterator[Mutation]:
    """One after the other, without end: each kind as often as any other."""
    places = rows.places()
    while True:
        kind = random.choice(sorted(places))
        yield Mutation(random.choice(places[kind]), kind, random.choice(MUTATIONS[kind]))


def tells(rows: Rows, mutation: Mutation) -> bool:
    """Whether it changes what the rows show."""
    row = rows.listed[mutation.at]
    if row["kind"] != "root_put":  # a root is freed once, however often it is put
        return counted(mutation.rows(row), rows.kernel) != counted([row], rows.kernel)
    altered = [*rows.listed[: mutation.at], *mutation.rows(row), *rows.listed[mutation.at + 1 :]]
    return counted(altered, rows.kernel) != counted(rows.listed, rows.kernel)


def with_rows(trace: Trace, table: pa.Table) -> Capabilities:
    """The recording with these rows instead of its own."""
    other = copy(trace)

    def batches(columns: Sequence[str] | None = None, vm: int | None = None, size: int = BATCH_ROWS) -> Any:
        chosen = table if columns is None else table.select(list(columns))
        return chosen.combine_chunks().to_batches(size)

    other.batches = batches  # type: ignore[method-assign]
    return Capabilities(other)


def counted(rows: Sequence[dict[str, Any]], kernel: Kernel) -> Counter[str]:
    """What rows of the TDP MMU show, each count by the one event that is most its own."""
    found: Counter[str] = Counter()
    put = set()
    changes = kernel.spte_changed
    for row in rows:
        match row["kind"]:
            case "kvm_mmu_get_page" if row["flags"] & 1 and row["root"]:
                found["roots"] += 1
            case "kvm_mmu_get_page" if row["flags"] & 1 and not changes:
                found["tables"] += 1
            case "root_get" if row["root"]:
                found["loads"] += 1
            case "mmu_load" if row["root"]:
                found["loads, at return"] += 1
            case "root_put" if row["refs"] == 1:
                put.add(row["root"])
            case "kvm_tdp_mmu_spte_changed":
                was, now = (_what(row[name], row["level"], kernel) for name in ("old", "new"))
                found[f"{was} to {now}"] += was != now
            case "kvm_mmu_set_spte" if not changes:
                found["leaves"] += 1
            case "fast_page_fault" if row["ret"] == kernel.ret_pf.fixed:
                found["fixes"] += 1
    found["freed"] = len(put)
    return Counter({name: count for name, count in found.items() if count})


def _what(word: int, level: int, kernel: Kernel) -> str:
    if word in (0, kernel.spte.nonpresent, kernel.spte.frozen):
        return "nothing"
    return "leaf" if level == 1 or word & LARGE or not word & kernel.spte.present else "table"
