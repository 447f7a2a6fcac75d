"""What `kvmtrace fleet index` and `fleet replay` print."""

from __future__ import annotations

from typing import Any, Final

import polars as pl

from replay.fleet.fleet_catalogue import Indexed
from traces.screen import Page
from traces.text import count

SHOWN: Final = 10  # of what is broken or failed


def indexed_to_dict(found: Indexed, where: str) -> dict[str, Any]:
    """The document of `fleet index --json`."""
    rows = found.catalogue.rows.filter(pl.col("reason") == "")
    return {
        "catalogue": where, "root": found.catalogue.root,
        "traces": rows["trace"].n_unique(), "vms": rows.height,
        "bytes": int(rows.unique("trace")["size"].sum()),
        "objects": {"read": found.read, "kept": found.kept, "gone": found.gone, "of_other_names": found.others},
        "broken": found.catalogue.broken.select("trace", "size", "reason").to_dicts(),
    }  # fmt: skip


def render_indexed(found: Indexed, where: str) -> str:
    """The same for people."""
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
