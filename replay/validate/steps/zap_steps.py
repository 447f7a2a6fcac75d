# SPDX-License-Identifier: Apache-2.0
"""The steps of zaps: whole roots, single entries, ranges (docs/kvm-mmu.md, "Zaps")."""

from __future__ import annotations

from collections.abc import Iterator

from replay.simulate import page_table
from replay.simulate.model_state import Root
from replay.simulate.page_table import Table
from replay.validate.expect import Activity, Expect, Spte
from replay.validate.row_tuples import RowTuple
from replay.validate.steps.vm_state import State


class Zaps(State):
    """The steps of zaps: what is removed, in which order, and which events show it."""

    def zap_root(self, root: Root, shared: bool) -> Activity:
        """Follow tdp_mmu_zap_root: one pass for each level in `kernel.passes`, the highest last."""
        for level in self.kernel.passes:
            level = level or root.top.level
            want = {"root": self.name(root), "role": self.role(root), "refs": root.refs, "flags": int(shared)}
            yield Expect("zap_root_begin", {**want, "level": level})
            yield None
            for table in list(_tables(root.top, level)):
                for at in sorted(table.entries):
                    if self.present(table.entries[at]):
                        yield from self.zap_entry(root, table, at, shared)
            yield Expect("zap_root_end", {"root": self.name(root)})
            yield None

    def zap_entry(self, root: Root, table: Table, at: int, shared: bool, put: Spte | None = None) -> Activity:
        """Make one present entry absent (or `put`), with everything below it."""
        entry = table.entries[at]
        change = self.change(root, table, at, put or self.nothing)
        if not self.kernel.children_first or not isinstance(entry, Table):
            row = yield change
            self._replace(table, at, row, put)
            yield None
            if isinstance(entry, Table):
                yield from self.remove_table(root, entry, shared)
        else:
            yield from self.remove_table(root, entry, shared)
            row = yield change
            self._replace(table, at, row, put)
            yield None

    def _replace(self, table: Table, at: int, row: RowTuple | None, put: Spte | None) -> None:
        """Remove the entry, or replace it by a huge leaf (`put`)."""
        del table.entries[at]
        if put is not None and row is not None and self.present(row.new):
            table.entries[at] = row.new

    def remove_table(self, root: Root, table: Table, shared: bool, may_stop: bool = False) -> Activity:
        """Follow handle_removed_pt: under mmu_lock held for read every entry is frozen, even absent ones.

        `may_stop` says that another thread may have changed the entry that points to the table.
        """
        role = self.child_role(root, table.level)
        yield Expect(
            "kvm_mmu_prepare_zap_page",
            {"role": role, "level": table.level, "gfn": table.gfn, "table": table.frame},
            may_stop=may_stop,
        )
        self.removed[table.frame] = (role, table.level, table.gfn)
        yield None
        for at in range(page_table.ENTRIES) if shared else sorted(table.entries):
            entry = table.entries.get(at)
            if not shared and entry is not None and not self.present(entry):
                continue
            change = self.change(root, table, at, self.frozen)
            if isinstance(entry, Table) and self.kernel.children_first:
                yield from self.remove_table(root, entry, shared)
            yield change
            table.entries.pop(at, None)
            yield None
            if isinstance(entry, Table) and not self.kernel.children_first:
                yield from self.remove_table(root, entry, shared)

    def zap_leafs(self, root: Root, start: int, end: int) -> Activity:
        """Follow tdp_mmu_zap_leafs: leaves in [start, end) are zapped, tables stay."""
        for table, at in list(page_table.within(root.top, start, end)):
            entry = table.entries.get(at)
            if isinstance(entry, int) and self.present(entry):
                yield from self.zap_entry(root, table, at, shared=False)

    def zapped(self) -> Spte | None:
        """Return what the event shows as the new value if an entry is zapped under mmu_lock for read.

        None: an absent entry.
        """
        return self.frozen if self.kernel.zapped_as_frozen else None


def _tables(table: Table, level: int) -> Iterator[Table]:
    """Yield the tables of one level at or below `table`, in order of gfn."""
    if table.level == level:
        yield table
        return
    for at in sorted(table.entries):
        below = table.entries[at]
        if isinstance(below, Table):
            yield from _tables(below, level)
