# SPDX-License-Identifier: Apache-2.0
"""The sources of an analysis: recordings, and the opening of a file as what it is, a recording or a result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import polars as pl

from analysis.reading import rows
from analysis.reading.recorded_time import RecordedTime, recorded_times
from analysis.reading.result_source import NEITHER, Result, open_parquet
from replay.result import KEY
from replay.timing.diagnosis import Diagnosis
from traces import metadata
from traces.errors import Problem
from traces.foreign import of_parquet
from traces.reader import Trace
from traces.selection import ALL, Selection

if TYPE_CHECKING:
    from traces.imports.guest_switches import GuestTasks

# Kinds that only a guest's entry leads to: a kernel that shows no entries (KVM in software, PVM) shows none of them.
_OF_GUESTS: Final = (
    "kvm_entry", "kvm_exit", "kvm_page_fault", "fast_page_fault", "kvm_mmu_set_spte", "kvm_mmu_spte_requested",
    "mmu_load", "root_get", "kvm_smm_transition", "kvm_cr", "kvm_mmio", "kvm_pio", "kvm_emulate_insn",
    "kvm_inj_exception",
)  # fmt: skip


@dataclass(frozen=True)
class GuestOfVm:
    """What was recorded inside the guest of one VM."""

    vm: int
    tasks: GuestTasks


class Recording:
    """A trace, with the kinds of event that it could have seen.

    `kinds` are those that were watched. `hidden` are those that were watched and could not be seen of these guests:
    that there is no such row does not mean that there was no such event.
    """

    def __init__(self, trace: Trace, window: rows.Window = rows.ALL) -> None:
        """`window` selects the rows of the trace that questions are asked of."""
        self.trace = trace
        self.window = window
        self.path = trace.path
        meta = trace.metadata
        watched = {str(probe.get("kind")) for probe in meta.probes if probe.get("how") != "none"}
        self.hidden = _hidden(trace, watched)
        self.kinds = frozenset(watched | {kind for kind, count in meta.kinds.items() if count}) - self.hidden
        self.guest: GuestOfVm | None = None  # what was recorded inside a guest
        self.symbol: Callable[[int], str] | None = None  # the name of a guest's address
        self.notes: list[str] = []  # what queries could not answer
        self.diagnosed: dict[tuple[bool, int], list[Diagnosis]] = {}  # keys: whether it was replayed, `exits`
        self._answers: dict[str, pl.DataFrame] = {}

    @classmethod
    def open(cls, path: Path | str, recorded_policy: str = "", selection: Selection = ALL) -> Recording:
        """Open a trace, or what is selected of it. Raises Problem if it is not a valid trace.

        For `recorded_policy` see `Trace.open`.
        """
        trace = Trace.open(path, recorded_policy)
        trace.check_span()
        since, _ = selection.window(trace)
        return cls(selection.of(trace), rows.Window(since, frozenset(selection.vcpus)))

    @cached_property
    def span(self) -> tuple[int, int]:
        """Boot ns of the first and the last row in the window; 0 where there is none."""
        first, last = self.metadata.span
        return max(first, self.window.since or first), last

    @cached_property
    def spans(self) -> dict[int, tuple[int, int]]:
        """Boot ns of each VM's first and last row in the window."""
        since = self.window.since
        return {
            vm: (max(first, since or first), last)
            for vm, (first, last) in self.metadata.spans.items()
            if since is None or last >= since
        }

    @cached_property
    def whole(self) -> Recording:
        """This recording from its first row on, wherever the window begins."""
        return self if self.window.since is None else Recording(self.trace, rows.Window(vcpus=self.window.vcpus))

    @property
    def replayed(self) -> bool:
        """Whether a replay has filled `times`."""
        return "times" in vars(self)

    @cached_property
    def times(self) -> list[RecordedTime]:
        """The time of each VM; the recording is read for it, unless its replay has set it."""
        return recorded_times(self.trace)

    @property
    def metadata(self) -> metadata.Metadata:
        return self.trace.metadata

    def scan(self) -> pl.LazyFrame:
        """Return the rows in the window; each row group is checked before it is read."""
        found = self.trace.scan()
        if self.window.since is not None:
            found = found.filter(pl.col("time") >= self.window.since)
        return found.filter(pl.col("vcpu").is_in(list(self.window.vcpus))) if self.window.vcpus else found

    def ask(self, *questions: rows.Question) -> list[pl.DataFrame]:
        """Return the answers to questions about the rows, with one pass for those that were not asked before.

        Raises Problem where the trace is damaged.
        """
        if any(question.name not in self._answers for question in questions):
            self.take(self.asking(*questions))
        return [self._answers[question.name] for question in questions]

    def asking(self, *questions: rows.Question) -> rows.Asking:
        """Return the questions that were not asked before, to be fed by who reads the rows; see `take`."""
        new = {question.name: question for question in questions if question.name not in self._answers}
        return rows.Asking(self.trace, list(new.values()), self.window)

    def take(self, asking: rows.Asking) -> None:
        """Keep the answers; rows that `asking` was not given are read now. Raises Problem as `ask` does."""
        self._answers |= asking.answers()

    def note(self, *lines: str) -> None:
        """Note, once each, what a query could not answer."""
        self.notes += [line for line in dict.fromkeys(lines) if line not in self.notes]

    def need(self, kinds: Iterable[str], what: str) -> None:
        """Raise Problem unless these kinds of event were watched."""
        lacking = [kind for kind in kinds if kind not in self.kinds]
        if lacking:
            if not self.hidden.isdisjoint(lacking):
                raise Problem(f"{self.path}: {what}: {', '.join(lacking)} not observable: {HIDDEN}")
            raise Problem(f"{self.path}: {what}: {', '.join(lacking)} not recorded ({self.why_not(lacking[0])})")

    def why_not(self, kind: str) -> str:
        """Return why a kind was not recorded."""
        whys = {str(probe.get("kind")): str(probe.get("why", "")) for probe in self.metadata.probes}
        return whys.get(kind) or "the preset did not ask for it: --events mmu has most, all has every kind"


