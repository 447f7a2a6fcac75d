"""What a sweep of SMI rates came to, for people and as a document."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from replay.whatif import each_vm
from replay.whatif.smi_rate import Sweep, Swept
from traces.durations import duration
from traces.screen import page, text_of
from traces.text import printable


def to_dict(found: dict[int, list[Swept]], unanswered: dict[int, str], sweep: Sweep) -> dict[str, Any]:
    """The document's part on a sweep: factors by rate, null where the program hangs; rates in SMIs a second."""
    return {
        "rates": sweep.rates,
        "vms": [
            {"vm": vm, "policies": [{**vars(swept), "limit": swept.limit} for swept in policies]}
            for vm, policies in found.items()
        ],
        "unanswered": each_vm.to_dict(unanswered),
    }


def render(found: dict[int, list[Swept]], unanswered: dict[int, str], sweep: Sweep) -> str:
    """For each VM how many times as long its program takes, by rate and policy, and where it tips."""
    console = page()
    for vm, policies in found.items():
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column(f"VM {vm}, SMIs a second", justify="right")
        for swept in policies:
            table.add_column(printable(swept.policy), justify="right")
        for i, rate in enumerate(sweep.rates):
            factors = (swept.factors[i] for swept in policies)
            table.add_row(f"{rate:,.4g}", *("hangs" if factor is None else f"{factor:,.2f}x" for factor in factors))
        table.add_row("hangs from", *("-" if swept.tips is None else f"{swept.tips:,.4g}" for swept in policies))
        table.add_row("arithmetic limit", *(f"{swept.limit:,.4g}" for swept in policies))
        console.print(table)
        for swept in policies:
            parts = f"refill {duration(swept.refill)}, SMI {duration(swept.smi)}"
            console.print(Text(printable(f"{swept.policy}: each SMI costs {parts}")), soft_wrap=True)
    for line in each_vm.notes(unanswered):
        console.print(Text(printable(line)), soft_wrap=True)
    console.print(Text("assumed: after each SMI the guest needs every page that is mapped, at once (--refault all)"))
    return text_of(console)
