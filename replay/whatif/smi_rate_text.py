# SPDX-License-Identifier: Apache-2.0
"""The result of a sweep of SMI rates, as text and as a part of the JSON document."""

from __future__ import annotations

import math
from typing import Any

from replay.whatif import each_vm
from replay.whatif.smi_rate import Sweep, Swept
from traces.command_line.durations import duration
from traces.command_line.layout import TextColumn
from traces.command_line.screen import VMS_SHOWN, Page


def to_dict(found: dict[int, list[Swept]], unanswered: dict[int, str], sweep: Sweep) -> dict[str, Any]:
    """Return the sweep as it stands in JSON: factors by rate, null where the program hangs.

    Rates are in SMIs a second.
    """
    return {
        "rates": sweep.rates,
        "vms": [
            {"vm": vm, "policies": [{**vars(swept), "limit": swept.limit} for swept in policies]}
            for vm, policies in found.items()
        ],
        "unanswered": each_vm.to_dict(unanswered),
    }


def render(found: dict[int, list[Swept]], unanswered: dict[int, str], sweep: Sweep) -> str:
    """Return for each VM a table of factors by rate and policy, and the rates from which on the program hangs."""
    page = Page()

    def limit(vm: int) -> float:
        return min((swept.limit for swept in found[vm]), default=math.inf)

    for vm in sorted(found, key=limit)[:VMS_SHOWN]:
        policies = found[vm]
        rows = [
            [f"{rate:,.4g}", *(_factor(swept.factors[i]) for swept in policies)] for i, rate in enumerate(sweep.rates)
        ]
        rows.append(["hangs from", *("-" if swept.tips is None else f"{swept.tips:,.4g}" for swept in policies)])
        rows.append(["arithmetic limit", *(f"{swept.limit:,.4g}" for swept in policies)])
        titles = (f"VM {vm}, SMIs a second", *(swept.policy for swept in policies))
        page.table([TextColumn(title) for title in titles], rows)
        for swept in policies:
            page.say(f"{swept.policy}: each SMI costs refill {duration(swept.refill)}, SMI {duration(swept.smi)}")
    page.more(len(found) - VMS_SHOWN, "VMs, which hang at higher rates than these")
    for line in each_vm.notes(unanswered):
        page.say(line)
    page.say("assumed: after each SMI the guest needs every page that is mapped, at once (--refault all)")
    return page.text


def _factor(factor: float | None) -> str:
    return "hangs" if factor is None else f"{factor:,.2f}x"
