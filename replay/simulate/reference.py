# SPDX-License-Identifier: Apache-2.0
"""The reference model of a VM's roots, in plain Python that can be read side by side with the kernel's source.

It follows docs/kvm-mmu.md ("Root slots of a vCPU", "The life of a root, by policy"). What is below a root is in
`reference_trees`, what both change in `model_state`. `engine` does the same at speed and must agree bit for bit; user
policies run in this model (`policy_api`). Differences between kernel versions are in `parameters`, so no version is
mentioned in these files.
"""

from __future__ import annotations

from typing import Protocol

from replay.simulate import page_table
from replay.simulate.model_state import CURRENT, SLOTS, Happened, Violation
from replay.simulate.model_state import Root as Root  # users' own policies take it from here (docs/policy.md)
from replay.simulate.model_state import Vcpu as Vcpu
from replay.simulate.operations import Cause, Word
from replay.simulate.page_table import Table
from replay.simulate.reference_trees import VmTrees
from traces.kernels.policies import PolicyParameters


class PolicyHooks(Protocol):
    """What the model asks of a root policy; `policy_api.Policy` says what each hook may do."""

    def on_load(self, vm: Vm, word: int) -> Root | None: ...

    def on_put_to_zero(self, vm: Vm, root: Root, cause: Cause, vcpu: Vcpu) -> None: ...

    def on_unload(self, vm: Vm, vcpu: Vcpu) -> None: ...

    def on_invalidate(self, vm: Vm) -> None: ...

    def on_vm_end(self, vm: Vm) -> None: ...


class Vm(VmTrees):
    """One VM under one policy. Each operation of `operations.Op` is a method of the same name, here or in `VmTrees`."""

    def __init__(self, parameters: PolicyParameters, words: list[Word], vcpus: int, policy: PolicyHooks) -> None:
        super().__init__(parameters, words, vcpus)
        self.policy = policy
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
