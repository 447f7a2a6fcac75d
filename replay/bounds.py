# SPDX-License-Identifier: Apache-2.0
"""Turn the two bounds of an undetermined count into what is printed: one number, or an interval.

An assumption about the working set (`--refault`) picks one number from the interval of faults and re-faults, and of no
other count. `recent:K` assumes that a root that is built anew needs the K pages that were mapped last in its
predecessor. `accessed` assumes that it needs the share of pages that the recording shows to have been accessed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from replay.counted import WITHIN, Outcome, Spread
from replay.plan import Refault
from traces.errors import Problem
from traces.kernels import Kernel
from traces.kernels.spte import LARGE
from traces.reader import Trace

_ASSUMED = ("faults", "refaults")
_LARGE = np.uint64(LARGE)


@dataclass(frozen=True)
class Count:
    """A count that lies between `low` and `high`; `high` is None where the trace sets no upper bound.

    `assumed` is the one number that a working-set assumption gives, if there is one; where `high` is None it replaces
    `low`.
    """

    low: int
    high: int | None
    assumed: int | None = None

    @property
    def text(self) -> str:
        """The count as it is printed: `1,234`, `low .. high`, or `low or more`."""
        if self.high is None:
            return f"{self.low if self.assumed is None else self.assumed:,} or more"
        if self.assumed is not None:
            return f"{self.assumed:,}"
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} .. {self.high:,}"

    @property
    def value(self) -> int | list[int | None]:
        """The count as it stands in JSON: a number, or [low, high], where high is null if there is no upper bound."""
        if self.high is None:
            return [self.low if self.assumed is None else self.assumed, None]
        if self.assumed is not None:
            return self.assumed
        return self.low if self.low == self.high else [self.low, self.high]

    def __contains__(self, number: int) -> bool:
        return self.low <= number and (self.high is None or number <= self.high)


def counts(outcomes: list[Outcome], refault: Refault, share: float = 0.0) -> dict[str, Count]:
    """Return the counts of one policy by name.

    `outcomes` are all runs of that policy, of one VM or of several, whose counts are then summed. `share` is the share
    of accessed pages, from 0 to 1, and is used with `--refault accessed` only.
    """
    sums: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        ends = sums.setdefault(outcome.run.bound, {})
        for name, value in outcome.counts().items():
            # VMs need not peak at the same time, so the sum of their peaks is an upper bound.
            ends[name] = ends.get(name, 0) + value
    low, high = (sums.get(bound) or next(iter(sums.values())) for bound in ("low", "high"))
    first = outcomes[0].run.bound
    spreads = [outcome.spreads for outcome in outcomes if outcome.run.bound == first]
    found = {
        name: interval(low[name], high[name], outcomes[0], sum((each.get(name, WITHIN) for each in spreads), WITHIN))
        for name in low
    }
    for name in _ASSUMED:
        count = found[name]
        if refault.name == "recent" and len(sums) > 1:
            assumed = [part for outcome in outcomes for part in outcome.assumed]
            more = sum(int(np.minimum(part, refault.pages).sum()) for part in assumed)
            found[name] = replace(count, assumed=min(count.low + more, max(low[name], high[name])))
        elif refault.name == "accessed" and len(sums) > 1:
            found[name] = replace(count, assumed=count.low + round(share * abs(high[name] - low[name])))
    return found


def bounds_text(refault: str, *, at_least: bool) -> str:
    """Say how undetermined counts are printed: under the assumption
    `refault`, as the least (`at_least`), or as an interval.
    """
    parts = [f"assumed: --refault {refault}" if refault else "", "the least" if at_least else ""]
    return ", ".join(filter(None, parts)) or "least .. most"


def interval(one: int, other: int, outcome: Outcome, spread: Spread = WITHIN) -> Count:
    """Return the interval between the counts of two runs of a policy, widened at each end by `spread`.

    The interval has no upper bound if the policy's target says so (`at_least`) or if `spread` has none.
    """
    endless = outcome.target.at_least or spread.more is None
    return Count(max(min(one, other) - spread.less, 0), None if endless else max(one, other) + (spread.more or 0))


def accessed_share(trace: Trace, kernel: Kernel) -> float:
    """Return the share of leaves with the accessed bit, among those removed after the host began to age pages.

    Raises Problem if the trace has no such rows: an accessed bit that nobody ever cleared says nothing about recent
    use.
    """
    bit, present = np.uint64(kernel.vendor.accessed), np.uint64(kernel.spte.present)
    aged, accessed, removed = set[int](), 0, 0
    wanted = ("kvm_age_hva", "kvm_tdp_mmu_spte_changed")
    if all(trace.metadata.kinds.get(kind) for kind in wanted):
        for batch in trace.batches(["vm", "kind", "level", "old", "new"]):
            kind = np.array(batch.column("kind").to_pylist(), object)
            vm = batch.column("vm").fill_null(-1).to_numpy()
            old, new = batch.column("old").to_numpy(), batch.column("new").to_numpy()
            leaf = (batch.column("level").to_numpy() == 1) | (old & _LARGE != 0)
            begins = np.flatnonzero(kind == wanted[0])
            since = np.isin(vm, list(aged))
            for row in begins.tolist():
                since[row:] |= vm[row:] == vm[row]
            aged |= set(vm[begins].tolist())
            gone = since & (kind == wanted[1]) & leaf & (old & present != 0) & (new & present == 0)
            removed += int(gone.sum())
            accessed += int((old[gone] & bit != 0).sum())
    if not removed:
        raise Problem(
            f"{trace.path}: --refault accessed: no leaf was removed after the host had aged pages, "
            "so that nothing says which were accessed: use none, all or recent:PAGES"
        )
    return accessed / removed
