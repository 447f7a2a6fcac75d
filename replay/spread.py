# SPDX-License-Identifier: Apache-2.0
"""Say how far single counts of a run may be off, because the recording does not show what is counted.

Where the trace leaves a whole outcome undetermined, there are two runs for the bounds (`plan.Run`). This module is
about single counts that are undetermined in the same way under every policy: roots freed at a VM's end that was not
recorded, TLB flushes for removals that were inferred page by page, and loads of existing roots that the kernel did not
show.
"""

from __future__ import annotations

from collections.abc import Mapping

from replay.counted import VM_END, WITHIN, Spread
from replay.decode.capabilities import Capabilities
from replay.own_policy import OwnPolicyCheck
from replay.result import OF_VCPU, OF_VM
from traces.kernels.triggers import Trigger

_ENDLESS = Spread(0, None)
_ANY = Spread(1 << 62, None)  # nothing is known about the count
_FLIPS = (Trigger.CR0_WP, Trigger.CR0_SILENT, Trigger.EFER, Trigger.UNSEEN)  # may change CR0.WP or EFER.NX
_ALL = (*OF_VCPU, *OF_VM, "roots_peak", "tables_peak", VM_END)


def spreads(
    capabilities: Capabilities, notes: Mapping[str, int], check: OwnPolicyCheck, *, exact: bool, ended: bool
) -> dict[str, Spread]:
    """Return the spread of each undetermined count of one VM under one policy; counts without an entry are exact.

    `notes` are the notes of decoding (`VmInputs.notes`). `exact` says that the run is the recorded policy's, and
    `ended` that the recording shows the VM's end.
    """
    found: dict[str, Spread] = {}

    def add(spread: Spread, *counts: str) -> None:
        for count in counts:
            found[count] = found.get(count, WITHIN) + spread

    if not capabilities.has("vm_destroy"):
        add(_ENDLESS, "frees", "tables_freed", "zapped", "flushes", VM_END)
    if capabilities.infers:
        # Each inferred removal counts as a call, and so a flush, of its own, although one call may have removed many
        # pages. Removals of pages that were not mapped again are not seen at all.
        add(Spread(notes.get("inferred removals", 0), None), "flushes")
        if not ended:
            add(_ENDLESS, "tables_freed", "zapped")
    if exact and capabilities.open_resets:
        # Under the recorded policy the rows show all tables that were built. So an unseen load found an existing root.
        most = None if capabilities.unbounded else notes.get(f"trigger {Trigger.UNSEEN.name}", 0)
        add(Spread(0, most), "loads", "reuses", "flushes")
    flips = any(notes.get(f"trigger {trigger.name}", 0) for trigger in _FLIPS)
    if capabilities.open_roles and (flips or capabilities.unbounded):
        add(_ANY, *(count for count in _ALL if count not in ("faults", "fixes")))
        add(_ENDLESS, "faults", "fixes")
    if capabilities.imported and (apart := check.apart(found)):
        # The replay differs from the rows because the imported source lacks events that a replay needs.
        return {count: found.get(count, WITHIN) + Spread(apart, None) for count in _ALL}
    return found
