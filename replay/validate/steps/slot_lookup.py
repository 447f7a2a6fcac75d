# SPDX-License-Identifier: Apache-2.0
"""A VM's memslots, and which of them other threads may find while an ioctl changes one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

READ_ONLY: Final = 2  # KVM_MEM_READONLY
_LOG_DIRTY: Final = 1  # KVM_MEM_LOG_DIRTY_PAGES


@dataclass(frozen=True)
class Memslot:
    """A memslot; `hva` is in bytes, and `flags` are those of KVM_SET_USER_MEMORY_REGION."""

    as_id: int
    slot: int
    gfn: int
    pages: int
    hva: int
    flags: int

    @property
    def end(self) -> int:
        return self.gfn + self.pages

    @property
    def logged(self) -> bool:
        """Whether the slot's dirty pages are logged."""
        return bool(self.flags & _LOG_DIRTY)

    @property
    def read_only(self) -> bool:
        """Whether the guest may not write to the slot, even if the host could."""
        return bool(self.flags & READ_ONLY)

    def has(self, as_id: int, gfn: int) -> bool:
        """Return whether the guest frame is in this slot."""
        return self.as_id == as_id and self.gfn <= gfn < self.end

    def lies_as(self, other: Memslot) -> bool:
        """Return whether this slot has the same guest frames at the same host addresses as another."""
        return (self.gfn, self.pages, self.hva) == (other.gfn, other.pages, other.hva)


@dataclass(frozen=True)
class SlotUpdate:
    """A KVM_SET_USER_MEMORY_REGION in progress.

    No event shows when it takes effect, so others may find the old or new slot.
    """

    before: Memslot | None
    after: Memslot | None

    @property
    def kept(self) -> Memslot | None:
        """The new slot if it is where the old one was, so that only flags change; else None."""
        return self.after if self.after and self.before and self.after.lies_as(self.before) else None


@dataclass
class SlotLookup:
    """The slots by (address space, slot id), as set by the last ioctl that began.

    `updates` has the ioctls in progress, by thread, until they return.
    """

    by_key: dict[tuple[int, int], Memslot] = field(default_factory=dict)
    updates: dict[int, SlotUpdate] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Memslot]:
        return iter(self.by_key.values())

    def begin(self, tid: int, slot: Memslot) -> SlotUpdate:
        """A thread's ioctl begins to set a slot, or to delete it (no pages)."""
        key = (slot.as_id, slot.slot)
        update = SlotUpdate(self.by_key.get(key), slot if slot.pages else None)
        if update.after is None:
            self.by_key.pop(key, None)
        else:
            self.by_key[key] = update.after
        self.updates[tid] = update
        return update

    def end(self, tid: int, done: bool) -> None:
        """The thread's ioctl returned; unless `done`, it has changed nothing."""
        update = self.updates.pop(tid, None)
        slot = None if update is None else update.after or update.before
        if update is None or slot is None or done:
            return
        if update.before is None:
            self.by_key.pop((slot.as_id, slot.slot), None)
        else:
            self.by_key[slot.as_id, slot.slot] = update.before

    def of(self, as_id: int, gfn: int) -> Memslot | None:
        """Return the slot of a guest frame, with ioctls in progress taken as done; None if there is none."""
        return next((slot for slot in self if slot.has(as_id, gfn)), None)

    def possible(self, as_id: int, gfn: int) -> list[Memslot | None]:
        """Return the slots (None for no slot) that a thread may find for a guest
        frame now, whether or not ioctls took effect.
        """
        found = [self.of(as_id, gfn)]
        for update in self.updates.values():
            before = update.before if update.before and update.before.has(as_id, gfn) else None
            if before or (update.after and found[0] is update.after):
                found.append(before)
        return found

    def overlaps(self, start: int, end: int) -> list[tuple[Memslot, int, int, bool]]:
        """Return the slots that host addresses [start, end) overlap, each with its range [first, last) of guest frames.

        The fourth value says whether the slot certainly exists; one that is being created, moved or deleted may not.
        """
        changing = [slot for u in self.updates.values() if not u.kept for slot in (u.before, u.after) if slot]
        candidates = [(slot, True) for slot in self if slot not in changing]
        candidates += [(slot, False) for slot in dict.fromkeys(changing)]
        return [
            (
                slot,
                slot.gfn + (max(start, slot.hva) - slot.hva >> 12),
                slot.gfn + (min(end, slot.hva + slot.pages * 4096) - slot.hva + 4095 >> 12),
                certain,
            )
            for slot, certain in sorted(candidates, key=lambda found: (found[0].as_id, found[0].hva))
            if slot.hva < end and start < slot.hva + slot.pages * 4096
        ]