HIDDEN: Final = "this kernel shows none of these guests, which did run"


def _hidden(trace: Trace, watched: Collection[str]) -> frozenset[str]:
    """Return watched kinds without a row although a guest ran, as a KVM_RUN that returned without error shows."""
    counts = trace.metadata.kinds
    if counts.get("kvm_entry") or counts.get("kvm_exit") or not counts.get("kvm_userspace_exit"):
        return frozenset()
    with suppress(Problem):  # where the file is damaged, each query reports that itself
        for batch in trace.batches(["kind", "ret"]):
            rows = pl.DataFrame(pl.from_arrow(batch))
            if ((rows["kind"] == "kvm_userspace_exit") & (rows["ret"] >= 0)).any():
                return frozenset(kind for kind in _OF_GUESTS if kind in watched and not counts.get(kind))
    return frozenset()


def open_source(path: Path | str, recorded_policy: str = "", selection: Selection = ALL) -> Recording | Result:
    """Open a trace or a result, whichever the file is, or what is selected of it. Raises Problem for other files.

    For `recorded_policy` see `Trace.open`; a result has its own.
    """
    path = Path(path)
    pairs = open_parquet(path).metadata.metadata or {}
    if KEY in pairs:
        if recorded_policy:
            raise Problem(f"{path}: a result is of a policy already: --recorded-policy is for traces")
        if selection.vcpus or selection.since or selection.until:
            raise Problem(f"{path}: a result is of whole VMs: --vcpu, --from and --to are for traces")
        return Result.open(path).selected(selection.vms)
    if metadata.KEY in pairs:
        return Recording.open(path, recorded_policy, selection)
    raise Problem(f"{path}: {NEITHER}, but {of_parquet(path)}")
