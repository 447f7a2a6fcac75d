# SPDX-License-Identifier: Apache-2.0
"""A VM's memslots, and which of them others may meet while an ioctl changes one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

READ_ONLY: Final = 2  # KVM_MEM_READONLY
_LOG_DIRTY: Final = 1  # KVM_MEM_LOG_DIRTY_PAGES


@dataclass(frozen=True)
class Memslot:
    """A memslot: `hva` in bytes, `flags` as KVM_SET_USER_MEMORY_REGION has them."""

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
        """Whether its dirty pages are logged."""
        return bool(self.flags & _LOG_DIRTY)

    @property
    def read_only(self) -> bool:
        """Whether the guest may not write to it, whatever the host would allow."""
        return bool(self.flags & READ_ONLY)

    def has(self, as_id: int, gfn: int) -> bool:
        """Whether the guest frame lies in it."""
        return self.as_id == as_id and self.gfn <= gfn < self.end

    def lies_as(self, other: Memslot) -> bool:
        """Whether it has the same guest frames at the same host addresses."""
        return (self.gfn, self.pages, self.hva) == (other.gfn, other.pages, other.hva)


@dataclass(frozen=True)
class SlotUpdate:
    """KVM_SET_USER_MEMORY_REGION in progress. When it takes effect has no event: others meet either of the two."""

    before: Memslot | None
    after: Memslot | None

    @property
    def kept(self) -> Memslot | None:
        """The slot, where it lies as it did, and only its flags change."""
        return self.after if self.after and self.before and self.after.lies_as(self.before) else None


@dataclass
class SlotLookup:
    """By address space and slot id, as of the last ioctl that began; `updates` by thread, until it returns."""

    by_key: dict[tuple[int, int], Memslot] = field(default_factory=dict)
    updates: dict[int, SlotUpdate] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Memslot]:
        return iter(self.by_key.values())

    def begin(self, tid: int, slot: Memslot) -> SlotUpdate:
        """A thread's ioctl sets a slot, or deletes it (no pages)."""
        key = (slot.as_id, slot.slot)
        update = SlotUpdate(self.by_key.get(key), slot if slot.pages else None)
        if update.after is None:
            self.by_key.pop(key, None)
        else:
            self.by_key[key] = update.after
        self.updates[tid] = update
        return update

    def end(self, tid: int, done: bool) -> None:
        """The thread's ioctl returned; not `done`: nothing was changed."""
        update = self.updates.pop(tid, None)
        slot = None if update is None else update.after or update.before
        if update is None or slot is None or done:
            return
        if update.before is None:
            self.by_key.pop((slot.as_id, slot.slot), None)
        else:
            self.by_key[slot.as_id, slot.slot] = update.before

    def of(self, as_id: int, gfn: int) -> Memslot | None:
        """The slot that a guest frame lies in, ioctls in progress taken as done."""
        return next((slot for slot in self if slot.has(as_id, gfn)), None)

    def possible(self, as_id: int, gfn: int) -> list[Memslot | None]:
        """The slots, or none, that a thread may find for a guest frame now: ioctls in progress may be done or not."""
        found = [self.of(as_id, gfn)]
        for update in self.updates.values():
            before = update.before if update.before and update.before.has(as_id, gfn) else None
            if before or (update.after and found[0] is update.after):
                found.append(before)
        return found

    def overlaps(self, start: int, end: int) -> list[tuple[Memslot, int, int, bool]]:
        """The slots that host addresses [start, end) overlap, each with the guest frames [first, last) there.

        And whether the slot is there for certain: one that is being made, moved or deleted may be or not.
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
