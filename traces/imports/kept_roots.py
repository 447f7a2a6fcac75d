# SPDX-License-Identifier: Apache-2.0
"""Whether a kernel keeps a root that no vCPU uses, as rows of an import show: SMM's root, when SMM is entered again.

A distribution's release (6.1.0-56-amd64) does not say which stable update it is, and updates of one version differ in
root policy (edbdb43fc96b, 6.4, came to 6.1 later). Nobody is in SMM between two SMIs: a policy that frees unused roots
has to make one at each, and one that preserves them makes one only after an invalidation.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from traces.kernels.policies import ASYNC, PRESERVE, PRESERVE_WORKER, SYNC
from traces.lives import Flags, Ints
from traces.record import Columns
from traces.schema import BY_NAME
from traces.text import count

_SMM: Final = BY_NAME["kvm_smm_transition"].code
_INVALIDATION: Final = BY_NAME["kvm_mmu_zap_all_fast"].code
_ENTERING: Final = 1
_FREES: Final = (SYNC.name, ASYNC.name)
_KEEPS: Final = (PRESERVE.name, PRESERVE_WORKER.name)
_ENOUGH: Final = 64  # times that SMM was entered again: after that nothing new is to be learned


class KeptRoots:
    """`kept` counts entries into SMM with the root that was there before, `made` those with a new one."""

    def __init__(self) -> None:
        self.kept = 0
        self.made = 0
        self._inside: dict[int, set[int]] = {}  # by VM: vCPUs in SMM
        self._root: dict[int, bool] = {}  # whether SMM's root was there when SMM was entered
        self._fresh: dict[int, bool] = {}  # whether one was made since

    def see(self, columns: Columns, vm: Ints, born: Flags, smm: Ints) -> None:
        """Rows in order; `born` are those that make a root, `smm` is 1 where their vCPU is in SMM."""
        if self.kept + self.made >= _ENOUGH:
            return
        kind = columns["kind"]
        telling = ((kind == _SMM) | (kind == _INVALIDATION) | (born & (smm != 0))) & (vm > 0)
        at = np.flatnonzero(telling)
        rows = (kind[at], vm[at], columns["vcpu"][at], columns["flags"][at])
        for what, owner, vcpu, flags in zip(*(each.tolist() for each in rows), strict=True):
            if what == _INVALIDATION:
                self._root.pop(owner, None)
                self._inside[owner] = {-1}  # who is inside now does not count
            elif what != _SMM:
                self._fresh[owner] = True
            elif flags & _ENTERING:
                self._inside.setdefault(owner, set()).add(vcpu)
            else:
                self._leave(owner, vcpu)

    def _leave(self, owner: int, vcpu: int) -> None:
        inside = self._inside.setdefault(owner, {-1})
        inside -= {vcpu, -1}
        if inside:
            return
        fresh = self._fresh.pop(owner, False)
        if self._root.get(owner):
            self.made, self.kept = self.made + fresh, self.kept + (not fresh)
        if fresh:
            self._root[owner] = True

    def policy(self, known: str) -> dict[str, str]:
        """The policy that rows decide, as a manifest has it: `known` by the release, or another; empty: they do not."""
        times = f"its rows: SMM was entered again {count(self.kept + self.made, 'time')}, and"
        if self.kept and not self.made and known in (*_FREES, *_KEEPS):
            name = known if known in _KEEPS else PRESERVE.name
            return {"name": name, "why": f"{times} its root was there each time", "by": "rows"}
        if self.made and not self.kept and known in (*_FREES, *_KEEPS):
            name = known if known in _FREES else ASYNC.name
            return {"name": name, "why": f"{times} its root was made anew each time", "by": "rows"}
        return {}
