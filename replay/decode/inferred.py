"""Removals that a recording could not show: a page is faulted in again by a root that had it, so it was taken away.

What a root mapped in a region of 2 MiB counts only since the region last changed between a table and a huge leaf (the
kernel's own doing, when dirty logging begins and ends), or since its table was built anew. Where the table was built
anew the range removed was all of it: these kernels drop a table with a range that covers it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from replay.decode.lookback import Ints, Rows

Flags = NDArray[np.bool_]
_ROOT_SHIFT: Final = 36
_REGION: Final = 512
_RECENT: Final = 64  # roots that are remembered where their ends are not recorded
_SEQ_BITS: Final = 40


class Installs(NamedTuple):
    """A batch's leaf installs: `began` is the row (seq) where each one's fault began.

    `asks`: by a fault of an absent page. `rebuilt`: the fault built the table that the leaf is in.
    """

    root: Ints
    gfn: Ints
    level: Ints
    seq: Ints
    began: Ints
    asks: Flags
    rebuilt: Flags


class Unseen:
    """What each living root has mapped, as sorted keys, and when it was last mapped; and the same of regions."""

    def __init__(self) -> None:
        none = np.empty(0, np.int64)
        self._keys, self._seqs = none, none
        self._regions, self._levels, self._since = none, none, none
        self._emptied = -1  # row of the last invalidation, which empties every root

    def find(self, rows: Rows, new: Installs) -> tuple[Ints, Ints]:
        """Installs before which their page was removed, and those before which their whole table was."""
        changed, table = self._region(new)
        key = new.root << _ROOT_SHIFT | new.gfn | (new.level - 1)
        keys, seqs = np.concatenate([self._keys, key]), np.concatenate([self._seqs, new.seq])
        order, same = _grouped(keys, seqs)
        before = np.full(len(keys), -1, np.int64)
        before[order[1:]] = np.where(same[1:], seqs[order][:-1], -1)
        before = before[len(self._keys) :]
        known = (before >= 0) & (before > self._emptied_before(rows, new.seq)) & (before > changed)
        # A fault that began before the page was mapped was only late.
        gone = new.asks & known & (before < new.began)
        last = np.append(~same[1:], True)
        self._keys, self._seqs = keys[order][last], seqs[order][last]
        self._forget(rows)
        return np.flatnonzero(gone), np.flatnonzero(table)

    def _region(self, new: Installs) -> tuple[Ints, Flags]:
        """When each install's region last changed (its row, or -1), and which found their table gone."""
        region = new.root << _ROOT_SHIFT | new.gfn & -_REGION
        keys = np.concatenate([self._regions, region])
        old = len(self._regions)
        seqs = np.concatenate([np.full(old, -1), new.seq])
        levels = np.concatenate([self._levels, new.level])
        order, same = _grouped(keys, seqs)
        former = np.zeros(len(keys), np.int64)
        former[order[1:]] = np.where(same[1:], levels[order][:-1], 0)
        rebuilt = np.concatenate([np.zeros(old, np.bool_), new.rebuilt])
        changes = (former > 0) & (rebuilt | (former != levels))
        since = np.concatenate([self._since, np.where(changes[old:], new.seq, -1)])
        group = np.cumsum(~same) << _SEQ_BITS
        since[order] = (np.maximum.accumulate(group | (since[order] + 1)) & (1 << _SEQ_BITS) - 1) - 1
        last = order[np.append(~same[1:], True)]
        self._regions, self._levels, self._since = keys[last], levels[last], since[last]
        return since[old:], (changes & rebuilt & (former == levels))[old:] & (new.level == 1) & new.asks

    def _emptied_before(self, rows: Rows, seq: Ints) -> Ints:
        at = np.append([self._emptied], rows.seq[rows.of("kvm_mmu_zap_all_fast")])
        self._emptied = int(at[-1])
        return at[np.maximum(np.searchsorted(at, seq) - 1, 0)]

    def _forget(self, rows: Rows) -> None:
        freed = rows.of("table_free")
        ended = rows.root[freed][rows.root[freed] > 0]
        newest = int(self._keys[-1] >> _ROOT_SHIFT) if len(self._keys) else 0

        def alive(keys: Ints) -> Flags:
            roots = keys >> _ROOT_SHIFT
            return ~np.isin(roots, ended) & (roots >= newest - _RECENT)

        kept = alive(self._keys)
        self._keys, self._seqs = self._keys[kept], self._seqs[kept]
        kept = alive(self._regions)
        self._regions, self._levels, self._since = self._regions[kept], self._levels[kept], self._since[kept]


def _grouped(keys: Ints, seqs: Ints) -> tuple[Ints, Flags]:
    """The order by key and then row, and which in that order has the key of the one before."""
    order = np.lexsort((seqs, keys))
    same = np.zeros(len(keys), np.bool_)
    same[1:] = keys[order][1:] == keys[order][:-1]
    return order, same
