# SPDX-License-Identifier: Apache-2.0
"""The verdict: what the recorded policy cost the vCPU that it cost most, and what another would have cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Final

import numpy as np
import polars as pl

from analysis.passes.removal_causes import Why
from analysis.queries import removed, replayed
from analysis.queries.by_vm import overview
from analysis.queries.recorded import stuck_vcpus
from analysis.queries.worst import ranked, stuck_of, subject_of
from analysis.reading.result_source import Result
from analysis.reading.sources import HIDDEN, Recording
from analysis.report_model.units import Unit, format_value, span
from replay.result import SPENT
from replay.simulate.operations import Cause
from replay.timing.diagnosis import Diagnosis, plainly, summed_up
from replay.timing.soft_hangs import SoftHang
from replay.timing.time_text import base_of, compared
from replay.timing.timed_run import VcpuTime
from traces.command_line.durations import duration
from traces.errors import Problem
from traces.metadata import Metadata
from traces.text import count
from traces.vm_names import VmNames

_Ends = dict[str, tuple[VcpuTime, VcpuTime]]
_STUCK_SHOWN: Final = 4
_UNTRUSTED_SHOWN: Final = 3
_UNREAD: Final = np.zeros((0, 2 + len(SPENT)), np.int64)
# Kinds that are counted in a recording's verdict, with their nouns; `_ELSE` where exits cannot be seen.
_SHOWN: Final = (("kvm_exit", "exit"), ("kvm_page_fault", "fault"), ("mmu_load", "root load"))
_ELSE: Final = (
    ("kvm_userspace_exit", "KVM_RUN return"),
    ("ioctl", "ioctl"),
    ("memslot", "memslot change"),
    ("kvm_unmap_hva_range", "notifier unmap"),
    ("kvm_mmu_get_page", "table"),
    ("kvm_mmu_prepare_zap_page", "zapped table"),
)
_A_TENTH: Final = 0.1
_NOT_AGAIN: Final = [why.name.lower() for why in (Why.FIRST, Why.UNSEEN, Why.UNWRITABLE, Why.OTHER)]
_BOUNDS: Final = {"exact": 0, "low": 0, "high": 1}


def verdict(result: Result | None, recording: Recording | None) -> Iterator[str]:
    """Yield the sentences of the verdict, the most important first."""
    if result is None:
        yield from _recorded(recording)
        return
    yield from result.untrusted[:_UNTRUSTED_SHOWN]
    yield from _no_further([each for vm in result.vms for each in vm.stuck], recording)
    only = recording.window.vcpus if recording is not None else frozenset()
    timed = pl.all_horizontal(pl.col("wall_low_ns", "wall_high_ns", *SPENT).is_not_null())
    rows = replayed.vcpus(result).filter(pl.col("wall_ns") > 0, timed).collect(engine="streaming")
    if only:
        rows = rows.filter(pl.col("vcpu").is_in(list(only)))
    subject = subject_of(result)
    if rows.is_empty():
        yield _counted(replayed.policies(result).collect(engine="streaming"))
        yield from _mapped_again(recording)
        return
    subject = subject if subject in rows["policy"] else rows["policy"][0]
    worst = ranked(rows.filter(policy=subject), stuck_of(result)).row(0, named=True)
    mine = rows.filter(vm=worst["vm"], vcpu=worst["vcpu"])
    ends = _ends(mine, _hangs(result, worst["vm"], worst["vcpu"]))
    base = base_of(ends)
    others = sorted((name for name in ends if name != subject), key=lambda name: -ends[name][1].wall)
    other = base if base != subject else next(iter(others), "")
    yield _headline(mine, subject, other, _who(worst, recording), recorded=bool(worst["recorded"]))
    yield from compared(ends, {policy.name for policy in result.policies if policy.at_least})
    yield from _mapped_again(recording, worst["vm"])


def _mapped_again(recording: Recording | None, vm: int | None = None) -> Iterator[str]:
    """Yield what caused most faults of a VM, or of any VM; nothing if that is below a tenth, or not known."""
    if recording is None or removed.refaults.lacking(recording):
        return
    with suppress(Problem):  # where causes cannot be determined the table's note says so
        rows = removed.refaults(recording).filter(~pl.col("cause").is_in(_NOT_AGAIN), pl.col("share") >= _A_TENTH)
        mine = rows if vm is None else rows.filter(vm=vm)
        for row in mine.head(1).collect().iter_rows(named=True):
            who = VmNames(recording.metadata).vm(row["vm"])
            share = format_value(row["share"], Unit.SHARE)
            did = (
                "mapped again what had gone" if row["mapped"] >= row["fixes"] else "repaired a permission that had gone"
            )
            by, root, _ = row["by"].partition(": root lost")
            did += " with its root" if root else ""
            yield f"{share} of the recorded faults of {who} {did} ({by}{', ' * bool(row['task'])}{row['task']})"


def _no_further(found: Iterable[Diagnosis], recording: Recording | None) -> Iterator[str]:
    """Yield sentences on vCPUs that are stuck, or ended in an error."""
    who = plainly if recording is None else VmNames(recording.metadata).vcpu
    only = recording.window.vcpus if recording is not None else frozenset()
    stuck = summed_up([each for each in found if not only or each.vcpu in only], who)
    yield from stuck[:_STUCK_SHOWN]
    if len(stuck) > _STUCK_SHOWN:
        yield f"{len(stuck) - _STUCK_SHOWN:,} more got no further: query stuck has them"


def _who(worst: dict[str, Any], recording: Recording | None) -> str:
    if recording is None:
        return f"vCPU {worst['vcpu']} of VM {worst['vm']}"
    return VmNames(recording.metadata).vcpu(worst["vm"], worst["vcpu"])


def _headline(rows: pl.DataFrame, subject: str, other: str, who: str, *, recorded: bool) -> str:
    share, wall, roots = _facts(rows, subject)
    text = f"{who} spent {share} of {wall} on faults and roots, {roots}, under {subject}"
    text += " (as recorded)" if recorded else ""
    if other:
        share, wall, roots = _facts(rows, other)
        text += f"; under {other} {share} of {wall}, {roots}"
    return text


def _facts(rows: pl.DataFrame, policy: str) -> tuple[str, str, str]:
    mine = rows.filter(policy=policy)

    def over(name: str, unit: Unit) -> str:
        return span(mine[name].min(), mine[name].max(), unit)

    roots = over("roots_created", Unit.COUNT)
    built = f"{roots} root{'' if roots == '1' else 's'} built"
    return over("refill_share", Unit.SHARE), over("wall_ns", Unit.NS), built


def _ends(rows: pl.DataFrame, hangs: dict[tuple[str, str], list[SoftHang]]) -> _Ends:
    """Return a vCPU's times under each policy: those of the low and the high bound, or the same twice."""
    found: _Ends = {}
    for row in sorted(rows.iter_rows(named=True), key=lambda row: _BOUNDS.get(row["bound"], 0)):
        spent = tuple(int(row[name]) for name in SPENT)
        mine = hangs.get((row["policy"], row["bound"]), [])
        # No sentence needs its error and progress.
        time = VcpuTime(
            id=row["vcpu"], wall=row["wall_ns"], spent=spent, stalls=mine, error=0.0, open=(0, 0), progress=_UNREAD
        )  # fmt: skip
        found[row["policy"]] = (found[row["policy"]][0], time) if row["policy"] in found else (time, time)
    return {policy: found[policy] for policy in rows["policy"].unique(maintain_order=True)}


