"""What zaps took, and what others took from vCPUs where all share one CPU, as in the lab, whose CPUs take turns.

Recorded spans contain it, and another policy would not have it: what a worker's job overlaps of a long span is taken
out, and is the measure of what zaps cost there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields

import numpy as np

from replay.decode.lookback import Ints, Rows
from replay.timing.timeline import Spans

_TIMES = 10  # a span this many times the median of its kind, and longer than this many ns, was interrupted
_LEAST = 50_000
_ENOUGH = 10  # spans of a kind, for a median


class Stolen:
    """Finds zaps, and takes the worker's time out of spans where all share one CPU.

    There one thing goes on at a time, so that the time between two rows of the VM is that of the later row's thread.
    `lost` is what the worker took, by vCPU in ns; `removed` tables took other tasks `removing` ns. What others took
    (the recorder above all) has no rows: a span many times as long as its like was interrupted. `preempted` is that,
    by vCPU, in ns.
    """

    def __init__(self, vcpus: int, shared: bool, workers: Collection[int]) -> None:
        """`shared`: all run on one CPU. `workers` are the tids of kernel workers."""
        self.shared = shared
        self._workers = np.array(sorted(workers), np.int64)
        self.lost = np.zeros(vcpus, np.int64)
        self.removed = 0
        self.removing = 0
        self.preempted = np.zeros(vcpus, np.int64)
        self._time = -1  # of the last row
        self._worked = 0  # ns of the worker, in all
        self._taken = np.zeros(vcpus, np.int64)  # that, as it was at each vCPU's last row
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
        taken = self._worked + np.cumsum(np.where(ours, time - before, 0))
        self._worked = int(taken[-1])
        own = taken[np.searchsorted(rows.seq, spans.seq)]
        past = np.append(0, own[:-1])
        first = np.append(True, spans.vcpu[1:] != spans.vcpu[:-1])[: len(own)]
        past[first] = self._taken[spans.vcpu[first]]
        last = np.append(first[1:], True)[: len(own)]
        self._taken[spans.vcpu[last]] = own[last]
        taken = np.minimum(own - past, spans.ns)
        np.add.at(self.lost, spans.vcpu, taken)
        ns = self._uninterrupted(spans, spans.ns - taken)
        values = {each.name: getattr(spans, each.name) for each in fields(Spans)}
        return Spans(**{**values, "ns": ns})

    def _uninterrupted(self, spans: Spans, ns: Ints) -> Ints:
        """Spans cut to what is usual of their kind, where they are beyond all measure."""
        # Where the guest did nothing, all beyond the switch is interruption.
        kinds = [(spans.still, 1, 0)]
        pair = spans.before.astype(np.int64) << 8 | spans.kind
        kinds += [(~spans.still & (pair == each), _TIMES, _LEAST) for each in np.unique(pair)]
        for which, times, least in kinds:
            like = np.flatnonzero(which)
            if len(like) < _ENOUGH:
                continue
            usual = int(np.median(ns[like]))
            long = like[ns[like] > max(times * usual, least)]
            np.add.at(self.preempted, spans.vcpu[long], ns[long] - usual)
            ns[long] = usual
        return ns

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
