# SPDX-License-Identifier: Apache-2.0
"""The reference model of a VM's roots, in plain Python that can be read side by side with the kernel's source.

It follows docs/kvm-mmu.md ("Root slots of a vCPU", "The life of a root, by policy"). `engine` does the same at speed
and must agree bit for bit; user policies run in this model (`policy_api`). Differences between kernel versions are in
`parameters`, so no version is mentioned in this file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from replay.simulate import page_table
from replay.simulate.operations import Cause, Word
from replay.simulate.page_table import Table
from traces.kernels.policies import PolicyParameters

CURRENT = 0
SLOTS = 4  # one current root, three previous ones


class Happened(IntEnum):
    """The kinds of event in the root log."""

    CREATED = 0
    FOUND = 1
    FREED = 2
    INVALIDATED = 3
    EMPTIED = 4


@dataclass(eq=False)
class Root:
    """A top-level table: `refs` is the kernel's reference count, `valid` is True until the root is invalidated."""

    id: int
    word: int  # index into the VM's words
    top: Table
    refs: int
    valid: bool = True
    leaves: int = 0
    tables: int = 0
    cause: Cause = Cause.OTHER  # why the root was invalidated, once it was
    remembered: bool = False  # under `assume_refault`: the root was freed, and its tree kept to know what was mapped
    idle_since: int = 0  # when the last reference was dropped, in ns; for policies
    linked: set[Table] = field(default_factory=set)  # every table below `top`: what the kernel counts (tdp_mmu_pages)
    stale: int = 0  # removed leaves that a vCPU's TLB may still hold: a flush is due before mmu_lock is dropped


@dataclass
class Vcpu:
    """A vCPU with its root slots, its role word and its counts.

    `request` says that an invalidation is yet to be served.
    """

    index: int
    slots: list[Root | None] = field(default_factory=lambda: [None] * SLOTS)
    word: int = 0
    cause: Cause = Cause.FIRST  # why it unloaded last
    request: bool = False
    stuck: int = -1  # the operation at which the vCPU can make no more progress; -1: none
    loads: int = 0
    creations: int = 0
    reuses: int = 0
    faults: int = 0
    refaults: int = 0
    hits: int = 0
    fixes: int = 0


@dataclass
class Counters:
    """The counts of a VM that are not kept by vCPU.

    `zapped` counts leaf SPTEs. `tables` and `tables_freed` do not include roots. `flushes` includes the flush of each
    load, but not the flush of the single range that a fault replaces.
    """

    frees: int = 0
    prefetched: int = 0
    tables: int = 0
    tables_freed: int = 0
    zapped: int = 0
    flushes: int = 0


@dataclass(frozen=True)
class Logged:
    """One event in a root's life as the log keeps it; `leaves` and `tables` are those of the root at that moment."""

    at: int  # position of the operation in the stream
    event: Happened
    vcpu: int  # dense number; -1: no vCPU acted
    root: int
    word: int
    cause: Cause
    leaves: int
    tables: int
    roots_alive: int
    tables_alive: int


class Violation(Exception):
    """An invariant is broken, so the trace, the model or a user's own policy is wrong.

    The invariants are about references (docs/kvm-mmu.md, "Invariants"), about tables (each is linked once, and unlinked
    once before its root is freed) and about TLBs (what is removed from a root that a vCPU holds is flushed before
    mmu_lock is dropped). `at` is the operation's position, and `root` the id of the root concerned (None: it concerns
    the VM).
    """

    def __init__(self, what: str, at: int, root: int | None = None) -> None:
        super().__init__(what)
        self.at = at
        self.root = root


class PolicyHooks(Protocol):
    """What the model asks of a root policy; `policy_api.Policy` says what each hook may do."""

    def on_load(self, vm: Vm, word: int) -> Root | None: ...

    def on_put_to_zero(self, vm: Vm, root: Root, cause: Cause, vcpu: Vcpu) -> None: ...

    def on_unload(self, vm: Vm, vcpu: Vcpu) -> None: ...

    def on_invalidate(self, vm: Vm) -> None: ...

    def on_vm_end(self, vm: Vm) -> None: ...


