# SPDX-License-Identifier: Apache-2.0
"""Which VM and which root each record is about: small ids that stay unique over the whole recording.

State is carried from batch to batch; within a batch everything is arrays. The rules (SPEC.md, "Identity"):

- A VM is one life of a `struct kvm` pointer. A life is in the snapshot, or starts at a `vm_create` row, or at the
  first row with a pointer never seen. Rows after `vm_destroy` still belong to the life that ended, because tables are
  freed by RCU after it.
- A row without a VM pointer belongs to the VM that used the row's root last; failing that, to the only VM alive in the
  row's process; otherwise its VM is unknown. A table being removed is its getter's, whatever VM its thread served last.
- A root is one life of a (VM, root frame). It starts where `kvm_mmu_get_page` created it or at its first use, and ends
  with its `table_free`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from traces.lives import Ints, dense, fill_forward, first_rows, follow
from traces.record import Columns
from traces.schema import BY_NAME, KINDS

GAP: Final = BY_NAME["gap"].code
LEFT_OUT: Final = BY_NAME["left_out"].code
GET_PAGE: Final = BY_NAME["kvm_mmu_get_page"].code
PREPARE_ZAP: Final = BY_NAME["kvm_mmu_prepare_zap_page"].code
TABLE_FREE: Final = BY_NAME["table_free"].code
PAGE_KINDS: Final = tuple(kind.code for kind in KINDS if kind.words == ("gfn", "table"))
VM_CREATE: Final = BY_NAME["vm_create"].code
VM_DESTROY: Final = BY_NAME["vm_destroy"].code
_INT64: Final = (1 << 63) - 1
CREATED: Final = 1  # bit 0 of kvm_mmu_get_page's flags


@dataclass
class VmIdentity:
    """One VM. `since` (ns) is None where it existed at the start, `until` where its destruction was not recorded."""

    id: int
    pointer: int
    tgid: int = 0  # 0: not known
    since: int | None = None
    until: int | None = None
    origin: str = "snapshot"  # or "created", "first use"


@dataclass(frozen=True)
class RootIdentity:
    """A root whose creation was not recorded: found by the snapshot (`first_seq` None), or by its first use."""

    id: int
    vm: int  # 0: not known
    table: int
    role: int
    first_seq: int | None


class _Change(NamedTuple):
    """From `row` of a batch on, `after` is the only VM of process `tgid`, before it `before` (0: none or several)."""

    row: int
    tgid: int
    before: int
    after: int


class Identities:
    """Gives every record its VM id and root id (0: unknown or none), batch after batch in ring order."""

    def __init__(self, alive: Iterable[Mapping[str, Any]]) -> None:
        """`alive` are the VMs at the start: each with its `kvm` pointer, its `tgid`, and `roots` (`table`, `role`)."""
        self.vms: list[VmIdentity] = []
        self.root_count = 0
        self.uncreated: list[RootIdentity] = []
        self._by_pointer: dict[int, VmIdentity] = {}
        self._of_process: dict[int, set[int]] = {}
        self._root_of: dict[tuple[int, int], int] = {}
        self._user_of: dict[int, int] = {}
        for vm in alive:
            self._start_vm(VmIdentity(len(self.vms) + 1, int(vm["kvm"]), int(vm["tgid"])))
            for root in vm.get("roots", ()):
                self.root_count += 1
                owner, table = len(self.vms), int(root["table"])
                self.uncreated.append(RootIdentity(self.root_count, owner, table, int(root["role"]), None))
                self._root_of[owner, table] = self.root_count
                self._user_of[table] = owner

    def resolve(self, columns: Columns, first_seq: int) -> tuple[Ints, Ints]:
        """Return (VM ids, root ids) of one batch, whose first row has number `first_seq`."""
        vm, changes = self._by_pointer_life(columns)
        self._by_table_user(columns, vm)
        self._by_process(columns, vm, changes)
        vm[columns["kind"] == GAP] = 0  # what was lost may have been any VM's
        return vm, self._roots(columns, vm, first_seq)

    def _by_pointer_life(self, columns: Columns) -> tuple[Ints, list[_Change]]:
        kind, pointers, tgids, times = (columns[name] for name in ("kind", "kvm", "tgid", "time"))
        on_vcpu = columns["vcpu"] >= 0
        born = (kind == VM_CREATE) & (pointers != 0)
        codes, values = dense(pointers)
        known = [self._by_pointer.get(int(value)) for value in values]
        current = np.array([vm.id if vm else 0 for vm in known], np.int64)
        current[values == 0] = -1  # no life begins at a null pointer
        lives = follow(codes, current, born, np.zeros(len(kind), np.bool_), len(self.vms) + 1)
        ids = np.maximum(lives.ids, 0)

        # The few rows that change which VM a process has, in order. Of one row's changes, a VM's birth comes first,
        # then that its process is known, then its death.
        strangers = [vm.id for vm in known if vm and not vm.tgid] + ids[lives.began[~born[lives.began]]].tolist()
        met = np.flatnonzero(on_vcpu & np.isin(ids, strangers)) if strangers else lives.began[:0]
        met = met[np.unique(ids[met], return_index=True)[1]]
        dead = np.flatnonzero((kind == VM_DESTROY) & (ids > 0))
        changes: list[_Change] = []
        events = [(int(row), what) for what, rows in enumerate((lives.began, met, dead)) for row in rows]
        for row, what in sorted(events):
            time, tgid = int(times[row]), int(tgids[row])
            if what == 0:
                pointer = int(pointers[row])
                if pointer in self._by_pointer:  # its destruction was not seen
                    changes.append(self._end_vm(self._by_pointer[pointer], time, row))
                vm = VmIdentity(len(self.vms) + 1, pointer)
                if born[row]:
                    vm.tgid, vm.since, vm.origin = tgid, time, "created"
                else:
                    vm.origin = "first use"
                changes.append(self._start_vm(vm, row))
            elif what == 1:
                vm = self.vms[int(ids[row]) - 1]
                vm.tgid = tgid
                changes.append(self._start_vm(vm, row))
            else:
                changes.append(self._end_vm(self.vms[int(ids[row]) - 1], time, row + 1))
        return ids, changes

    def _by_table_user(self, columns: Columns, vm: Ints) -> None:
        """Fill in the VM of rows that have a table or root but no pointer; remember who uses which frame.

        Tables are freed by RCU callbacks, which know no VM, and removed by threads of which only the VM they served
        last is known, which in a process with several VMs may be another. A table therefore belongs to the VM that got
        its page last.
        """
        frame = np.where(np.isin(columns["kind"], PAGE_KINDS), columns["w1"], columns["root"])
        rows = np.flatnonzero((frame != 0) & (columns["kind"] != GAP))
        if not len(rows):
            return
        codes, frames = dense(frame[rows])
        user = vm[rows]
        user[columns["kind"][rows] == PREPARE_ZAP] = 0
        if not user.all():
            order = np.argsort(codes, kind="stable")
            grouped, user = codes[order], user[order]
            first = np.append(True, grouped[1:] != grouped[:-1])
            before = np.array([self._user_of.get(int(frame), 0) for frame in frames], np.int64)
            user = np.where((user == 0) & first, before[grouped], user)
            user = fill_forward(user, (user != 0) | first)
            user = np.where(user != 0, user, vm[rows[order]])
            vm[rows[order]] = user
            user = vm[rows]
        last = np.zeros(len(frames), np.int64)
        last[codes] = user
        self._user_of.update(zip(frames.tolist(), last.tolist(), strict=True))

    def _by_process(self, columns: Columns, vm: Ints, changes: list[_Change]) -> None:
        """Fill in the VM of rows of which only the process is known, where it has exactly one VM alive."""
        rows = np.flatnonzero(vm == 0)
        if not len(rows):
            return
        codes, processes = dense(columns["tgid"][rows])
        found = np.array([self._only_vm(int(tgid)) for tgid in processes], np.int64)[codes]
        changed: dict[int, list[_Change]] = {}
        for change in changes:
            changed.setdefault(change.tgid, []).append(change)
        if changed:
            order = np.argsort(codes, kind="stable")
            bounds = np.searchsorted(codes[order], np.arange(len(processes) + 1))
            for code, tgid in enumerate(processes.tolist()):
                steps = changed.get(tgid)
                if steps:
                    mine = order[bounds[code] : bounds[code + 1]]
                    owners = np.array([steps[0].before] + [step.after for step in steps], np.int64)
                    found[mine] = owners[np.searchsorted([step.row for step in steps], rows[mine], side="right")]
        vm[rows] = found

    def _roots(self, columns: Columns, vm: Ints, first_seq: int) -> Ints:
        roots = np.zeros(len(vm), np.int64)
        rows = np.flatnonzero((columns["root"] != 0) & (columns["kind"] != GAP))
        if not len(rows):
            return roots
        kind, frame, flags, table = (columns[name][rows] for name in ("kind", "root", "flags", "w1"))
        born = (kind == GET_PAGE) & ((flags & CREATED) != 0) & (frame == table)
        dying = (kind == TABLE_FREE) & (frame == table)
        frames, _ = dense(frame)
        codes, _ = dense(frames * (len(self.vms) + 1) + vm[rows])
        firsts = rows[first_rows(codes, int(codes.max()) + 1)]
        keys = list(zip(vm[firsts].tolist(), columns["root"][firsts].tolist(), strict=True))
        current = np.array([self._root_of.get(key, 0) for key in keys], np.int64)
        lives = follow(codes, current, born, dying, self.root_count + 1)
        self.root_count += len(lives.began)
        self._root_of.update(zip(keys, lives.current.tolist(), strict=True))
        for row in lives.began[~born[lives.began]]:
            at = int(rows[row])
            place = (int(vm[at]), int(columns["root"][at]) & _INT64, int(columns["role"][at]))
            self.uncreated.append(RootIdentity(int(lives.ids[row]), *place, first_seq + at))
        roots[rows] = lives.ids
        return roots

    def _only_vm(self, tgid: int) -> int:
        alive = self._of_process.get(tgid, ())
        return next(iter(alive)) if len(alive) == 1 else 0

    def _start_vm(self, vm: VmIdentity, row: int = 0) -> _Change:
        """Enter a VM, or enter it again now that its process is known."""
        if vm.id > len(self.vms):
            self.vms.append(vm)
        self._by_pointer[vm.pointer] = vm
        before = self._only_vm(vm.tgid)
        if vm.tgid:
            self._of_process.setdefault(vm.tgid, set()).add(vm.id)
        return _Change(row, vm.tgid, before, self._only_vm(vm.tgid))

    def _end_vm(self, vm: VmIdentity, time: int, row: int) -> _Change:
        before = self._only_vm(vm.tgid)
        if vm.until is None:
            vm.until = time
        self._of_process.get(vm.tgid, set()).discard(vm.id)
        return _Change(row, vm.tgid, before, self._only_vm(vm.tgid))
