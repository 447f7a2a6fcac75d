"""What zaps took: of the worker, which takes time from vCPUs where all share one CPU, and of other tasks.

In the lab all share one CPU, for its CPUs are emulated in turn.

Recorded spans contain it, and another policy would not have it: what a worker's job overlaps of a long span is taken
out, and is the measure of what zaps cost there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import Final

import numpy as np

from replay.lookback import Ints, Rows
from replay.virtual.timeline import Spans

_LONG: Final = 100_000  # ns: a span this long beside a job was not going on


class Stolen:
    """Finds zaps, and takes the worker's jobs out of spans.

    `ns` was taken out in all, of the vCPU most hit by each job. `removed` tables took other tasks `removing` ns.
    """

    def __init__(self, shared: bool, workers: Collection[int]) -> None:
        """`shared`: all run on one CPU. `workers` are the tids of kernel workers."""
        self.shared = shared
        self._workers = np.array(sorted(workers), np.int64)
        self.ns = 0
        self.removed = 0
        self.removing = 0
        self._begun: dict[int, int] = {}
        self._zapping: dict[int, int] = {}

    def purge(self, rows: Rows, spans: Spans) -> Spans:
        """Spans without the jobs in them."""
        begin, end = self._jobs(rows)
        self._others(rows)
        if not self.shared or not len(begin):
            return spans
        ns = spans.ns.copy()
        for job in range(len(begin)):  # few: one a root that died
            over = np.minimum(spans.time, end[job]) - np.maximum(spans.time - spans.ns, begin[job])
            hit = np.flatnonzero((over > _LONG) & (ns >= over))
            ns[hit] -= over[hit]
            self.ns += int(over[hit].max(initial=0))
        values = {each.name: getattr(spans, each.name) for each in fields(Spans)}
        return Spans(**{**values, "ns": ns})

    def _jobs(self, rows: Rows) -> tuple[Ints, Ints]:
        """When the worker's jobs in this batch began and ended."""
        at = rows.of("zap_root_begin", "root_put")
        at = at[np.isin(rows.tid[at], self._workers)]
        # What an invalidation waits for is done under every policy.
        opened = np.searchsorted(rows.of("zap_invalidated_begin"), at)
        at = at[opened == np.searchsorted(rows.of("zap_invalidated_end"), at)]
        begins = set(rows.of("zap_root_begin").tolist())
        begin: list[int] = []
        end: list[int] = []
        for row in at.tolist():
            thread = int(rows.tid[row])
            if row in begins:
                self._begun.setdefault(thread, int(rows.time[row]))
            elif thread in self._begun:
                begin.append(self._begun.pop(thread))
                end.append(int(rows.time[row]))
        return np.array(begin, np.int64), np.array(end, np.int64)

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
