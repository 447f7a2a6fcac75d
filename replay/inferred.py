"""Removals that a recording could not show: a page is faulted in again by a root that had it, so it was taken away."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from replay.lookback import Ints, Rows

_ROOT_SHIFT: Final = 36
_RECENT: Final = 64  # roots that are remembered where their ends are not recorded


class Unseen:
    """What each living root has mapped, as sorted keys of (root, frame, level), and when it was last mapped."""

    def __init__(self) -> None:
        self._keys = np.empty(0, np.int64)
        self._seqs = np.empty(0, np.int64)
        self._emptied = -1  # row of the last invalidation, which empties every root

    def find(
        self, rows: Rows, root: Ints, gfn: Ints, level: Ints, seq: Ints, began: Ints, asks: NDArray[np.bool_]
    ) -> Ints:
        """Of a batch's installs, those by a fault (`asks`) of an absent page that the same root had mapped.

        A fault that began before that mapping was made was only late. `began` is the row where each one's fault began.
        """
        key = root << _ROOT_SHIFT | gfn | (level - 1)
        keys, seqs = np.concatenate([self._keys, key]), np.concatenate([self._seqs, seq])
        order = np.lexsort((seqs, keys))
        same = np.zeros(len(keys), np.bool_)
        same[1:] = keys[order][1:] == keys[order][:-1]
        before = np.full(len(keys), -1, np.int64)
        before[order[1:]] = np.where(same[1:], seqs[order][:-1], -1)
        before = before[len(self._keys) :]
        emptied = self._emptied_before(rows, seq)
        gone = asks & (before >= 0) & (before > emptied) & (before < began)
        last = np.append(~same[1:], True)
        self._keys, self._seqs = keys[order][last], seqs[order][last]
        self._forget(rows)
        return np.flatnonzero(gone)

    def _emptied_before(self, rows: Rows, seq: Ints) -> Ints:
        at = np.append([self._emptied], rows.seq[rows.of("kvm_mmu_zap_all_fast")])
        self._emptied = int(at[-1])
        return at[np.maximum(np.searchsorted(at, seq) - 1, 0)]

    def _forget(self, rows: Rows) -> None:
        freed = rows.of("table_free")
        roots = self._keys >> _ROOT_SHIFT
        dead = np.isin(roots, rows.root[freed][rows.root[freed] > 0]) | (roots < roots.max(initial=0) - _RECENT)
        if dead.any():
            self._keys, self._seqs = self._keys[~dead], self._seqs[~dead]
