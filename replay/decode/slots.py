"""The memslot table of a VM over time: where a page's slot begins and ends, which frames host memory backs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from replay.simulate.operations import PREFETCH

Ints = NDArray[np.int64]
LOG_DIRTY: Final = 1  # KVM_MEM_LOG_DIRTY_PAGES
_EVER: Final = 1 << 62
_SPACE: Final = 52  # bits of a frame; above it the address space, in keys
_SPACES: Final = 0xFF
_LARGEST: Final = 1 << 48  # no address space has more pages; what a file says beyond it is cut
_PAGE: Final = 12
_CHUNK: Final = 1 << 12


def _number(value: Any, otherwise: int) -> int:
    """A number of the metadata, which may say anything."""
    return min(value, _EVER) if isinstance(value, int) else otherwise


def logs_dirty(slot: Mapping[str, Any]) -> bool:
    """Whether a slot's dirty pages are logged."""
    return bool(_number(slot.get("flags"), 0) & LOG_DIRTY)


@dataclass(frozen=True)
class _Table:
    """The slots at one time, in order of (address space, first frame)."""

    key: Ints
    gfn: Ints
    pages: Ints
    hva: NDArray[np.uint64]
    as_id: Ints


class Slots:
    """`entries` as a trace's metadata has them (`vms[].slots`): gfn, pages, hva, as_id, since, until (ns or None)."""

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
        self._tables: dict[int, _Table] = {}

    def changed(self, time: int, slot: int, as_id: int) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
        """What a slot was before and is after the change that began at `time` (ns)."""
        return self._ended.get((as_id, slot, time)), self._began.get((as_id, slot, time))

    def groups(self, as_id: Ints, gfn: Ints, time: Ints) -> tuple[Ints, Ints]:
        """(first, last) entry of each page's aligned group of 8 that its slot reaches; its own where it has none."""
        own = gfn & PREFETCH - 1
        first, last = own.copy(), own.copy()
        for rows, table in self._stretches(time):
            if len(table.key):
                at = np.searchsorted(table.key, as_id[rows] << _SPACE | gfn[rows], "right") - 1
                base = gfn[rows] - own[rows]
                start = table.gfn[at] - base
                end = start + table.pages[at]
                inside = (at >= 0) & (table.as_id[at] == as_id[rows]) & (own[rows] >= start) & (own[rows] < end)
                first[rows] = np.where(inside, np.maximum(start, 0), own[rows])
                last[rows] = np.where(inside, np.minimum(end, PREFETCH) - 1, own[rows])
        return first, last

    def frames(self, start: NDArray[np.uint64], end: NDArray[np.uint64], time: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Host addresses [start, end) as guest frames: (row, as_id, first, one past the last), a row several times."""
        found: list[tuple[Ints, Ints, Ints, Ints]] = []
        for rows, table in self._stretches(time):
            top = table.hva + (table.pages.astype(np.uint64) << np.uint64(_PAGE))
            for part in range(rows.start, rows.stop, _CHUNK):
                chunk = slice(part, min(part + _CHUNK, rows.stop))
                low = np.maximum(start[chunk, None], table.hva)
                high = np.minimum(end[chunk, None], top)
                row, slot = np.nonzero(low < high)
                page = np.uint64(_PAGE)
                base = table.hva[slot]
                first = table.gfn[slot] + ((low[row, slot] - base) >> page).astype(np.int64)
                past = (high[row, slot] - base + np.uint64((1 << _PAGE) - 1)) >> page
                found.append((row + part, table.as_id[slot], first, table.gfn[slot] + past.astype(np.int64)))
        if not found:
            none = np.empty(0, np.int64)
            return none, none, none, none
        rows_, spaces, firsts, ends = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return rows_, spaces, firsts, ends

    def _stretches(self, time: Ints) -> Iterator[tuple[slice, _Table]]:
        """Rows between two changes of the table, and the table there. Times may go back a little between CPUs."""
        if not len(time):
            return
        epoch = np.searchsorted(self._changes, time, "right")
        cuts = np.concatenate([[0], np.flatnonzero(epoch[1:] != epoch[:-1]) + 1, [len(time)]]).tolist()
        for start, stop in pairwise(cuts):
            yield slice(start, stop), self._table(int(epoch[start]))

    def _table(self, epoch: int) -> _Table:
        if epoch not in self._tables:
            self._tables = {key: table for key, table in self._tables.items() if key >= epoch - 2}
            now = int(self._changes[epoch - 1]) if epoch else -2
            rows = np.flatnonzero((self._since <= now) & (now < self._until) & (self._pages > 0))
            key = self._as_id[rows] << _SPACE | self._gfn[rows]
            rows = rows[np.argsort(key, kind="stable")]
            self._tables[epoch] = _Table(
                self._as_id[rows] << _SPACE | self._gfn[rows],
                self._gfn[rows],
                self._pages[rows],
                self._hva[rows],
                self._as_id[rows],
            )
        return self._tables[epoch]
