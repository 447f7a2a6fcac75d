# SPDX-License-Identifier: Apache-2.0
"""The report on a fleet: verdict, what it rests on, tables and gates, in the model that all formats render."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import polars as pl

from analysis.fleet.fleet_gates import checked, figures
from analysis.fleet.fleet_tables import policies, tables
from analysis.fleet.judged import AGREEMENTS
from analysis.fleet.outcome import FleetOutcome
from analysis.fleet.outliers import RULE, outliers
from analysis.gates import Gate
from analysis.report_model.report import Report
from analysis.report_model.units import Unit, span
from replay.timing.stalls import Rule
from traces.command_line.durations import duration
from traces.text import count, printable


def fleet_report(found: FleetOutcome, where: str, gates: Sequence[Gate] = ()) -> Report:
    """Return the report on a fleet's results. Raises Problem for a gate on a figure that does not exist."""
    best = best_policy(found)
    all_figures = figures(found)
    return Report(
        title=printable(where),
        verdict=tuple(map(printable, _verdict(found, best))),
        trust=tuple((name, printable(text)) for name, text in _trust()),
        tables=tuple(tables(found, best)),
        checks=tuple(checked(gates, all_figures)),
        figures=all_figures,
    )


def best_policy(found: FleetOutcome) -> str:
    """Return the other policy that certainly saves most soft-hang time; empty if none may save any.

    Only VMs whose replay agrees with their rows count. If there are none, VMs for which that is undecided count, and if
    there are none of these either, those whose replay differs.
    """
    saves = (pl.col("saved_high_ns") > 0) | pl.col("saved_high_ns").is_null()
    for agreement in AGREEMENTS:
        order = policies(found, agreement)
        others = order.filter(pl.col("others") > 0) if len(order) else order
        may = others.filter(saves) if len(others) else others
        if len(others):
            return str(may["policy"][0]) if len(may) else ""
    return ""


def _verdict(found: FleetOutcome, best: str) -> Iterator[str]:
    (whole,) = found.recorded().to_dicts()
    hosts = found.hosts.filter("own")["host"].n_unique()
    if not whole["vms"]:
        yield (
            f"no VM was replayed: {count(found.failed, 'task')} failed"
            if found.failed
            else "no results: nothing is in it"
        )
        return
    hung = span(whole["hung_low"], whole["hung_high"], Unit.COUNT)
    times = span(whole["stalls_low"], whole["stalls_high"], Unit.COUNT)
    long = span(whole["stalled_low_ns"], whole["stalled_high_ns"], Unit.LONG)
    recorded = (
        f"{count(hosts, 'host')}, {count(found.recordings, 'recording')} of {count(whole['vms'], 'VM')} with "
        f"{count(whole['vcpus'], 'vCPU')}, {_long(whole['vm_ms'])} of VM and {_long(whole['vcpu_ms'])} of vCPU time"
    )
    said = (
        f"{hung} of {whole['timed']:,} VMs had {times} soft-hangs, {long} in all"
        if whole["hung_high"]
        else (f"none of {whole['timed']:,} VMs had a soft-hang" if whole["timed"] else "soft-hangs are not known")
    )
    yield f"as recorded {said}: {recorded}"
    yield _change(found, best)
    yield from _apart(found, best, whole)
    far = len(outliers(found.recorded("host", "kernel", "vendor", frame=found.hosts)))
    if far:
        yield f"{count(far, 'host')} out of line with others of the same kernel and vendor"


def _long(ms: int) -> str:
    return span(ms * 10**6, ms * 10**6, Unit.LONG)


def _change(found: FleetOutcome, best: str) -> str:
    if not best:
        tried = ", ".join(found.policies)
        return f"no other policy ({tried}) saves soft-hang time" if tried else "no other policy was replayed"
    (row,) = found.under(best).to_dicts()
    if not row["others"]:
        return (
            f"no VM recorded under another policy than {best} is known to replay as its rows show: none counts as gain"
        )
    saved = span(row["saved_low_ns"], row["saved_high_ns"], Unit.LONG)
    spared = span(row["spared_low"], row["spared_high"], Unit.COUNT)
    return (
        f"under {best} {row['gain']:,} of {row['others']:,} VMs recorded under another policy gain, {row['lose']:,} "
        f"lose, for {row['undecided']:,} the recordings leave it open: {saved} of soft-hangs saved, {spared} faults "
        "spared"
    )


def _apart(found: FleetOutcome, best: str, whole: dict[str, int]) -> Iterator[str]:
    """Yield sentences on the VMs, rows and tasks that are not in the gains, and why."""
    by = {row["own_policy"]: row for row in found.recorded("own_policy").to_dicts()}
    lines = []
    for agreement, what in (
        ("differs", "whose replay is not what their rows show"),
        ("open", "of which that cannot be decided"),
    ):
        if agreement not in by:
            continue
        text = f"{count(by[agreement]['vms'], 'VM')} {what}"
        if best:
            (row,) = found.under(best, agreement=agreement).to_dicts()
            saved = span(row["saved_low_ns"], row["saved_high_ns"], Unit.LONG)
            text += f" ({row['gain']:,} would gain, {saved})"
        lines.append(text)
    if untimed := whole["vms"] - whole["timed"]:
        lines.append(f"{count(untimed, 'VM')} without times")
    unpaired = int(found.groups["unpaired"].sum())
    if unpaired:
        lines.append(f"{count(unpaired, 'row')} without one of the recorded policy to compare with")
    if found.failed:
        lines.append(count(found.failed, "failed task"))
    if lines:
        yield f"not in these gains: {'; '.join(lines)}"
    if found.lossy:
        yield f"{count(found.lossy, 'recording')} lost {count(found.lost, 'event')}: what they count is the least"


def _trust() -> Iterator[tuple[str, str]]:
    yield "VMs", "each counts once in each of its recordings"
    rule = Rule()
    yield "soft-hang", f"{duration(rule.window)} or more with less than {rule.share:.0%} in the guest or halted"
    yield (
        "gain",
        (
            "less soft-hang time than under the recorded policy, at least, of "
            "VMs whose replay under the recorded policy is what their rows show"
        ),
    )
    yield "outliers", RULE
