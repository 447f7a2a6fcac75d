"""The trigger `guest-share`: a vCPU that is busy and hardly gets into its guest.

Of each vCPU two numbers are kept up, the ns that it was in the guest and the ns that do not count: halted, asleep, or
waiting for a CPU (steal). Both are known at each of its rows, and between two rows lie on a line, so that they are read
off at the edges of short intervals; the share is that over the intervals of the time asked for. Of the time that counts
there must be a half at least: else a nearly idle vCPU that handles an interrupt would be one that hangs.

A vCPU that shows no row, because its thread works in the kernel or sleeps there, is seen by its thread's CPU time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from tracer.flight.alarms import Alarm, Ongoing, Rows
from traces.durations import duration
from traces.schema import BY_NAME

KINDS: Final = ("kvm_entry", "kvm_exit", "kvm_userspace_exit", "sched_in")
_ENTRY, _EXIT, _USER, _SCHED = (BY_NAME[name].code for name in KINDS)
_SEEN: Final = np.zeros(256, np.bool_)
_SEEN[[_ENTRY, _EXIT, _USER, _SCHED]] = True
_OUT, _GUEST, _IDLE = 0, 1, 2
_UNINTERRUPTIBLE: Final = 2  # of task states: sleeps until the disk, or another thread of the host, is done
_PARTS: Final = 8  # intervals in the time asked for
_RESTART: Final = 4  # times that time without a row: what was before says nothing any more

# (ns of CPU time so far, whether it sleeps and cannot be woken) of a thread; None where it is gone.
ThreadTime = Callable[[int, int], tuple[int, bool] | None]


def thread_time(tgid: int, tid: int) -> tuple[int, bool] | None:
    """As /proc has it."""
    task = Path(f"/proc/{tgid}/task/{tid}")
    with contextlib.suppress(OSError, ValueError, IndexError):
        ran = int((task / "schedstat").read_text().split()[0])
        return ran, (task / "stat").read_text().rpartition(")")[2].split()[0] == "D"
    return None


class _Vcpu:
    """One vCPU: its state since its last row, the two sums, and them at the last edges (an edge's number first)."""

    def __init__(self, at: int, state: int) -> None:
        self.last, self.state = at, state
        self.entered = False  # ever: where entries do not show, nothing can be said of its share
        self.tgid = self.tid = 0
        self.guest = self.idle = 0.0
        self.edges: Rows = np.empty((0, 3))
        self.looked: tuple[int, int, bool] | None = None  # when its thread's time was read, and what it was
        self.judged = False  # nothing more is to be found out until its next row


class GuestShare:
    """Alarms where a vCPU's share is below `below` (0 to 1) for `nanoseconds`."""

    def __init__(
        self, below: float, nanoseconds: int, idle_codes: tuple[int, ...], time_of: ThreadTime = thread_time
    ) -> None:
        """`idle_codes`: exits of this vendor by which a guest says that it has nothing to do."""
        self._below, self._nanoseconds, self._time_of = below, nanoseconds, time_of
        self._edge = max(nanoseconds // _PARTS, 1)
        self._idle_codes = np.array(idle_codes, np.uint64)
        self._vcpus: dict[tuple[int, int], _Vcpu] = {}
        self._alarmed = Ongoing()
        self._next_look = 0

    def see(self, rows: Rows) -> list[Alarm]:
        """Take rows; the vCPUs that begin to hang by them."""
        rows = rows[_SEEN[rows["kind"]]]
        rows = rows[(rows["vcpu"] >= 0) & (rows["kvm"] != 0)]
        if not len(rows):
            return []
        kvms, vm = np.unique(rows["kvm"], return_inverse=True)
        key = (vm.astype(np.int64) << 16) | rows["vcpu"]
        order = np.argsort(key, kind="stable")
        bounds = np.flatnonzero(np.diff(key[order])) + 1
        alarms = []
        for mine in np.split(order, bounds):
            group = rows[mine]
            name = (int(kvms[vm[mine[0]]]), int(group["vcpu"][0]))
            alarms += self._follow(name, group)
        return alarms

    def _follow(self, name: tuple[int, int], rows: Rows) -> list[Alarm]:
        times = rows["time"].astype(np.int64)
        vcpu = self._vcpus.get(name)
        if vcpu is None or times[0] - vcpu.last > _RESTART * self._nanoseconds:
            former, vcpu = vcpu, _Vcpu(int(times[0]), vcpu.state if vcpu else _OUT)
            vcpu.entered = former is not None and former.entered
            self._vcpus[name] = vcpu
        vcpu.tgid, vcpu.tid = int(rows["tgid"][-1]), int(rows["tid"][-1])
        vcpu.looked, vcpu.judged = None, False
        vcpu.entered |= bool((rows["kind"] == _ENTRY).any())
        states, before = self._states(vcpu.state, rows)
        passed = np.diff(times, prepend=vcpu.last)
        guest = vcpu.guest + np.cumsum(np.where(before == _GUEST, passed, 0))
        idle = vcpu.idle + np.cumsum(np.where(before == _IDLE, passed, self._off(rows, before, passed)))
        first, last = vcpu.last // self._edge + 1, int(times[-1]) // self._edge
        if last >= first:
            edges = np.arange(first, last + 1)
            at = np.append(vcpu.last, times)
            values = [np.interp(edges * self._edge, at, np.append(was, sums))
                      for was, sums in ((vcpu.guest, guest), (vcpu.idle, idle))]  # fmt: skip
            vcpu.edges = np.concatenate([vcpu.edges, np.column_stack([edges, *values])])
        vcpu.last, vcpu.state = int(times[-1]), int(states[-1])
        vcpu.guest, vcpu.idle = float(guest[-1]), float(idle[-1])
        found = self._judge(name, vcpu)
        vcpu.edges = vcpu.edges[-_PARTS:]
        return found

    def _states(self, state: int, rows: Rows) -> tuple[Rows, Rows]:
        """The state after and before each row: a thread that is back on its CPU is where it was."""
        kind = rows["kind"]
        halted = (kind == _EXIT) & np.isin(rows["w0"], self._idle_codes)
        own = np.where(kind == _ENTRY, _GUEST, np.where(halted, _IDLE, _OUT))
        source = np.where(kind == _SCHED, -1, np.arange(len(rows)))
        source = np.maximum.accumulate(source)
        after = np.where(source >= 0, own[np.maximum(source, 0)], state)
        return after, np.append(state, after[:-1])

    def _off(self, rows: Rows, before: Rows, passed: Rows) -> Rows:
        """ns without a CPU that do not count: asleep or ready to run, but not while the host's own work holds it up."""
        off = rows["time"].astype(np.int64) - rows["w0"].astype(np.int64)
        held_up = rows["w2"] & np.uint64(_UNINTERRUPTIBLE) != 0
        ns = np.where(held_up, rows["w1"].astype(np.int64), off)
        counted = (rows["kind"] == _SCHED) & (before == _OUT)
        return np.where(counted, np.minimum(np.maximum(ns, 0), passed), 0)

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
        """The vCPUs that have shown nothing outside of their guest for too long, though their threads work."""
        if at < self._next_look:
            return []
        self._next_look = at + self._edge
        found = []
        for name, vcpu in self._vcpus.items():
            silent = at - vcpu.last
            open_question = vcpu.entered and vcpu.state == _OUT and not vcpu.judged
            if open_question and silent > self._edge and name not in self._alarmed:
                found += self._look(name, vcpu, at, silent)
        gone = {name for name, vcpu in self._vcpus.items() if at - vcpu.last > 10 * _RESTART * self._nanoseconds}
        for name in gone:
            if self._vcpus[name].state != _OUT or self._vcpus[name].judged:
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


def idle_codes(cpu: dict[str, Any]) -> tuple[int, ...]:
    """The exits by which a guest on this processor (host.cpu()) says that it has nothing to do."""
    from traces.kernels.vendors import VENDORS

    return next(((*each.hlt, *each.mwait) for each in VENDORS if each.cpu == cpu.get("vendor")), ())