class Vm:
    """One VM under one policy. Each operation of `operations.Op` is a method of the same name."""

    def __init__(self, parameters: PolicyParameters, words: list[Word], vcpus: int, policy: PolicyHooks) -> None:
        self.parameters = parameters
        self.words = words
        self.vcpus = [Vcpu(i) for i in range(vcpus)]
        self.policy = policy
        self.roots: list[Root] = []  # alive: valid ones, and invalid ones that a slot still holds
        self.ever: set[tuple[int, int, int]] = set()  # each (word, level, gfn) that was mapped at some time
        self.remembered_trees: dict[int, Root] = {}  # under `assume_refault`, by word: the tree of a freed root
        self.counters = Counters()
        self.log: list[Logged] = []
        self.at = 0
        self.now = 0
        self._ids = 0

    # Operations of a vCPU

    def enter(self, vcpu: Vcpu) -> None:
        """Follow kvm_mmu_reload: serve a pending request, then load a root if the current slot is empty."""
        if vcpu.request:
            vcpu.request = False
            if self.parameters.request == "reload":
                self._empty(vcpu, Cause.MEMSLOT)
            else:
                self._empty(vcpu, Cause.MEMSLOT, only_invalid=True)
        if vcpu.slots[CURRENT] is None:
            self._load(vcpu)

    def unload(self, vcpu: Vcpu, cause: Cause) -> None:
        """Follow kvm_mmu_unload: put the reference of every slot, those of the previous roots first."""
        vcpu.request = False
        self._empty(vcpu, cause)
        self.policy.on_unload(self, vcpu)

    def role(self, vcpu: Vcpu, word: int) -> None:
        """Change the vCPU's role word; its current root stays in use until it is unloaded."""
        vcpu.word = word

    def switch(self, vcpu: Vcpu, word: int) -> None:
        """Follow fast_pgd_switch: take a fitting root from the previous slots, searching from the latest to the oldest.

        The current root moves to the previous slots; if none fits, the oldest root falls out and its reference is put.
        """
        vcpu.word = word
        slots = vcpu.slots
        current = slots[CURRENT]
        if current is not None and current.valid and current.word == word:
            return
        if current is None:
            for i in range(1, SLOTS):
                root = slots[i]
                if root is not None and root.valid and root.word == word:
                    slots[:] = [root, *slots[1:i], *slots[i + 1 :], None]
                    return
            return
        for i in range(1, SLOTS):
            slots[CURRENT], slots[i] = slots[i], slots[CURRENT]
            root = slots[CURRENT]
            if root is not None and root.valid and root.word == word:
                return
        victim = slots[CURRENT]
        slots[CURRENT] = None
        if victim is not None:
            self._put(victim, Cause.OTHER, vcpu)

    def touch(self, vcpu: Vcpu, gfn: int, level: int, first: int = 0, last: int = 7, resets: bool = False) -> None:
        """Have the guest access `gfn`: a hit if a leaf of `level` or larger covers it, else a fault that installs one.

        `first` and `last` bound the entries that the shadow MMU may prefetch; `resets` says that the exit unloads the
        roots.
        """
        root = self._current(vcpu)
        if self._covered(root, gfn, level):
            vcpu.hits += 1
            return
        self._fault(vcpu, root, gfn, level, first, last)
        if resets:
            self._reset(vcpu, gfn, level)

    def fix(self, vcpu: Vcpu, gfn: int, level: int, resets: bool = False) -> None:
        """Serve a permission fault on a present leaf, such as one that dirty logging has write-protected."""
        root = self._current(vcpu)
        found = page_table.leaf(root.top, gfn)
        if found is not None and found[0].level > level and self.parameters.split_in_place:
            self._descend(root, gfn, level)
            vcpu.fixes += 1
        elif found is not None and found[0].level == level:
            vcpu.fixes += 1
        else:
            self._fault(vcpu, root, gfn, level, gfn & 7, gfn & 7)
        if resets:
            self._reset(vcpu, gfn, level)

    # Operations on the whole VM

    def invalidate(self) -> None:
        """Follow kvm_mmu_zap_all_fast: every root becomes obsolete, and every vCPU is asked to give up its root."""
        self.remembered_trees.clear()
        flush = False
        for root in [r for r in self.roots if r.valid]:
            flush = True
            if self.parameters.zap_all_fast == "empty":
                self._zap_tree(root)
                self._note(Happened.EMPTIED, root, Cause.MEMSLOT)
            else:
                self.invalidate_root(root, Cause.MEMSLOT)
        for vcpu in self.vcpus:
            vcpu.request = True
        self._unlock(flush)
        self.policy.on_invalidate(self)

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

    def end(self) -> None:
        """Follow kvm_arch_destroy_vm: every vCPU unloads, then every root goes.

        Raises Violation if anything is left.
        """
        self.remembered_trees.clear()
        for vcpu in self.vcpus:
            vcpu.request = False
            self._empty(vcpu, Cause.VM_END)
        for root in [r for r in self.roots if r.valid]:
            self.invalidate_root(root, Cause.VM_END)
        self.policy.on_vm_end(self)
        if self.roots or self.tables_alive:
            first = self.roots[0].id
            left = f"{len(self.roots)} roots and {self.tables_alive} tables are left, root {first} among them"
            raise Violation(f"VM end: {left}", self.at, first)

    # For policies

    @property
    def tables_alive(self) -> int:
        """The number of tables of all roots, without the roots themselves."""
        return sum(root.tables for root in self.roots)

    def find(self, word: int) -> Root | None:
        """Return the valid root with exactly this role word, of which there is at most one, or None."""
        return next((r for r in self.roots if r.valid and r.word == word), None)

    def invalidate_root(self, root: Root, cause: Cause) -> None:
        """Mark a root invalid, zap it and drop the VM's own reference on it, if it has one.

        Without references it is freed.
        """
        root.valid = False
        root.cause = cause
        self._zap_tree(root)
        self._note(Happened.INVALIDATED, root, cause)
        if self.parameters.own_reference:
            root.refs -= 1
        if root.refs == 0:
            self._free(root, cause, None)

    def free(self, root: Root, cause: Cause, vcpu: Vcpu | None = None) -> None:
        """Zap and free a root that no slot holds. `vcpu` is the vCPU that dropped the last reference, if any.

        Raises Violation if the root still has references.
        """
        if root.refs:
            raise Violation(f"root {root.id} is freed with {root.refs} references", self.at, root.id)
        root.valid = False
        self._free(root, cause, vcpu)

    # References and slots

    def _current(self, vcpu: Vcpu) -> Root:
        root = vcpu.slots[CURRENT]
        if root is None or vcpu.request:
            self.enter(vcpu)
            root = vcpu.slots[CURRENT]
            assert root is not None
        return root

    def _load(self, vcpu: Vcpu) -> None:
        vcpu.loads += 1
        self.counters.flushes += 1
        root = self.policy.on_load(self, vcpu.word)
        if root is not None:
            if root not in self.roots:
                raise Violation(f"root {root.id} is loaded after it was freed", self.at, root.id)
            root.refs += 1
            vcpu.slots[CURRENT] = root
            vcpu.reuses += 1
            self._note(Happened.FOUND, root, vcpu.cause, vcpu)
            return
        word = self.words[vcpu.word]
        root = Root(self._ids, vcpu.word, Table(word.level, 0), 2 if self.parameters.own_reference else 1)
        self._ids += 1
        self.roots.append(root)
        vcpu.slots[CURRENT] = root
        vcpu.creations += 1
        remembered = self.remembered_trees.pop(vcpu.word, None)
        if remembered is not None:
            root.top, root.leaves, root.tables = remembered.top, remembered.leaves, remembered.tables
            root.linked = set(page_table.tables(root.top))
            vcpu.faults += root.leaves
            vcpu.refaults += root.leaves
            self.counters.tables += root.tables
        self._note(Happened.CREATED, root, vcpu.cause, vcpu)

    def _empty(self, vcpu: Vcpu, cause: Cause, only_invalid: bool = False) -> None:
        """Follow kvm_mmu_free_roots: put the roots in the previous slots, in order, then the current one."""
        for i in (1, 2, 3, CURRENT):
            root = vcpu.slots[i]
            if root is None or (only_invalid and root.valid):
                continue
            vcpu.slots[i] = None
            vcpu.cause = cause
            self._put(root, cause, vcpu)

    def _put(self, root: Root, cause: Cause, vcpu: Vcpu) -> None:
        root.refs -= 1
        if root.refs < 0:
            raise Violation(f"root {root.id} is put more often than it was taken", self.at, root.id)
        if root.refs:
            return
        if not root.valid:
            self._free(root, root.cause, vcpu)
        elif self.parameters.own_reference:
            raise Violation(f"final put of the valid root {root.id} (KVM_BUG_ON)", self.at, root.id)
        else:
            root.idle_since = self.now
            self.policy.on_put_to_zero(self, root, cause, vcpu)

    def _free(self, root: Root, cause: Cause, vcpu: Vcpu | None) -> None:
        if root not in self.roots:
            raise Violation(f"root {root.id} is freed twice", self.at, root.id)
        if self.parameters.assume_refault and (root.leaves or root.tables):
            # The tree is kept, because the recorded kernel still has it. For the counts of this policy it is zapped.
            remembered = Root(root.id, root.word, root.top, 0, True, root.leaves, root.tables, remembered=True)
            self.remembered_trees[root.word] = remembered
            self.counters.zapped += root.leaves
            self.counters.tables_freed += root.tables
            leaves, tables = root.leaves, root.tables
            self._unlink(root, page_table.tables(root.top))
            root.top, root.leaves, root.tables = Table(root.top.level, 0), 0, 0
        else:
            leaves, tables = self._zap_tree(root)
        if self.parameters.flush_per_table:
            self.counters.flushes += tables
        if root.linked:
            table = min(root.linked, key=lambda each: (each.level, each.gfn))
            left = f"{len(root.linked)} of its tables left, the first of level {table.level} at gfn {table.gfn:#x}"
            raise Violation(f"root {root.id} is freed with {left}", self.at, root.id)
        self.roots.remove(root)
        self.counters.frees += 1
        self._note(Happened.FREED, root, cause, vcpu, leaves, tables)

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

    # The trees

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

    def _reset(self, vcpu: Vcpu, gfn: int, level: int) -> None:
        """Unload the roots because the fault's own exit does so.

        A guest that gets a new root for it never passes the instruction.

        Under `assume_refault` the new root already has the leaf, but through faults that would each have reset as well.
        """
        built = vcpu.creations
        self.unload(vcpu, Cause.EXIT)
        self.enter(vcpu)
        root = vcpu.slots[CURRENT]
        assert root is not None
        if vcpu.creations > built or not self._covered(root, gfn, level):
            vcpu.stuck = self.at
