# SPDX-License-Identifier: Apache-2.0
"""--apicv: compare an APICv inhibit that deletes the APIC page's memslot (every root goes) with one that zaps a gfn.

Inhibits are inserted into the replay at moments spread over the recording. How much is zapped then is known. How much
of it the guest needs again is not, if the recording had it mapped all along: at least what its faults show, at most
every page.
"""

from __future__ import annotations

from typing import Any

from replay.whatif.answers import Answer, Asked
from replay.whatif.workload import Workload
from traces.command_line.durations import duration
from traces.text import count


def answer(work: Workload, asked: Asked, own: str) -> Answer:
    """Return the answer to --apicv for one VM."""
    moments = work.moments
    number = max(len(moments), 1)
    leaves = [moment.leaves for moment in moments] or [0]
    mean = sum(leaves) / number
    roots = max((moment.roots for moment in moments), default=0)
    seen = [moment.apic for moment in moments] or [0]
    each = work.costs.fault + work.costs.switch
    tables = sum(moment.tables for moment in moments) / number * work.costs.table
    rows: list[dict[str, Any]] = []
    cells = []
    for variant in asked.variants:
        memslot = variant == "memslot"
        zapped = (min(leaves), mean, max(leaves)) if memslot else (min(seen), sum(seen) / number, max(max(seen), roots))
        low = max(work.refaults[0 if memslot else 1], 0) / number
        high = mean if memslot else float(zapped[2])
        refill = high * each + (tables if memslot else 0.0)
        rows.append({
            "variant": variant, "zapped": list(zapped), "refills": [low, high], "refill_ns": [low * each, refill],
            "mmio": work.mmio if memslot else 0,
            "limit": 1e9 / refill if refill else None,
        })  # fmt: skip
        limit = f"{1e9 / refill:,.3g} a second" if refill else "none"
        cells.append([
            variant, f"{zapped[1]:,.0f} ({zapped[0]:,} .. {zapped[2]:,})", f"{low:,.3g} .. {high:,.3g}",
            f"{duration(low * each)} .. {duration(refill)}", limit,
        ])  # fmt: skip
    headers = ["inhibit by", "SPTEs zapped", "refills", "refill takes", "no time is left from"]
    notes = [
        f"an inhibit at each of {len(moments)} moments over the recording; a refill: {each:,} ns (switch, fault)",
        "memslot: once when APICv is inhibited, perhaps again when it comes back (the sources do not agree): once to "
        "twice these numbers a cycle; only AMD's AVIC ever did so",
        f"{count(work.mmio, 'page')} had a cached MMIO SPTE at some time: it goes as the others do; by gfn it stays",
        f"gfn: {count(max(seen), 'SPTE')} of the APIC page mapped; at most one in each root, of {roots}",
    ]
    return Answer("apicv", own, rows, (headers, cells), notes)
