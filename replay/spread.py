# SPDX-License-Identifier: Apache-2.0
"""How far a count may lie from the result of a run, where the recording does not show what is counted.

What the trace does not determine of a whole outcome has runs of its own (`plan.Run`). This is of single counts, and the
same under every policy: how many roots went at a VM's end that no row shows, how often TLBs were flushed for removals
that were inferred page by page, how often the recorded kernel loaded a root that it found.
"""

from __future__ import annotations

from collections.abc import Mapping

from replay.counted import VM_END, WITHIN, Spread
from replay.decode.capabilities import Capabilities
from replay.own_policy import OwnPolicyCheck
from replay.result import OF_VCPU, OF_VM
from traces.kernels.triggers import Trigger

_ENDLESS = Spread(0, None)
_ANY = Spread(1 << 62, None)  # nothing is known of it
_FLIPS = (Trigger.CR0_WP, Trigger.CR0_SILENT, Trigger.EFER, Trigger.UNSEEN)  # may change CR0.WP or EFER.NX
_ALL = (*OF_VCPU, *OF_VM, "roots_peak", "tables_peak", VM_END)


def spreads(
    capabilities: Capabilities, notes: Mapping[str, int], check: OwnPolicyCheck, *, exact: bool, ended: bool
) -> dict[str, Spread]:
    """By count, of one VM under one policy; counts that are not in it are as the run has them.

    `notes` are those of its decoding (`VmInputs.notes`); `exact`: the run is the recorded policy's; `ended`: the
    recording shows the VM's end.
    """
    found: dict[str, Spread] = {}

    def add(spread: Spread, *counts: str) -> None:
        for count in counts:
            found[count] = found.get(count, WITHIN) + spread

    if not capabilities.has("vm_destroy"):
        add(_ENDLESS, "frees", "tables_freed", "zapped", "flushes", VM_END)
    if capabilities.infers:
        # Each removal that was inferred is taken for one of its own: one call may have made many of them. Those of
        # pages that were not mapped again are not seen.
        add(Spread(notes.get("inferred removals", 0), None), "flushes")
        if not ended:
            add(_ENDLESS, "tables_freed", "zapped")
    if exact and capabilities.open_resets:
        # Tables that are built are shown: a load that they do not belong to found its root.
        most = None if capabilities.unbounded else notes.get(f"trigger {Trigger.UNSEEN.name}", 0)
        add(Spread(0, most), "loads", "reuses", "flushes")
    flips = any(notes.get(f"trigger {trigger.name}", 0) for trigger in _FLIPS)
    if capabilities.open_roles and (flips or capabilities.unbounded):
        add(_ANY, *(count for count in _ALL if count not in ("faults", "fixes")))
        add(_ENDLESS, "faults", "fixes")
    if capabilities.imported and (apart := check.apart(found)):
        # The replay is not what the rows show, for want of what the source does not show.
        return {count: found.get(count, WITHIN) + Spread(apart, None) for count in _ALL}
    return found
