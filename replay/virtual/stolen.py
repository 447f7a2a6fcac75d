"""What zaps took: of the worker, which takes time from vCPUs where all share one CPU, and of other tasks.

In the lab all share one CPU, for its CPUs are emulated in turn.

Recorded spans contain it, and another policy would not have it: what a worker's job overlaps of a long span is taken
out, and is the measure of what zaps cost there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields

import numpy as np

from replay.lookback import Rows
from replay.virtual.timeline import Spans


class Stolen:
    """Finds zaps, and takes the worker's time out of spans where all share one CPU.

    There one thing goes on at a time, so that the time between two rows of the VM is that of the later row's thread.
    `ns` is what the worker took in all; `removed` tables took other tasks `removing` ns.
    """

    def __init__(self, vcpus: int, shared: bool, workers: Collection[int]) -> None:
        """`shared`: all run on one CPU. `workers` are the tids of kernel workers."""
        self.shared = shared
        self._workers = np.array(sorted(workers), np.int64)
        self.ns = 0
        self.removed = 0
        self.removing = 0
        self._time = -1  # of the last row
        self._taken = np.zeros(vcpus, np.int64)  # `ns` as it was at each vCPU's last row
        self._zapping: dict[int, int] = {}

    def purge(self, rows: Rows, spans: Spans) -> Spans:
        """Spans without the worker's time in them."""
        self._others(rows)
        if not self.shared or not len(rows):
            return spans
        time = rows.time
        before = np.append(time[0] if self._time < 0 else self._time, time[:-1])
        self._time = int(time[-1])
        # What an invalidation waits for is done under every policy.
        at = np.arange(len(time))
        opened = np.searchsorted(rows.of("zap_invalidated_begin"), at, "right")
        waited = opened > np.searchsorted(rows.of("zap_invalidated_end"), at, "right")
        ours = np.isin(rows.tid, self._workers) & ~waited
        taken = self.ns + np.cumsum(np.where(ours, time - before, 0))
        self.ns = int(taken[-1])
        own = taken[np.searchsorted(rows.seq, spans.seq)]
        past = np.append(0, own[:-1])
        first = np.append(True, spans.vcpu[1:] != spans.vcpu[:-1])[: len(own)]
        past[first] = self._taken[spans.vcpu[first]]
        last = np.append(first[1:], True)[: len(own)]
        self._taken[spans.vcpu[last]] = own[last]
        values = {each.name: getattr(spans, each.name) for each in fields(Spans)}
        return Spans(**{**values, "ns": np.maximum(spans.ns - (own - past), 0)})

    def _others(self, rows: Rows) -> None:
        """Zaps by tasks that are neither vCPUs nor workers: they measure a table's removal where no worker does."""
        at = rows.of("zap_root_begin", "zap_root_end")
        at = at[(rows.vcpu[at] < 0) & ~np.isin(rows.tid[at], self._workers)]
        ends = set(rows.of("zap_root_end").tolist())
        for row in at.tolist():
            thread, time = int(rows.tid[row]), int(rows.time[row])
            if row in ends and thread in self._zapping:
                self.removing += time - self._zapping.pop(thread)
            elif row not in ends:
                self._zapping[thread] = time
        gone = rows.of("kvm_mmu_prepare_zap_page")
        self.removed += int(((rows.vcpu[gone] < 0) & ~np.isin(rows.tid[gone], self._workers)).sum())
