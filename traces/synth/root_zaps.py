# SPDX-License-Identifier: Apache-2.0
"""The rows of a dying root: its tree is zapped, in KVM's order, and its tables go back to the allocator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from traces.kernels import at
from traces.lives import Ints
from traces.record import Columns
from traces.schema import BY_NAME
from traces.synth.mmu import INVALID, LEVEL, Leaves, Tables, link
from traces.synth.row_columns import join, rows, take

FROZEN: Final = at("6.1").spte.frozen or 0
ENTRIES: Final = 512
_END: Final = 1023 << 20  # after every table of a pass


@dataclass
class Dying:
    """Roots about to be zapped, by job number: frame, role (valid word), and references during the zap."""

    frame: Ints
    role: Ints
    refs: int
    invalid: bool = True

    @property
    def word(self) -> Ints:
        return self.role | INVALID if self.invalid else self.role

    @property
    def as_id(self) -> Ints:
        return self.role >> 24


def zap(roots: Dying, tables: Tables, leaves: Leaves, shared: bool) -> tuple[Columns, Ints]:
    """Return all rows of the zaps of these roots, root after root, and each row's job.

    A first pass removes the level-2 tables with all below them, the second the level-3 table. In shared mode every
    entry of a removed table is reported, absent ones too; in exclusive mode those that were present.
    """
    jobs = np.arange(len(roots.frame))
    writer = _Writer(roots)
    for step, level in enumerate((LEVEL - 1, LEVEL)):
        key = (jobs << 34) | (step << 32)
        writer.add(key, jobs, "zap_root_begin", role=roots.word, level=level, refs=roots.refs, flags=int(shared))
        writer.add(key | _END, jobs, "zap_root_end")
    for level in (3, 2, 1):
        at = np.flatnonzero(tables.level == level)
        job, gfn, frame = tables.job[at], tables.gfn[at], tables.frame[at]
        entry = _place(job, level, gfn)
        changed = 0 if level > 1 else FROZEN
        writer.add(entry, job, "kvm_tdp_mmu_spte_changed", level=level + 1, gfn=gfn, old=link(frame), new=changed)
        page = {"level": level, "gfn": gfn, "table": frame}
        writer.add(entry + 1, job, "kvm_mmu_prepare_zap_page", False, role=roots.role[job] - LEVEL + level, **page)
    writer.add(
        _place(leaves.job, leaves.level - 1, leaves.gfn), leaves.job, "kvm_tdp_mmu_spte_changed",
        level=leaves.level, gfn=leaves.gfn, old=leaves.spte, new=FROZEN,
    )  # fmt: skip
    if shared:
        _absent(writer, tables, leaves)
    return writer.done()


def _place(job: Ints, level: Any, gfn: Ints) -> Ints:
    """Return the place, in the order of rows, of the entry for a table of this level (0: for a page) at `gfn`.

    Depth first: an entry, what it pointed to, the next entry. An entry of a level-2 table has 514 places: its own row,
    its table's removal, that table's 512 entries.
    """
    level = np.asarray(level)
    key = job << 34
    within = 2 + ((gfn >> 9) & 511) * 514
    inner = (((gfn >> 18) + 1) << 20) | np.where(level == 0, within + 2 + (gfn & 511), within)
    top = (1 << 32) | (1 << 20)
    return key | np.where(level >= 3, top, np.where(level == 2, ((gfn >> 18) + 1) << 20, inner))


def _absent(writer: _Writer, tables: Tables, leaves: Leaves) -> None:
    """Add the entries that were absent: every one of the 512 of each table is frozen and reported."""
    for level in (3, 2, 1):
        at = np.flatnonzero(tables.level == level)
        if not len(at):
            continue
        shift = 9 * (level - 1)
        gfn = (tables.gfn[at][:, None] + (np.arange(ENTRIES) << shift)).ravel()
        job = np.repeat(tables.job[at], ENTRIES)
        if level == 3:  # its entries were cleared by the first pass
            key = (job << 34) | (1 << 32) | (1 << 20) | (2 + (gfn >> 18))
        else:
            key = _place(job, level - 1, gfn)
            below = tables.level == level - 1
            held = leaves.level == level
            taken = np.concatenate([
                _place(tables.job[below], level - 1, tables.gfn[below]),
                _place(leaves.job[held], level - 1, leaves.gfn[held]),
            ])  # fmt: skip
            left = ~np.isin(key, taken)
            key, job, gfn = key[left], job[left], gfn[left]
        writer.add(key, job, "kvm_tdp_mmu_spte_changed", level=level, gfn=gfn, new=FROZEN)


class _Writer:
    """Collects rows with the keys that order them."""

    def __init__(self, roots: Dying) -> None:
        self._roots = roots
        self._parts: list[Columns] = []
        self._keys: list[Ints] = []
        self._jobs: list[Ints] = []

    def add(self, key: Ints, job: Ints, kind: str, of_root: bool = True, **values: Any) -> None:
        if of_root:
            values["root"] = self._roots.frame[job]
        if "as_id" in BY_NAME[kind].fixed:
            values["as_id"] = self._roots.as_id[job]
        self._parts.append(rows(kind, len(key), **values))
        self._keys.append(key)
        self._jobs.append(job)

    def done(self) -> tuple[Columns, Ints]:
        order = np.argsort(np.concatenate(self._keys), kind="stable")
        return take(join(self._parts), order), np.concatenate(self._jobs)[order]


def free(roots: Dying, tables: Tables) -> tuple[Columns, Ints]:
    """Return the rows of tables going back to the allocator, each root after its children, and each row's job."""
    end = tables.gfn + (1 << (9 * tables.level)) - 1
    order = np.lexsort((tables.level, end, tables.job))
    job, level = tables.job[order], tables.level[order]
    children = rows(
        "table_free", len(order),
        role=roots.role[job] - LEVEL + level, level=level, gfn=tables.gfn[order], table=tables.frame[order],
    )  # fmt: skip
    own = np.arange(len(roots.frame))
    top = rows(
        "table_free", len(own), root=roots.frame, role=roots.role | INVALID, level=LEVEL, gfn=0, table=roots.frame
    )
    jobs = np.concatenate([job, own])
    after = np.argsort(jobs, kind="stable")  # children come first in each job
    return take(join([children, top]), after), jobs[after]
