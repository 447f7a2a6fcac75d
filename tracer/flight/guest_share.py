# SPDX-License-Identifier: Apache-2.0
"""The trigger `guest-share`: a vCPU that is busy, but spends little of that time in its guest.

Two sums are kept for each vCPU: the ns that it was in the guest, and the ns that do not count because it was halted,
asleep, or waiting for a CPU (steal time). Both are known at each of its rows and interpolated between two rows, at the
edges of short intervals; the share is taken over the intervals of the time asked for. At least half of that time must
count: else a nearly idle vCPU that handles an interrupt would seem to hang.

A vCPU without rows, because its thread works or sleeps in the kernel, is judged by its thread's CPU time.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from tracer.flight.alarms import Alarm, Ongoing, Rows
from tracer.flight.vcpu_time import ENTRY, GUEST, IDLE, OUT, ThreadTime, by_vcpu, off_cpu, states, thread_time
from traces.command_line.durations import duration

_PARTS: Final = 8  # intervals in the time asked for
_RESTART: Final = 4  # after so many times that time without a row, earlier rows no longer count


class _Vcpu:
    """One vCPU: its state since its last row, both sums, and their values at the last edges (edge number first)."""

    def __init__(self, at: int, state: int) -> None:
        self.last, self.state = at, state
        self.entered = False  # whether any entry was recorded: without one its share is not known
        self.tgid = self.tid = 0
        self.guest = self.idle = 0.0
        self.edges: Rows = np.empty((0, 3))
        self.looked: tuple[int, int, bool] | None = None  # time of the look at its thread, and its ThreadTime then
        self.judged = False  # nothing more can be found out until its next row


class GuestShare:
    """Alarms where a vCPU's guest share is below `below` (0 to 1) for `nanoseconds`."""

    def __init__(
        self, below: float, nanoseconds: int, idle_codes: tuple[int, ...], time_of: ThreadTime = thread_time
    ) -> None:
        """`idle_codes` are the exits of this vendor by which a guest says that it is idle."""
        self._below, self._nanoseconds, self._time_of = below, nanoseconds, time_of
        self._edge = max(nanoseconds // _PARTS, 1)
        self._idle_codes = np.array(idle_codes, np.uint64)
        self._vcpus: dict[tuple[int, int], _Vcpu] = {}
        self._alarmed = Ongoing()
        self._next_look = 0

    def see(self, rows: Rows) -> list[Alarm]:
        """Take rows; return the alarms of vCPUs that begin to hang."""
        alarms = []
        for name, mine in by_vcpu(rows):
            alarms += self._follow(name, mine)
        return alarms

    def _follow(self, name: tuple[int, int], rows: Rows) -> list[Alarm]:
        times = rows["time"].astype(np.int64)
        vcpu = self._vcpus.get(name)
        if vcpu is None or times[0] - vcpu.last > _RESTART * self._nanoseconds:
            former, vcpu = vcpu, _Vcpu(int(times[0]), vcpu.state if vcpu else OUT)
            vcpu.entered = former is not None and former.entered
            self._vcpus[name] = vcpu
        vcpu.tgid, vcpu.tid = int(rows["tgid"][-1]), int(rows["tid"][-1])
        vcpu.looked, vcpu.judged = None, False
        vcpu.entered |= bool((rows["kind"] == ENTRY).any())
        after, before = states(vcpu.state, rows, self._idle_codes)
        passed = np.diff(times, prepend=vcpu.last)
        guest = vcpu.guest + np.cumsum(np.where(before == GUEST, passed, 0))
        idle = vcpu.idle + np.cumsum(np.where(before == IDLE, passed, sum(off_cpu(rows, before, passed))))
        first, last = vcpu.last // self._edge + 1, int(times[-1]) // self._edge
        if last >= first:
            edges = np.arange(first, last + 1)
            at = np.append(vcpu.last, times)
            values = [np.interp(edges * self._edge, at, np.append(was, sums))
                      for was, sums in ((vcpu.guest, guest), (vcpu.idle, idle))]  # fmt: skip
            vcpu.edges = np.concatenate([vcpu.edges, np.column_stack([edges, *values])])
        vcpu.last, vcpu.state = int(times[-1]), int(after[-1])
        vcpu.guest, vcpu.idle = float(guest[-1]), float(idle[-1])
        found = self._judge(name, vcpu)
        vcpu.edges = vcpu.edges[-_PARTS:]
        return found

    def _judge(self, name: tuple[int, int], vcpu: _Vcpu) -> list[Alarm]:
        edges = vcpu.edges
        if len(edges) <= _PARTS or not vcpu.entered:
            return []
        guest, idle = (edges[_PARTS:, column] - edges[:-_PARTS, column] for column in (1, 2))
        busy = _PARTS * self._edge - idle
        low = (busy >= _PARTS * self._edge / 2) & (guest < self._below * busy)
        found = []
        for so, of_guest, of_busy in zip(low.tolist(), guest.tolist(), busy.tolist(), strict=True):
            if self._alarmed.begins(name, so):
                share = of_guest / of_busy
                text = f"in the guest for {share:.1%} of {duration(int(of_busy))} that it was busy"
                found.append(self._alarm(name, vcpu, text, 1 - share))
        return found

    def now(self, at: int) -> list[Alarm]:
        """Return alarms of vCPUs out of their guest without a row for too long, whose threads work or cannot wake."""
        if at < self._next_look:
            return []
        self._next_look = at + self._edge
        found = []
        for name, vcpu in self._vcpus.items():
            silent = at - vcpu.last
            open_question = vcpu.entered and vcpu.state == OUT and not vcpu.judged
            if open_question and silent > self._edge and name not in self._alarmed:
                found += self._look(name, vcpu, at, silent)
        gone = {name for name, vcpu in self._vcpus.items() if at - vcpu.last > 10 * _RESTART * self._nanoseconds}
        for name in gone:
            if self._vcpus[name].state != OUT or self._vcpus[name].judged:
                del self._vcpus[name]
                self._alarmed.forget({name})
        return found

    def _look(self, name: tuple[int, int], vcpu: _Vcpu, at: int, silent: int) -> list[Alarm]:
        read = self._time_of(vcpu.tgid, vcpu.tid)
        if read is None:
            vcpu.judged = True
            return []
        ran, held_up = read
        if vcpu.looked is None:
            vcpu.looked = (at, ran, held_up)
            return []
        began, ran_then, held_up_then = vcpu.looked
        if silent < self._nanoseconds or at - began < self._nanoseconds // 2:
            return []
        vcpu.judged = True
        works = ran - ran_then >= (at - began) // 2
        if not works and not (held_up and held_up_then):
            return []
        self._alarmed.begins(name, True)
        how = "runs" if works else "sleeps, not to be woken,"
        return [self._alarm(name, vcpu, f"its thread {how} outside of the guest since {duration(silent)}", 1.0)]

    def _alarm(self, name: tuple[int, int], vcpu: _Vcpu, text: str, severity: float) -> Alarm:
        return Alarm("guest-share", f"vCPU {name[1]} of process {vcpu.tgid}: {text}", severity)
