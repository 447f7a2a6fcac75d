# SPDX-License-Identifier: Apache-2.0
"""The conformance check: the recording says which thread runs next, and the model predicts what that thread does.

Rows that no root policy decides (entries, exits, the addresses of faults, SMM transitions, ioctls, what the host maps)
are fed into the model. Every row that is a response of the MMU is predicted by the thread's current activity and
compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

from replay.validate.expect import Activity, Expect
from replay.validate.row_tuples import RowTuple

# The kinds of row that are responses of the MMU, which the model predicts.
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
# Rows of the host's scheduler and power management may come at any time, and KVM does nothing in response.
_OF_THE_HOST: Final = ("sched_in", "host_suspend")
_CONTEXT: Final = 6  # rows before and after a divergence that are kept


@dataclass
class MatchTally:
    """Numbers of rows of one kind: as predicted, not as predicted (or not
    predicted at all), and predicted but not recorded.
    """

    matched: int = 0
    mismatched: int = 0
    missing: int = 0


@dataclass(frozen=True)
class Divergence:
    """The first difference between recording and model: the recorded row, why
    it differs, and the rows before and after it.
    """

    row: RowTuple
    why: str
    before: tuple[RowTuple, ...]
    after: list[RowTuple]


@dataclass
class SilentActivity:
    """An activity that has shown nothing yet. It is over before its thread's next row of any kind.

    `idle` tells whether it would find nothing to do now. `passed` says that this was so at some moment since it began;
    the activity may then end without showing anything.
    """

    activity: Activity
    idle: Callable[[], bool]
    passed: bool


@dataclass
class Thread:
    activities: list[Activity] = field(default_factory=list)
    silent: SilentActivity | None = None  # the top activity, until the thread's next row
    pending: Expect | None = None  # the row that the top activity expects, unless it waits
    notifier: Activity | None = None  # the last activity begun by `_begin_perhaps`
    vcpu: int | None = None
    obsolete: bool = False  # the thread is in kvm_mmu_free_obsolete_roots
    unloads: int | None = None  # it is in kvm_mmu_unload for this vCPU, which may be another thread's
    ioctl: int = 0
    responds_only: bool = True  # it has only shown responses, as a kernel worker does


class VmCheck(ABC):
    """The check of one VM: its threads, each with its current activities.

    Subclasses say which activities rows begin, and what other rows do to the model.
    """

    responses: Collection[str] = RESPONSES

    def __init__(self) -> None:
        self.tallies: dict[str, MatchTally] = {}
        self.first: Divergence | None = None
        self._threads: dict[int, Thread] = {}
        self._silent: list[SilentActivity] = []  # silent activities of all threads that have not `passed`
        self._recent: deque[RowTuple] = deque(maxlen=_CONTEXT)

    def run(self, rows: Iterable[RowTuple]) -> None:
        """Process a VM's rows in order of recording."""
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
        """Drop the results of all comparisons so far, and keep the state of the model."""
        self.tallies.clear()
        self.first = None

    def finish(self) -> None:
        """End the check at the end of the recording: responses that are still expected count as missing."""
        for thread in self._threads.values():
            if thread.silent is not None:
                self._decide(thread, None)
            self._settle(thread, None)

    @abstractmethod
    def _begun_by(self, thread: Thread, row: RowTuple) -> Activity | None:
        """Return the activity of which a response is the first sign, if nothing was expected of the thread.

        None if unknown.
        """

    @abstractmethod
    def _happen(self, thread: Thread, row: RowTuple) -> None:
        """Apply a row that is not a response to the model."""

    def _respond(self, thread: Thread, row: RowTuple, stopped: str = "") -> None:
        """Compare a response with what is expected of its thread.

        `stopped` says how the row differs from what an activity would have shown that is now taken to have stopped
        before it.
        """
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
        """Return what the thread's innermost unfinished activity expects now, after what other threads did."""
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
        """Begin an activity that may find nothing to do: rows of other threads
        may come before its first, or it may show none.
        """
        if thread.activities and thread.activities[-1] is thread.notifier:
            self._end_notifier(thread, thread.notifier)
        self._begin(thread, activity)
        thread.notifier = activity
        thread.silent = SilentActivity(activity, idle, idle())
        if not thread.silent.passed:
            self._silent.append(thread.silent)

    def _end_notifier(self, thread: Thread, notifier: Activity) -> None:
        """End a thread's notifier as the next one begins: responses that it still expects count as missing."""
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
        """Decide, at the thread's next row, whether the row is the first of its
        silent activity or that activity showed nothing.
        """
        silent, thread.silent = thread.silent, None
        assert silent is not None
        if silent in self._silent:
            self._silent.remove(silent)
        if silent.passed and self._misfits(thread, row):
            thread.activities.pop().close()
            thread.pending = None

    def _misfits(self, thread: Thread, row: RowTuple | None) -> bool:
        """Return whether a row is not what the top activity expects, even if optional rows are skipped."""
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
        """The thread begins something else: responses that its activities still expect count as missing."""
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
