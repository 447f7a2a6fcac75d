# SPDX-License-Identifier: Apache-2.0
"""The memslot table of a VM over time: which guest frames are in a slot, and where they are in host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
LOG_DIRTY: Final = 1  # KVM_MEM_LOG_DIRTY_PAGES
_EVER: Final = 1 << 62
_SPACE: Final = 52  # in a key the guest frame has this many bits, and the address space is above them
_SPACES: Final = 0xFF
_LARGEST: Final = 1 << 48  # no address space has more pages; larger numbers in a file are cut to this


def _number(value: Any, otherwise: int) -> int:
    """Return a number of the metadata, in which there may be anything; `otherwise` if it is not a number."""
    return min(value, _EVER) if isinstance(value, int) else otherwise


def logs_dirty(slot: Mapping[str, Any]) -> bool:
    """Return whether a slot's dirty pages are logged."""
    return bool(_number(slot.get("flags"), 0) & LOG_DIRTY)


@dataclass(frozen=True)
class SlotTable:
    """The slots at one time, sorted by (address space, first frame).

    It is valid from `since` on and before `until` (ns).
    """

    since: int
    until: int
    key: Ints
    gfn: Ints
    pages: Ints
    hva: NDArray[np.uint64]
    as_id: Ints


class Slots:
    """The memslots of a VM.

    `entries` are those of a trace's metadata (`vms[].slots`): gfn, pages, hva, as_id, since and until (ns or None).
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        def column(name: str, otherwise: int, kind: type[Any] = np.int64) -> Any:
            return np.array([_number(entry.get(name), otherwise) for entry in entries], kind)

        self._began = {(entry["as_id"], entry["slot"], entry.get("since")): entry for entry in entries}
        self._ended = {(entry["as_id"], entry["slot"], entry.get("until")): entry for entry in entries}
        self._gfn, self._pages, self._as_id = column("gfn", 0), column("pages", 0), column("as_id", 0) & _SPACES
        self._gfn, self._pages = np.minimum(self._gfn, _LARGEST), np.minimum(self._pages, _LARGEST)
        self._hva = column("hva", 0, np.uint64)
        self._since, self._until = column("since", -1), column("until", _EVER)
        self._changes = np.unique(np.concatenate([self._since, self._until]))
        self._tables: dict[int, SlotTable] = {}

    def __len__(self) -> int:
        return len(self._gfn)

    def logging_change(self, time: int, slot: int, as_id: int) -> tuple[int, int, int]:
        """Return whether dirty logging begins (1) or ends (-1) as a slot changes at `time` (ns), and the slot's frames.

        If it does neither, return (0, 0, 0).
        """
        before, after = self._ended.get((as_id, slot, time)), self._began.get((as_id, slot, time))
        if before is None or after is None or before["pages"] != after["pages"]:
            return 0, 0, 0
        start, pages = (min(_number(after.get(name), 0), _LARGEST) for name in ("gfn", "pages"))
        return int(logs_dirty(after)) - int(logs_dirty(before)), start, start + pages

    def gone(self, time: int, slot: int, as_id: int) -> tuple[int, int]:
        """Return the range of frames of a slot that was deleted or moved at `time` (ns); (0, 0) if it was not."""
        before, after = self._ended.get((as_id, slot, time)), self._began.get((as_id, slot, time))
        lies = [[_number(entry.get(name), 0) for name in ("gfn", "pages", "hva")] for entry in (before, after) if entry]
        if before is None or (len(lies) == 2 and lies[0] == lies[1]):
            return 0, 0
        start, pages = min(lies[0][0], _LARGEST), min(lies[0][1], _LARGEST)
        return start, start + pages

    def at(self, time: int) -> SlotTable:
        """Return the slots at a time (ns)."""
        epoch = int(np.searchsorted(self._changes, time, "right"))
        if epoch not in self._tables:
            self._tables = {key: table for key, table in self._tables.items() if key >= epoch - 2}
            since = int(self._changes[epoch - 1]) if epoch else -_EVER
            until = int(self._changes[epoch]) if epoch < len(self._changes) else _EVER
            now = since if epoch else -2
            rows = np.flatnonzero((self._since <= now) & (now < self._until) & (self._pages > 0))
            key = self._as_id[rows] << _SPACE | self._gfn[rows]
            rows = rows[np.argsort(key, kind="stable")]
            columns = (self._gfn[rows], self._pages[rows], self._hva[rows], self._as_id[rows])
            self._tables[epoch] = SlotTable(since, until, self._as_id[rows] << _SPACE | self._gfn[rows], *columns)
        return self._tables[epoch]
