# SPDX-License-Identifier: Apache-2.0
"""Queries of a recording: why pages had to be mapped again, and what removed or protected them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import polars as pl

from analysis.passes.removal_causes import Why
from analysis.queries.registry import query
from analysis.reading.removal_counts import RemovalQuestion
from analysis.reading.sources import Recording
from traces import kernels
from traces.errors import Problem
from traces.vm_names import VmNames

_TEXTS: Final = {
    Why.FIRST: "never mapped before",
    Why.UNSEEN: "no row shows it",
    Why.UNWRITABLE: "mapped without the permission",
    Why.SMI: "SMI: root lost",
    Why.RSM: "RSM: root lost",
    Why.CR0: "CR0 write: root lost",
    Why.CR4: "CR4 write: root lost",
    Why.EFER: "EFER write: root lost",
    Why.SREGS: "KVM_SET_SREGS: root lost",
    Why.CPUID: "KVM_SET_CPUID2: root lost",
    Why.EXIT: "exit: root lost",
    Why.MEMSLOT: "memslot change",
    Why.INVALIDATION: "all roots invalidated",
    Why.NOTIFIER: "notifier: unmap",
    Why.NOTIFIER_CHANGE: "notifier: page changed",
    Why.AGING: "notifier: aging",
    Why.GET_DIRTY_LOG: "KVM_GET_DIRTY_LOG",
    Why.CLEAR_DIRTY_LOG: "KVM_CLEAR_DIRTY_LOG",
    Why.DIRTY_RING: "KVM_RESET_DIRTY_RINGS",
    Why.DIRTY_LOG_BEGINS: "dirty logging begins",
    Why.DIRTY_LOG_ENDS: "dirty logging ends",
    Why.NX_RECOVERY: "NX huge page recovery",
    Why.SPLIT: "the vCPU's own fault",
    Why.APICV: "APICv inhibited",
    Why.RANGE: "zap of a range",
    Why.IOCTL: "another ioctl",
    Why.VM_END: "VM's end",
    Why.OTHER: "not explained",
}
_NONE: Final = (Why.FIRST, Why.UNSEEN, Why.UNWRITABLE)  # causes that no removal is behind
# These are reported even where they changed nothing: their number matters, and faults wait while a notifier runs
_ASKING: Final = [
    int(why) for why in (
        Why.NOTIFIER, Why.NOTIFIER_CHANGE, Why.AGING, Why.GET_DIRTY_LOG, Why.CLEAR_DIRTY_LOG, Why.DIRTY_RING,
    )
]  # fmt: skip


def _asked(recording: Recording) -> Iterator[RemovalQuestion]:
    with suppress(Problem):
        yield _question(recording)


def _question(recording: Recording) -> RemovalQuestion:
    """Return the question for removals. Raises Problem where causes cannot be determined."""
    if recording.metadata.policy == "shadow":
        raise Problem(f"{recording.path}: under the shadow MMU a page has many SPTEs: why it is mapped again is open")
    try:
        return RemovalQuestion(recording.trace, kernels.recorded(recording.metadata))
    except Problem as problem:
        raise Problem(f"{recording.path}: {problem}") from None


def _answer(recording: Recording) -> pl.LazyFrame:
    (counted,) = recording.ask(_question(recording))
    texts = {int(why): text for why, text in _TEXTS.items()}
    words = {int(why): why.name.lower() for why in Why}
    cause = pl.col("why")
    return counted.lazy().with_columns(
        cause=cause.replace_strict(words, return_dtype=pl.String),
        by=cause.replace_strict(texts, return_dtype=pl.String),
        none=cause.is_in([int(why) for why in _NONE]),
    )


@query(Recording, needs=("kvm_mmu_set_spte",), asks=_asked)
def refaults(recording: Recording) -> pl.LazyFrame:
    """Faults by what became of the page's last mapping: mapped again after what, permission repaired after what.

    `mapped` are faults that mapped a page, `fixes` those that repaired a permission; `share` is of both, in the VM.
    `cause` is a word for programs, `by` the same as a phrase, `task` the task that caused it. A page is counted
    separately under each role word, as in a replay.
    """
    names = VmNames(recording.metadata)
    both = pl.col("mapped") + pl.col("fixes")
    return (
        _answer(recording)
        .filter(both > 0)
        .select(
            "vm", "cause", "by", "tid", pl.col("tid").map_elements(_task(names), pl.String).alias("task"),
            "mapped", "fixes", share=both / both.sum().over("vm"),
        )
        .sort(
            pl.col("cause") == Why.FIRST.name.lower(), pl.col("mapped") + pl.col("fixes"), "vm", "cause", "tid",
            descending=[False, True, False, False, False],
        )
    )  # fmt: skip


@query(Recording, needs=("kvm_mmu_set_spte",), asks=_asked)
def removals(recording: Recording) -> pl.LazyFrame:
    """What removed or protected pages, by cause and task: how often, how many, which, and for how long at least.

    `operations` of notifiers and dirty logging include those that changed nothing. `leaves` and `tables` were zapped,
    `protected` leaves made read-only, `aged` leaves lost their accessed bit, from `low_gfn` to `high_gfn`. No row shows
    when an operation ends: `ns` and `longest_ns` are until the last SPTE that it changed.
    """
    names = VmNames(recording.metadata)
    some = pl.col("low") <= pl.col("high")
    changed = pl.sum_horizontal("leaves", "tables", "protected", "aged") > 0
    return (
        _answer(recording)
        .filter(~pl.col("none"), changed | (pl.col("why").is_in(_ASKING) & (pl.col("operations") > 0)))
        .select(
            "vm", "cause", "by", "tid", pl.col("tid").map_elements(_task(names), pl.String).alias("task"),
            "operations", "leaves", "tables", "protected", "aged",
            pl.when(some).then("low").alias("low_gfn"), pl.when(some).then("high").alias("high_gfn"), "ns",
            longest_ns="longest", first_time="first", last_time="last",
        )
        .sort(
            pl.col("cause") == Why.VM_END.name.lower(), "leaves", "protected", "operations", "vm", "cause", "tid",
            descending=[False] + [True] * 3 + [False] * 3,
        )
    )  # fmt: skip


def _task(names: VmNames) -> Any:
    return lambda tid: names.task(tid) if tid >= 0 else ""
