# SPDX-License-Identifier: Apache-2.0
"""The output of `kvmtrace fleet index` and `fleet replay`, as text and as JSON documents."""

from __future__ import annotations

import sys
from typing import Any, Final

import polars as pl

from replay.fleet.fleet_catalogue import Catalogue, Indexed
from replay.fleet.fleet_run import FleetRun
from traces.command_line.screen import Page
from traces.text import count, some

SHOWN: Final = 10  # the most broken objects, or reasons of failed tasks, that are shown


def indexed_to_dict(found: Indexed, where: str) -> dict[str, Any]:
    """Return the document of `fleet index --json`."""
    rows = found.catalogue.rows.filter(pl.col("reason") == "")
    return {
        "catalogue": where, "root": found.catalogue.root,
        "traces": rows["trace"].n_unique(), "vms": rows.height,
        "bytes": int(rows.unique("trace")["size"].sum()),
        "objects": {"read": found.read, "kept": found.kept, "gone": found.gone, "of_other_names": found.others},
        "broken": found.catalogue.broken.select("trace", "size", "reason").to_dicts(),
    }  # fmt: skip


def render_indexed(found: Indexed, where: str) -> str:
    """Return the text of `fleet index`."""
    page = Page()
    facts = indexed_to_dict(found, where)
    page.say(
        f"{where}: {count(facts['vms'], 'VM')} in {count(facts['traces'], 'recording')} of {found.catalogue.root}, "
        f"{facts['bytes'] / 1e6:,.1f} MB"
    )
    taken = [count(found.read, "footer") + " read", f"{found.kept:,} as they were", f"{found.gone:,} gone"]
    others = f"; {count(found.others, 'object')} of other names not looked at" if found.others else ""
    page.say(", ".join(taken) + others)
    broken = facts["broken"]
    if broken:
        page.say(f"{count(len(broken), 'object')} cannot be replayed:", "bold red")
        for each in broken[:SHOWN]:
            page.say(f"  {each['trace']}: {each['reason']}", indent="    ")
        page.more(len(broken) - SHOWN, "such objects")
    return page.text


def warn_of_folders(results: str, root: str) -> None:
    """Warn that each machine of a remote cluster must have the folders that are named."""
    print(f"kvmtrace: the workers must have the same folders: {root}, {results}", file=sys.stderr)


def replayed_to_dict(done: FleetRun, catalogue: Catalogue, where: str) -> dict[str, Any]:
    """Return the document of `fleet replay --json`; times are in ns."""
    return {
        "results": where, "root": catalogue.root,
        "tasks": {
            "all": done.tasks, "done": done.done, "before": done.before - done.failed_before,
            "failed": len(done.failed), "failed_before": done.failed_before,
        },
        "rows": done.rows, "ns": int(done.seconds * 1e9), "merged": done.merged,
        "failed": [{"trace": each.task.trace, "vm": each.task.vm, "reason": each.reason} for each in done.failed],
    }  # fmt: skip


def render_replayed(done: FleetRun, catalogue: Catalogue, where: str) -> str:
    """Return the text of `fleet replay`."""
    page = Page()
    seconds = max(done.seconds, 1e-3)
    before = done.before - done.failed_before
    page.say(
        f"{where}: {count(done.done, 'VM')} replayed, {before:,} were there"
        + (f", {len(done.failed):,} failed" if done.failed else "")
        + (f"; {done.rows:,} rows in {seconds:.1f} s, {done.done / seconds:.1f} VMs a second" if done.done else "")
    )
    left_out = catalogue.broken["trace"].n_unique()
    if left_out:
        page.say(f"{count(left_out, 'object')} of the catalogue cannot be replayed: `kvmtrace fleet index` says why")
    if done.failed_before:
        again = "--retry-failed tries them again"
        page.say(f"{count(done.failed_before, 'VM')} failed in an earlier run: {again}", "bold red")
    if done.failed:
        page.say(f"{count(len(done.failed), 'VM')} could not be replayed:", "bold red")
        reasons: dict[str, list[str]] = {}
        for each in done.failed:
            reasons.setdefault(each.reason, []).append(each.task.text)
        for reason, tasks in sorted(reasons.items(), key=lambda item: -len(item[1]))[:SHOWN]:
            page.say(f"  {reason}: {some(sorted(tasks))}", indent="    ")
        page.more(len(reasons) - SHOWN, "reasons")
    return page.text
