"""How long faults have mmu_lock, and what vCPUs waited for it, as recorded: the clock reckons its waits for itself.

A fault has mmu_lock from about its kvm_mmu_spte_requested to the last SPTE it sets. Where faults exclude each other
(5.10, whose lock is a spinlock, and the shadow MMU), another vCPU that is between its exit and that event meanwhile
waits. At the ends of a batch one wait a vCPU may go unseen: it then stays in that fault's cost.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from replay.decode.lookback import Ints
from replay.timing.timeline import Doing, Spans
from traces.schema import BY_NAME

_REQUESTED, _FAULT = (BY_NAME[name].code for name in ("kvm_mmu_spte_requested", "kvm_page_fault"))
_SETS: Final = (BY_NAME["kvm_mmu_set_spte"].code, BY_NAME["kvm_mmu_get_page"].code)


class Contended:
    """Takes waits for mmu_lock out of faults. `waited` is ns by vCPU; `held` and `faults` are of all, ns and number."""

    def __init__(self, vcpus: int, exclusive: bool) -> None:
        """`exclusive`: the recorded kernel's faults take mmu_lock for write."""
        self.waited = np.zeros(vcpus, np.int64)
        self.held = 0
        self.faults = 0
        self._exclusive = exclusive and vcpus > 1

    def purge(self, spans: Spans) -> Spans:
        """Spans without the waits in them."""
        of_fault = (spans.doing == Doing.FAULT) | (spans.doing == Doing.PREFETCH)
        holds = np.flatnonzero(of_fault & np.isin(spans.kind, _SETS))
        self.held += int(spans.ns[holds].sum())
        self.faults += int((of_fault & (spans.kind == _REQUESTED)).sum())
        if not self._exclusive or not len(holds):
            return spans
        gaps = np.flatnonzero(of_fault & (spans.kind == _REQUESTED) & (spans.before == _FAULT))
        waited = np.zeros(len(gaps), np.int64)
        for vcpu in np.unique(spans.vcpu[gaps]).tolist():
            mine = spans.vcpu[gaps] == vcpu
            others = holds[spans.vcpu[holds] != vcpu]
            end = spans.time[gaps[mine]]
            waited[mine] = _within(spans.time[others], spans.ns[others], end) - _within(
                spans.time[others], spans.ns[others], end - spans.ns[gaps[mine]]
            )
        np.add.at(self.waited, spans.vcpu[gaps], waited)
        ns = spans.ns.copy()
        ns[gaps] -= waited
        return replace(spans, ns=ns)


def _within(ends: Ints, lengths: Ints, until: Ints) -> Ints:
    """ns of stretches, none over another, that have passed at each moment of `until`."""
    order = np.argsort(ends, kind="stable")
    ends, lengths = ends[order], lengths[order]
    begins = np.maximum(ends - lengths, np.append(-1, ends[:-1])) if len(ends) else ends
    total = np.append(0, np.cumsum(ends - begins))
    at = np.searchsorted(ends, until)  # stretches that have ended before
    going = np.append(begins, np.iinfo(np.int64).max)[at]
    return np.asarray(total[at] + np.maximum(until - going, 0), np.int64)
