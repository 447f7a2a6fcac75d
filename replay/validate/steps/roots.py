# SPDX-License-Identifier: Apache-2.0
"""The steps of a root's life: load, unload, put, invalidation (docs/kvm-mmu.md, "The life of a root, by policy")."""

from __future__ import annotations

from replay.simulate.model_state import CURRENT, Root, Vcpu
from replay.simulate.page_table import Table
from replay.validate.expect import Activity, Expect, Spte
from replay.validate.row_tuples import RowTuple
from replay.validate.steps.vm_state import RootWalk
from replay.validate.steps.zap_steps import Zaps


class Roots(Zaps):
    """Who holds a root, and what happens when its last reference is dropped."""

    def load(self, vcpu: Vcpu) -> Activity:
        """Follow kvm_mmu_load: take the valid root with the vCPU's role word, or build one."""
        word = self.word_of(vcpu)
        root = None
        for other in self.held(only_valid=True):
            if self.words[other.word] == word:
                root = other
                break
            if self.kernel.search_puts:
                yield from self.put(other)
            else:
                other.refs -= 1
        if root is None and self.kernel.search_puts:
            root = self.valid(word)  # from 6.9 on there is a second search: another vCPU may have built it meanwhile
        if root is not None:
            root.refs += 1  # the slot's reference
        role: int | Spte = self.role_of(vcpu, word)
        self.role_words_taken += not word
        if root is None and self.kernel.root_get_page:
            row = yield Expect("kvm_mmu_get_page", {"gfn": 0, "flags": 1, "role": role}, agrees=top_level)
            assert row is not None
            root = self.new_root(vcpu, row.role, row.root, row.table)
            role = row.role
            yield None
        want = {"role": role} if root is None else {"role": role, "root": self.name(root), "refs": self.refs_seen(root)}
        row = yield Expect("root_get", want, agrees=lambda got: self.may_have(got.refs, root, got.role))
        assert row is not None
        if root is None and not word:
            root = self.valid(row.role)
            if root is not None:
                root.refs += 1
                self.guest[vcpu.index] = row.role & self.guest_bits
        root = root or self.new_root(vcpu, row.role, row.root, 0)
        vcpu.slots[CURRENT] = root
        yield None
        yield Expect("mmu_load", {"root": self.name(root), "role": self.words[root.word], "ret": 0})
        yield None

    def may_have(self, refs: int, root: Root | None, role: int) -> bool:
        """Return whether a root that is loaded may show this many references."""
        return 0 <= refs - self.refs_after(root, role) <= self.may_be_held

    def refs_after(self, root: Root | None, role: int) -> int:
        """Return the references after a load which found `root`, or else the root with this role word."""
        if root is not None:
            return root.refs
        found = self.valid(role)
        return self.first_refs if found is None else found.refs + 1

    @property
    def first_refs(self) -> int:
        """The references on a root that was just built: that of the slot, and the VM's own if the policy has one."""
        return 1 + self.parameters.own_reference

    def role_of(self, vcpu: Vcpu, word: int) -> int | Spte:
        """Return the role word that a load must show, as far as it is known."""
        if word or self.base is None:
            return word or Spte("a role word", lambda got: True)
        known = self.base | (self.smm_bit if vcpu.index in self.smm else 0)
        return Spte(f"{known:#x} with any guest bits", lambda got: got & ~self.guest_bits == known)

    def new_root(self, vcpu: Vcpu, word: int, name: int, frame: int) -> Root:
        """Add a root that the kernel has just built."""
        if vcpu.index not in self.guest and vcpu.index not in self.smm:
            self.guest[vcpu.index] = word & self.guest_bits
        if self.base is None:
            self.base = word & ~self.smm_bit & ~self.guest_bits & ~self.guest_mode_bit
        if word not in self.words.values():
            self.words[len(self.words)] = word
        index = next(i for i, w in self.words.items() if w == word)
        root = Root(self._ids, index, Table(word & 15, 0, frame), self.first_refs)
        self._ids += 1
        self.roots.insert(0, root)
        self.recorded[name] = root
        self.names[root.id] = name
        self.frames[root.id] = frame
        return root

    def switch(self, vcpu: Vcpu, role: int) -> None:
        """Follow kvm_mmu_new_pgd: a nested guest without nested paging is entered or left, and its root becomes
        current.

        If no previous root fits, the current slot is emptied, which shows as a separate free of roots.
        """
        (self.nested.add if role & self.guest_mode_bit else self.nested.discard)(vcpu.index)
        slots = vcpu.slots

        def usable(root: Root | None) -> bool:
            return root is not None and root.valid and self.words[root.word] == role

        if slots[CURRENT] is None and not self.kernel.old_shadow_mmu:
            at = next((i for i in range(1, len(slots)) if usable(slots[i])), 0)
            if at:
                slots[:] = [slots[at], *slots[1:at], *slots[at + 1 :], None]
            return
        for i in range(1, len(slots)):
            if usable(slots[CURRENT]):
                return
            slots[CURRENT], slots[i] = slots[i], slots[CURRENT]

    def free_slots(self, vcpu: Vcpu, mask: int) -> Activity:
        """Follow kvm_mmu_free_roots: put the previous slots in order, then the current one."""
        for i in (1, 2, 3, CURRENT):
            root = vcpu.slots[i]
            if root is not None and mask >> i & 1:
                vcpu.slots[i] = None
                yield from self.put(root)

    def put(self, root: Root, walk: RootWalk | None = None) -> Activity:
        """Drop one reference; the policy decides what happens with the last.

        `walk` is the walk whose visit ends with this put.
        """
        want = {"root": self.name(root), "role": self.role(root), "refs": self.refs_seen(root)}
        row = yield Expect("root_put", want)
        assert row is not None
        self.frames[root.id] = row.table
        if walk is not None:
            walk.between = walk.more or root is not self.roots[-1]
        root.refs -= 1
        if root.refs == 0:
            if root.valid and self.parameters.teardown == "worker":
                root.valid = False
                root.refs = 1
                self.queued.append(root)
            elif root.valid and self.parameters.teardown == "inline":
                yield None
                if self.kernel.passes:
                    yield from self.zap_marked(root)
                else:
                    self.roots.remove(root)
                    yield from self.zap_inline(root)
                return
            else:
                self.gone(root)
        yield None

    def zap_marked(self, root: Root) -> Activity:
        """Free a root inline with the code of 5.18 or later: mark it invalid, zap it pass by pass, then remove it."""
        root.valid = False
        root.refs = 1
        yield from self.zap_root(root, shared=False)
        root.refs = 0
        self.gone(root)

    def gone(self, root: Root) -> None:
        """Take the root off the list; its page is freed after a grace period."""
        self.roots.remove(root)
        self.removed[self.frames[root.id]] = (self.role(root), root.top.level, 0)

    def zap_inline(self, root: Root) -> Activity:
        """Follow kvm_tdp_mmu_free_root: the thread that drops the last reference zaps the tree and frees the page."""
        yield Expect("zap_root_begin", {"root": self.name(root), "role": self.words[root.word]})
        root.top.entries.clear()
        yield None
        freed = {"root": self.name(root), "role": 0, "level": 0, "gfn": 0}  # the struct kvm_mmu_page is gone already
        yield Expect("table_free", {**freed, "table": self.frames[root.id]})
        yield None
        yield Expect("zap_root_end")
        yield None

    def invalidate(self) -> Activity | None:
        """Mark every valid root invalid, or empty it (5.10)."""
        self.sequence += 1
        for root in self.roots:
            if self.parameters.zap_all_fast == "empty":
                root.top.entries.clear()
            elif root.valid:
                root.valid = False
                root.refs += not self.parameters.own_reference
                if self.parameters.teardown == "worker":
                    self.queued.append(root)
                else:
                    self.scheduled.add(root.id)
        return None

    def worker(self, root: Root) -> Activity:
        """Follow tdp_mmu_zap_root_work: zap one queued root, and put the reference that it was queued with."""
        self.queued.remove(root)
        yield from self.zap_root(root, shared=True)
        yield from self.put(root)

    def zap_invalidated(self) -> Activity:
        """Follow kvm_tdp_mmu_zap_invalidated_roots: visit the roots newest first, each with a reference meanwhile."""
        shared = not (self.destroyed and self.kernel.ends_exclusively)
        for root in self.held():
            if root.id in self.scheduled:
                self.scheduled.discard(root.id)
                yield from self.zap_root(root, shared)
                yield from self.put(root)
            yield from self.put(root)

    def zap_all(self) -> Activity:
        """Follow kvm_tdp_mmu_zap_all: empty every root under mmu_lock held for write; none is invalidated."""
        self.sequence += 1
        for root in self.held():
            if self.kernel.spte_changed:
                yield from self.zap_root(root, shared=False)
                yield from self.put(root)
            else:
                root.refs -= 1
                root.top.entries.clear()


def top_level(row: RowTuple) -> bool:
    """Return whether the row's level is that in its role word, as it must be for a root."""
    return row.level == row.role & 15
