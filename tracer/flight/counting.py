# SPDX-License-Identifier: Apache-2.0
"""Triggers that count: too many rows in a time, too many equal faults in succession, or a zap that takes too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

import numpy as np

from tracer.flight.alarms import Alarm, Ongoing, Rows
from traces.command_line.durations import duration
from traces.recording.identity import CREATED, GET_PAGE
from traces.schema import BY_NAME

_PARTS: Final = 8  # parts of the time over which rows are counted
_FAULT, _USER = BY_NAME["kvm_page_fault"].code, BY_NAME["kvm_userspace_exit"].code
_ROOT_GET = BY_NAME["root_get"].code
_BRACKETS: Final = (("zap_root_begin", "zap_root_end"), ("zap_invalidated_begin", "zap_invalidated_end"))
_FORGOTTEN: Final = 600 * 10**9  # ns after which the end of a zap is taken for lost
_INTERRUPTED: Final = (-4, -11)  # EINTR, EAGAIN: userspace wanted its thread back, no failure
_FAILED: Final = (0, 9, 17)  # KVM_EXIT_UNKNOWN, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR

Mask = Callable[[Rows], Rows]


def roots(rows: Rows) -> Rows:
    """Return which rows show that a root was created."""
    kind = rows["kind"]
    made: Rows = (kind == GET_PAGE) & (rows["flags"] & CREATED != 0) & (rows["root"] != 0)
    made &= rows["root"] == rows["w1"]
    return made


def old_roots(rows: Rows) -> Rows:
    """Return the same for kernels before 5.12, which trace no table of a TDP root: its first user shows it."""
    found: Rows = roots(rows) | ((rows["kind"] == _ROOT_GET) & (rows["n"] == 1))
    return found


def faults(rows: Rows) -> Rows:
    found: Rows = rows["kind"] == _FAULT
    return found


def user_exits(rows: Rows) -> Rows:
    found: Rows = rows["kind"] == _USER
    return found


def errors(rows: Rows) -> Rows:
    """Return which rows are failures of KVM_RUN, or exits to userspace that say that KVM cannot continue."""
    ret = rows["n"]
    refused = (ret < 0) & ~np.isin(ret, _INTERRUPTED)
    found: Rows = (rows["kind"] == _USER) & (refused | ((ret >= 0) & np.isin(rows["w0"], _FAILED)))
    return found


class RowRate:
    """Alarms where a VM has more than `limit` rows of one sort (`mask`) within `nanoseconds`."""

    def __init__(self, name: str, what: str, mask: Mask, limit: float, nanoseconds: int) -> None:
        self._name, self._what, self._mask = name, what, mask
        self._limit, self._nanoseconds = limit, nanoseconds
        self._part = max(nanoseconds // _PARTS, 1)
        self._counts: dict[int, Counter[int]] = {}  # by VM: how many in each part of the time
        self._owner: dict[int, int] = {}
        self._alarmed = Ongoing()

    def see(self, rows: Rows) -> list[Alarm]:
        """Take rows; return the alarms of VMs that begin to have too many."""
        rows = rows[self._mask(rows)]
        rows = rows[rows["kvm"] != 0]
        if not len(rows):
            return []
        found = []
        for kvm in np.unique(rows["kvm"]).tolist():
            mine = rows[rows["kvm"] == kvm]
            self._owner[kvm] = int(mine["tgid"][-1])
            parts, counts = np.unique(mine["time"] // np.uint64(self._part), return_counts=True)
            found += self._count(kvm, parts.tolist(), counts.tolist())
        return found

    def _count(self, kvm: int, parts: list[int], counts: list[int]) -> list[Alarm]:
        known, found = self._counts.setdefault(kvm, Counter()), []
        for part, count in zip(parts, counts, strict=True):
            known[part] += count
            for old in [each for each in known if each <= part - _PARTS]:
                del known[old]
            total = sum(known.values())
            if self._alarmed.begins(kvm, total > self._limit):
                rate = total / self._nanoseconds * 1e9
                text = f"process {self._owner[kvm]}: {total:,} {self._what} in {duration(self._nanoseconds)}"
                found.append(Alarm(self._name, text, rate))
        return found

    def now(self, at: int) -> list[Alarm]:
        """Forget VMs that had no such row for the whole time; return no alarm."""
        quiet = {kvm for kvm, known in self._counts.items() if max(known) < at // self._part - _PARTS}
        for kvm in quiet:
            del self._counts[kvm], self._owner[kvm]
        self._alarmed.forget(quiet)
        return []


class SameFault:
    """Alarms where a vCPU faults more than `limit` times in succession at one RIP or on one gfn."""

    def __init__(self, name: str, value: Callable[[Rows], Rows], limit: int) -> None:
        self._name, self._value, self._limit = name, value, limit
        self._last: dict[tuple[int, int], tuple[int, int]] = {}  # by vCPU: the value, and how often in succession
        self._alarmed = Ongoing()

    def see(self, rows: Rows) -> list[Alarm]:
        """Take rows; return the alarms of vCPUs that begin to repeat themselves."""
        rows = rows[(rows["kind"] == _FAULT) & (rows["vcpu"] >= 0)]
        if not len(rows):
            return []
        order = np.lexsort((rows["vcpu"], rows["kvm"]))  # stable: in the order of time within a vCPU
        rows, values = rows[order], self._value(rows[order])
        other = (rows["kvm"][1:] != rows["kvm"][:-1]) | (rows["vcpu"][1:] != rows["vcpu"][:-1])
        starts = np.append(0, np.flatnonzero(other | (values[1:] != values[:-1])) + 1)
        lengths = np.diff(np.append(starts, len(rows)))
        firsts = np.append(0, np.flatnonzero(other) + 1)  # each vCPU's first row here, which may continue a run
        # The runs to look at: each vCPU's first and last, which batches may divide, and those over the limit.
        ends = np.append(firsts[1:], len(rows)) - 1
        last_runs = starts[np.searchsorted(starts, ends, side="right") - 1]
        matter = np.unique(np.concatenate([firsts, last_runs, starts[lengths > self._limit]]))
        found, goes_on = [], set(firsts.tolist())
        for at in matter.tolist():
            length = int(lengths[np.searchsorted(starts, at)])
            vcpu = (int(rows["kvm"][at]), int(rows["vcpu"][at]))
            before, count = self._last.get(vcpu, (-1, 0))
            value = int(values[at])
            count = count + length if at in goes_on and before == value else length
            self._last[vcpu] = (value, count)
            if self._alarmed.begins(vcpu, count > self._limit):
                whose = f"vCPU {vcpu[1]} of process {int(rows['tgid'][at])}"
                text = f"{whose}: {count:,} faults at {self._name[5:]} {value:#x}"
                found.append(Alarm(self._name, text, float(count)))
        return found

    def now(self, at: int) -> list[Alarm]:
        """Return no alarm: only rows make one."""
        return []


class LongZap:
    """Alarms where a zap of a root, or of all invalid roots, takes longer than `nanoseconds`, under mmu_lock."""

    def __init__(self, nanoseconds: int) -> None:
        self._nanoseconds = nanoseconds
        self._open: dict[tuple[int, int], tuple[int, int]] = {}  # by thread and bracket: begin, process
        self._alarmed = Ongoing()

    def see(self, rows: Rows) -> list[Alarm]:
        """Take rows; return the alarms of zaps that ended and took too long."""
        found = []
        for bracket, (begin, end) in enumerate(_BRACKETS):
            codes = (BY_NAME[begin].code, BY_NAME[end].code)
            mine = rows[(rows["kind"] == codes[0]) | (rows["kind"] == codes[1])]
            if not len(mine):
                continue
            mine = mine[np.argsort(mine["tid"], kind="stable")]
            begins = mine["kind"] == codes[0]
            same = np.append(mine["tid"][1:] == mine["tid"][:-1], False)
            ended = begins & same & np.append(~begins[1:], False)
            ns = np.append(np.diff(mine["time"].astype(np.int64)), 0)
            for at in np.flatnonzero(ended & (ns > self._nanoseconds)).tolist():
                found.append(self._alarm(int(mine["tgid"][at]), int(ns[at])))
            first = np.append(True, ~same[:-1])
            for at in np.flatnonzero(first & ~begins).tolist():  # begun in an earlier batch
                since, tgid = self._open.pop((int(mine["tid"][at]), bracket), (0, 0))
                took = int(mine["time"][at]) - since
                key = (int(mine["tid"][at]), bracket)
                if since and took > self._nanoseconds and key not in self._alarmed:
                    found.append(self._alarm(tgid, took))
                self._alarmed.forget({key})
            for at in np.flatnonzero(begins & ~same).tolist():
                key = (int(mine["tid"][at]), bracket)
                self._open[key] = (int(mine["time"][at]), int(mine["tgid"][at]))
        return found

    def now(self, at: int) -> list[Alarm]:
        """Return the alarms of zaps that take too long and have not ended yet."""
        for key in [key for key, (since, _) in self._open.items() if at - since > _FORGOTTEN]:
            del self._open[key]
        return [
            self._alarm(tgid, at - since)
            for key, (since, tgid) in self._open.items()
            if at - since > self._nanoseconds and self._alarmed.begins(key, True)
        ]

    def _alarm(self, tgid: int, ns: int) -> Alarm:
        return Alarm("zap", f"process {tgid}: a zap of roots takes {duration(ns)}", float(ns))