def _hangs(result: Result, vm: int, vcpu: int) -> dict[tuple[str, str], list[SoftHang]]:
    found: dict[tuple[str, str], list[SoftHang]] = {}
    rows = replayed.stalls(result).filter(pl.col("vm") == vm, pl.col("vcpu") == vcpu).collect(engine="streaming")
    for row in rows.drop_nulls(("clock", "wall_ns")).sort("clock").iter_rows(named=True):
        cause = Cause.__members__.get((row["cause"] or "").upper(), Cause.OTHER)
        spent = tuple(int(row[name] or 0) for name in SPENT)
        hang = SoftHang(row["clock"], row["clock"] + row["wall_ns"], cause, spent)
        found.setdefault((row["policy"], row["bound"]), []).append(hang)
    return found


def _counted(policies: pl.DataFrame) -> str:
    """Return the counts of each policy, for a result without times."""
    parts = []
    for row in policies.iter_rows(named=True):
        counts = ", ".join(
            f"{span(row[f'{name}_low'], row[f'{name}_high'], Unit.COUNT)} {what}"
            for name, what in (("roots_created", "roots built"), ("faults", "faults"), ("refaults", "re-faults"))
        )
        parts.append(f"{row['policy']}{' (as recorded)' if row['recorded'] else ''}: {counts}")
    return "; ".join(parts) or "no policy was replayed"


