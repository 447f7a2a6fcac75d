"""Time that the zap worker took from vCPUs where all share one CPU, as in the lab, which emulates its CPUs in turn.

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
    """Finds the worker's jobs and takes them out of spans. `ns` was taken out in all, `tables` were removed by jobs."""

    def __init__(self, shared: bool, workers: Collection[int]) -> None:
        """`shared`: all run on one CPU. `workers` are the tids of kernel workers."""
        self.shared = shared
        self._workers = np.array(sorted(workers), np.int64)
        self.ns = 0
        self.worked = 0
        self.tables = 0
        self._begun: dict[int, int] = {}

    def purge(self, rows: Rows, spans: Spans) -> Spans:
        """Spans without the jobs in them."""
        begin, end = self._jobs(rows)
        self.worked += int((end - begin).sum())
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
        removed = rows.of("kvm_mmu_prepare_zap_page")
        self.tables += int(np.isin(rows.tid[removed], self._workers).sum())
        return np.array(begin, np.int64), np.array(end, np.int64)
