# SPDX-License-Identifier: Apache-2.0
"""The conformance check: the recording says which thread runs next, the model predicts what it does.

Rows that no root policy decides (entries, exits, faults' addresses, SMM transitions, ioctls, what the host maps) are
put into the model; every row that is the MMU's response is predicted by the thread's activity (`steps`) and compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

from replay.validate.expect import Activity, Expect
from replay.validate.row_tuples import RowTuple

# What the kernel does in response, and the model therefore predicts.
RESPONSES: Final = (
    "kvm_mmu_get_page",
    "kvm_mmu_prepare_zap_page",
    "kvm_tdp_mmu_spte_changed",
    "kvm_mmu_set_spte",
    "mark_mmio_spte",
    "check_mmio_spte",
    "handle_mmio_page_fault",
    "fast_page_fault",
    "kvm_mmu_spte_requested",
    "kvm_mmu_split_huge_page",
    "root_get",
    "mmu_load",
    "root_put",
    "zap_root_begin",
    "zap_root_end",
    "table_free",
)
# The host's scheduler and power management: they come in the middle of anything, and KVM does nothing in response.
_OF_THE_HOST: Final = ("sched_in", "host_suspend")
_CONTEXT: Final = 6


@dataclass
class MatchTally:
    """Rows of one kind: as predicted, not as predicted (or not predicted at all), and predicted but never recorded."""

    matched: int = 0
    mismatched: int = 0
    missing: int = 0


@dataclass(frozen=True)
class Divergence:
    """The first difference: what was recorded, what the model had predicted, and the rows before and after."""

    row: RowTuple
    why: str
    before: tuple[RowTuple, ...]
    after: list[RowTuple]


@dataclass
class SilentActivity:
    """An activity of which nothing was seen yet. It is over before its thread's next row of any kind.

    `idle` says whether it would find nothing to do now; `passed`, whether that was so at some moment since it began:
    then that it shows nothing is one of the outcomes that the rows permit.
    """

    activity: Activity
    idle: Callable[[], bool]
    passed: bool


@dataclass
class Thread:
    activities: list[Activity] = field(default_factory=list)
    silent: SilentActivity | None = None  # the top activity, until the thread's next row
    pending: Expect | None = None  # what the top activity has said, unless it waits
    notifier: Activity | None = None  # the last one that it began
    vcpu: int | None = None
    obsolete: bool = False  # in kvm_mmu_free_obsolete_roots
    unloads: int | None = None  # in kvm_mmu_unload of this vCPU, which need not be the thread's own
    ioctl: int = 0
    responds_only: bool = True  # as a kernel's worker, of which no other row is seen


class VmCheck(ABC):
    """A VM's threads, each with what it is in the middle of; subclasses say what begins and what happens."""

    responses: Collection[str] = RESPONSES

    def __init__(self) -> None:
        self.tallies: dict[str, MatchTally] = {}
        self.first: Divergence | None = None
        self._threads: dict[int, Thread] = {}
        self._silent: list[SilentActivity] = []  # of all threads, those that have not passed
        self._recent: deque[RowTuple] = deque(maxlen=_CONTEXT)

    def run(self, rows: Iterable[RowTuple]) -> None:
        """Go through a VM's rows in order of recording."""
        for row in rows:
            if row.kind in _OF_THE_HOST:
                continue
            thread = self._threads.setdefault(row.tid, Thread())
            if row.vcpu is not None:
                thread.vcpu = row.vcpu
            if thread.silent is not None:
                self._decide(thread, row)
            if row.kind in self.responses:
                self._respond(thread, row)
            else:
                self._happen(thread, row)
            if self._silent:
                self._pass_idle()
            self._recent.append(row)
            if self.first is not None and len(self.first.after) < _CONTEXT:
                self.first.after.append(row)

    def forget(self) -> None:
        """What was compared so far does not count; the state that it led to stays."""
        self.tallies.clear()
        self.first = None

    def finish(self) -> None:
        """The recording ended: what threads are still expected to show will not come."""
        for thread in self._threads.values():
            if thread.silent is not None:
                self._decide(thread, None)
            self._settle(thread, None)

    @abstractmethod
    def _begun_by(self, thread: Thread, row: RowTuple) -> Activity | None:
        """The activity whose first sign a response is, where nothing was expected of the thread."""

    @abstractmethod
    def _happen(self, thread: Thread, row: RowTuple) -> None:
        """What is no response is put into the model."""

    def _respond(self, thread: Thread, row: RowTuple, stopped: str = "") -> None:
        """`stopped`: how the row differs from what an activity, now taken to have stopped before, would have shown."""
        expected = self._expected(thread)
        if expected is None:
            activity = self._begun_by(thread, row)
            if activity is None:
                self._diverge(row, stopped or f"{row.kind} recorded, nothing expected of this thread")
                return
            thread.activities.append(activity)
            expected = self._expected(thread)
        while expected is not None:
            why = expected.misfit(row)
            if not why:
                self._tally(row.kind).matched += 1
                self._send(thread, row)
                return
            if expected.optional:
                self._send(thread, None)
                expected = self._expected(thread)
                continue
            if expected.may_stop:
                thread.activities.pop().close()
                thread.pending = None
                self._respond(thread, row, stopped or (why if row.kind == expected.kind else ""))
                return
            self._diverge(row, why)
            self._drop(thread)
            return
        self._diverge(row, f"{row.kind} recorded, nothing more expected of this thread")

    def _expected(self, thread: Thread) -> Expect | None:
        """What the thread's innermost unfinished activity expects now, given what other threads did meanwhile."""
        while thread.activities:
            if thread.pending is None:
                try:
                    thread.pending = next(thread.activities[-1])
                except StopIteration:
                    thread.activities.pop()
                    continue
            if thread.pending is not None:
                return thread.pending
        return None

    def _send(self, thread: Thread, row: RowTuple | None) -> None:
        thread.pending = None
        try:
            thread.pending = thread.activities[-1].send(row)
        except StopIteration:
            thread.activities.pop()

    def _drop(self, thread: Thread) -> None:
        for activity in thread.activities:
            activity.close()
        thread.activities.clear()
        thread.pending = None

    def _begin(self, thread: Thread, activity: Activity) -> None:
        thread.activities.append(activity)
        thread.pending = None

    def _begin_perhaps(self, thread: Thread, activity: Activity, idle: Callable[[], bool]) -> None:
        """As `_begin`, for what may find nothing to do: other threads' rows may come before its first, or for ever."""
        if thread.activities and thread.activities[-1] is thread.notifier:
            self._end_notifier(thread, thread.notifier)
        self._begin(thread, activity)
        thread.notifier = activity
        thread.silent = SilentActivity(activity, idle, idle())
        if not thread.silent.passed:
            self._silent.append(thread.silent)

    def _end_notifier(self, thread: Thread, notifier: Activity) -> None:
        """A thread's notifier is over when it begins the next: what it still expected is missing."""
        while thread.activities and thread.activities[-1] is notifier:
            if thread.pending is None:
                try:
                    thread.pending = next(notifier)
                except StopIteration:
                    thread.activities.pop()
                continue
            if thread.pending.optional:
                self._send(thread, None)
                continue
            if not thread.pending.may_stop:
                self._tally(thread.pending.kind).missing += 1
                if self._recent:
                    self._remember(self._recent[-1], f"{thread.pending} expected after it, another notifier recorded")
            thread.activities.pop().close()
            thread.pending = None

    def _pass_idle(self) -> None:
        for silent in self._silent:
            silent.passed = silent.idle()
        self._silent = [silent for silent in self._silent if not silent.passed]

    def _decide(self, thread: Thread, row: RowTuple | None) -> None:
        """The thread's next row is the first sign of what was silent so far, or that has passed without one."""
        silent, thread.silent = thread.silent, None
        assert silent is not None
        if silent in self._silent:
            self._silent.remove(silent)
        if silent.passed and self._misfits(thread, row):
            thread.activities.pop().close()
            thread.pending = None

    def _misfits(self, thread: Thread, row: RowTuple | None) -> bool:
        """Whether a row is none that the top activity expects, what may be left out left out."""
        activity = thread.activities[-1]
        thread.pending = next(activity, None)
        while row is not None and thread.pending is not None and thread.pending.optional and thread.pending.misfit(row):
            try:
                thread.pending = activity.send(None)
            except StopIteration:
                thread.pending = None
        return thread.pending is None or row is None or bool(thread.pending.misfit(row))

    def _check(self, row: RowTuple, holds: bool, why: str) -> None:
        if holds:
            self._tally(row.kind).matched += 1
        else:
            self._diverge(row, why)

    def _settle(self, thread: Thread, row: RowTuple | None) -> None:
        """The thread goes on to something else: what its activities still expect is missing."""
        while (expected := self._expected(thread)) is not None:
            if expected.optional:
                self._send(thread, None)
                continue
            if not expected.may_stop:
                self._tally(expected.kind).missing += 1
                if row is not None:
                    self._remember(row, f"{expected} expected, {row.kind} recorded")
            thread.activities.pop().close()
            thread.pending = None

    def _tally(self, kind: str) -> MatchTally:
        return self.tallies.setdefault(kind, MatchTally())

    def _diverge(self, row: RowTuple, why: str) -> None:
        self._tally(row.kind).mismatched += 1
        self._remember(row, why)

    def _remember(self, row: RowTuple, why: str) -> None:
        if self.first is None:
            self.first = Divergence(row, why, tuple(self._recent), [])