def _recorded(recording: Recording | None) -> Iterator[str]:
    """Yield sentences on the recording alone; what could not be seen, or was lost, is named and never 0."""
    if recording is None:
        return
    if "kvm_exit" in recording.kinds:
        with suppress(Problem):  # where the file is damaged, the tables report that
            yield from _no_further(stuck_vcpus(recording), recording)
    meta = recording.metadata
    first, last = recording.span
    if recording.window.since is not None or recording.window.vcpus:
        yield from _of_window(recording)
        return
    # Where nothing shows a guest's entries, a root that nobody saw may be there all the same.
    seen = overview(recording).select(pl.col("roots").sum()).collect().item() if recording.trace.partial else None
    seen = meta.root_count if seen is None else seen
    roots = [f"{count(seen, 'root')} seen"] if seen or not recording.hidden else []
    vms = VmNames(meta).vm(meta.vms[0]["id"]) if len(meta.vms) == 1 else count(len(meta.vms), "VM")
    parts = [
        text
        for kind, what in (_SHOWN if "kvm_exit" in recording.kinds else (*_SHOWN, *_ELSE))
        if kind in recording.kinds and (text := _count_of(meta, kind, what))
    ]
    yield f"{vms} in {duration(last - first)}: {', '.join([*roots, *parts])}"
    yield from _mapped_again(recording)
    if recording.hidden:
        names = [what for kind, what in _SHOWN if kind in recording.hidden]
        yield f"not observable: {', '.join(f'{name}s' for name in names)}: {HIDDEN}"
    unknown = [f"{what}s" for kind, what in _SHOWN if not meta.kinds.get(kind) and meta.loss.get(kind, {}).get("lost")]
    if unknown:
        yield f"not known, for they were lost: {', '.join(unknown)}"


def _count_of(meta: Metadata, kind: str, what: str) -> str:
    """Return how many events of a kind there are: at least, where some were lost; empty if none of those is left."""
    number = meta.kinds.get(kind, 0)
    if not meta.loss.get(kind, {}).get("lost"):
        return count(number, what)
    return f"at least {count(number, what)}" if number else ""


def _of_window(recording: Recording) -> Iterator[str]:
    """Yield a sentence on the worst VM in the window, of which the metadata has no counts."""
    first, last = recording.span
    worst = overview(recording).collect().row(0, named=True)
    counts = [
        count(worst[name], noun)
        for name, noun in (("exits", "exit"), ("faults", "fault"), ("roots", "root"))
        if worst[name] is not None
    ]
    in_guest = f", {format_value(worst['guest_share'], Unit.SHARE)} in the guest" if worst["guest_share"] else ""
    yield f"{VmNames(recording.metadata).vm(worst['vm'])} in {duration(last - first)}: {', '.join(counts)}{in_guest}"
