# SPDX-License-Identifier: Apache-2.0
"""The reference model of the trees below a VM's roots: faults, zaps and splits, and the flushes that these make due.

It follows docs/kvm-mmu.md as `reference` does, which has the roots themselves.
"""

from __future__ import annotations

from collections.abc import Iterable

from replay.simulate import page_table
from replay.simulate.model_state import Counters, Happened, Logged, Root, Vcpu, Violation
from replay.simulate.operations import Cause, Word
from replay.simulate.page_table import Table
from traces.kernels.policies import PolicyParameters


class VmTrees:
    """The roots of one VM and what is below them; `reference.Vm` says which vCPU holds which."""

    def __init__(self, parameters: PolicyParameters, words: list[Word], vcpus: int) -> None:
        self.parameters = parameters
        self.words = words
        self.vcpus = [Vcpu(i) for i in range(vcpus)]
        self.roots: list[Root] = []  # alive: valid ones, and invalid ones that a slot still holds
        self.ever: set[tuple[int, int, int]] = set()  # each (word, level, gfn) that was mapped at some time
        self.remembered_trees: dict[int, Root] = {}  # under `assume_refault`, by word: the tree of a freed root
        self.counters = Counters()
        self.log: list[Logged] = []
        self.at = 0
        self.now = 0

    # Operations on the trees of every root

    def zap(self, as_id: int, start: int, end: int) -> None:
        """Remove the leaves in [start, end) from every root of an address space, including invalid roots."""
        removed = 0
        for root in [*self.roots, *self.remembered_trees.values()]:
            if self.words[root.word].as_id == as_id:
                leaves, tables = self._zap_range(root, start, end)
                if not root.remembered:
                    removed += leaves
                    self.counters.zapped += leaves
                    self.counters.tables_freed += tables
        self._unlock(removed > 0)

    def zap_all(self) -> None:
        """Follow kvm_mmu_zap_all: every root is emptied and stays alive."""
        self.remembered_trees.clear()
        removed = 0
        for root in self.roots:
            removed += root.leaves
            if root.tables or root.leaves:
                self._zap_tree(root)
                self._note(Happened.EMPTIED, root, Cause.VM_END)
        self._unlock(removed > 0)

    def split(self, as_id: int, start: int, end: int) -> None:
        """Turn huge leaves inside [start, end) into tables of 4 KiB leaves,
        in every valid root of the address space.
        """
        for root in [*self.roots, *self.remembered_trees.values()]:
            if not root.valid or self.words[root.word].as_id != as_id:
                continue
            before = root.tables
            for table, at in page_table.within(root.top, start, end):
                if table.level > 1 and isinstance(table.entries[at], int) and self._inside(table, at, start, end):
                    self._split(root, table, at, 1)
            if not root.remembered:
                self.counters.tables += root.tables - before

    def collapse(self, as_id: int, level: int, gfn: int, for_good: bool = False) -> None:
        """Remove the table below the entry of `level` that covers `gfn` from every valid root of the address space.

        On kernels that recover huge pages in place (`parameters.recovers`), a huge leaf replaces it unless `for_good`.
        """
        removed = 0
        for root in [*self.roots, *self.remembered_trees.values()]:
            if not root.valid or self.words[root.word].as_id != as_id:
                continue
            table = page_table.walk(root.top, gfn, level)
            at = page_table.index(gfn, table.level)
            if table.level == level and isinstance(table.entries.get(at), Table):
                leaves, tables = self._remove(root, table, at)
                if self.parameters.recovers and not for_good:
                    self._install(root, table, at)
                if not root.remembered:
                    removed += 1
                    self.counters.zapped += leaves
                    self.counters.tables_freed += tables
        self._unlock(removed > 0)

    # What is there, and what the log says of it

    @property
    def tables_alive(self) -> int:
        """The number of tables of all roots, without the roots themselves."""
        return sum(root.tables for root in self.roots)

    def _note(
        self,
        event: Happened,
        root: Root,
        cause: Cause,
        vcpu: Vcpu | None = None,
        leaves: int | None = None,
        tables: int | None = None,
    ) -> None:
        self.log.append(
            Logged(
                self.at,
                event,
                -1 if vcpu is None else vcpu.index,
                root.id,
                root.word,
                cause,
                root.leaves if leaves is None else leaves,
                root.tables if tables is None else tables,
                len(self.roots),
                self.tables_alive,
            )
        )

    # One tree

    def _covered(self, root: Root, gfn: int, level: int) -> bool:
        found = page_table.leaf(root.top, gfn)
        return found is not None and found[0].level >= level

    def _fault(self, vcpu: Vcpu, root: Root, gfn: int, level: int, first: int, last: int) -> None:
        """Follow kvm_tdp_mmu_map: build missing tables on the way down, then
        install the leaf, and prefetch neighbours if enabled.
        """
        vcpu.faults += 1
        table = self._descend(root, gfn, level)
        at = page_table.index(gfn, level)
        if isinstance(table.entries.get(at), Table):
            leaves, tables = self._remove(root, table, at)
            self.counters.zapped += leaves
            self.counters.tables_freed += tables
            self._flush(root)
        vcpu.refaults += (root.word, level, table.gfn_of(at)) in self.ever
        self._install(root, table, at)
        if level == 1 and self.parameters.prefetch > 1:
            base = at & -self.parameters.prefetch
            for near in range(base + first, base + last + 1):
                if near not in table.entries:
                    self._install(root, table, near)
                    self.counters.prefetched += 1

    def _descend(self, root: Root, gfn: int, level: int) -> Table:
        table = root.top
        while table.level > level:
            at = page_table.index(gfn, table.level)
            below = table.entries.get(at)
            if isinstance(below, Table):
                table = below
                continue
            if below is not None and self.parameters.split_in_place:
                tables = root.tables
                self._split(root, table, at, table.level - 1)
                self.counters.tables += root.tables - tables
            else:
                if below is not None:
                    self._remove(root, table, at)
                    self.counters.zapped += 1
                    self._flush(root)
                self._link(root, table, at, Table(table.level - 1, table.gfn_of(at)))
                self.counters.tables += 1
        return table

    def _install(self, root: Root, table: Table, at: int) -> None:
        root.leaves += at not in table.entries
        table.entries[at] = 1
        self.ever.add((root.word, table.level, table.gfn_of(at)))

    def _split(self, root: Root, table: Table, at: int, down_to: int) -> None:
        """Replace a huge leaf by a full table of smaller leaves, and these again, down to tables of level `down_to`."""
        child = Table(table.level - 1, table.gfn_of(at))
        self._link(root, table, at, child)
        root.leaves -= 1
        for i in range(page_table.ENTRIES):
            self._install(root, child, i)
        if child.level > down_to:
            for i in range(page_table.ENTRIES):
                self._split(root, child, i, down_to)

    def _inside(self, table: Table, at: int, start: int, end: int) -> bool:
        gfn = table.gfn_of(at)
        return start <= gfn and gfn + page_table.span(table.level) <= end

    def _remove(self, root: Root, table: Table, at: int) -> tuple[int, int]:
        """Remove one entry and everything below it, and return the numbers of (leaves, tables) removed."""
        entry = table.entries.pop(at)
        leaves, tables = 1, 0
        if isinstance(entry, Table):
            leaves, tables = page_table.count(entry)
            tables += 1
            self._unlink(root, [entry, *page_table.tables(entry)])
        root.leaves -= leaves
        root.tables -= tables
        self._expose(root, leaves)
        return leaves, tables

    def _zap_range(self, root: Root, start: int, end: int) -> tuple[int, int]:
        leaves = tables = 0
        for table, at in page_table.within(root.top, start, end):
            whole = self.parameters.zap_tables and self._inside(table, at, start, end)
            if whole or isinstance(table.entries[at], int):
                gone = self._remove(root, table, at)
                leaves += gone[0]
                tables += gone[1]
        return leaves, tables

    def _zap_tree(self, root: Root) -> tuple[int, int]:
        leaves, tables = root.leaves, root.tables
        self.counters.zapped += leaves
        self.counters.tables_freed += tables
        self._unlink(root, page_table.tables(root.top))
        self._expose(root, leaves)
        root.top.entries.clear()
        root.leaves = root.tables = 0
        return leaves, tables

    # Accounting of tables, and of flushes that are due

    def _link(self, root: Root, table: Table, at: int, child: Table) -> None:
        """Follow tdp_mmu_link_sp: link a table, which is accounted from now on."""
        table.entries[at] = child
        root.tables += 1
        if not root.remembered:
            root.linked.add(child)

    def _unlink(self, root: Root, gone: Iterable[Table]) -> None:
        """Follow tdp_mmu_unlink_sp for each removed table. Raises Violation if a table was unlinked before."""
        if root.remembered:
            return
        for table in gone:
            if table not in root.linked:
                which = f"the table of level {table.level} at gfn {table.gfn:#x}"
                raise Violation(f"{which} of root {root.id} is freed twice", self.at, root.id)
            root.linked.remove(table)

    def _expose(self, root: Root, leaves: int) -> None:
        """Note that leaves were removed which the TLB of a vCPU that holds the root may still have.

        Others flush at their load.
        """
        if any(root in vcpu.slots for vcpu in self.vcpus):
            root.stale += leaves

    def _flush(self, root: Root) -> None:
        """Note that remote TLBs were flushed of what was removed from this root."""
        root.stale = 0

    def _unlock(self, flush: bool) -> None:
        """Drop mmu_lock, after a flush if `flush`.

        Raises Violation if a root has removed leaves that were not flushed.
        """
        self.counters.flushes += flush
        for root in self.roots:
            if flush:
                self._flush(root)
            if root.stale:
                what = f"{root.stale} leaves of root {root.id} are removed without a flush"
                raise Violation(f"{what}: a vCPU that has it loaded still reaches the pages", self.at, root.id)
