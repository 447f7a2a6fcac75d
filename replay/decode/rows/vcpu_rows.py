# SPDX-License-Identifier: Apache-2.0
"""The state of a vCPU after its last row as a numpy type; `structures.pxd` explains the fields."""

from __future__ import annotations

from typing import Final

from replay.decode.spans.vcpu_states import VcpuState

VCPU: Final = [(name, "i8", (len(VcpuState),)) if name == "ns" else (name, "i8") for name in (
    "opened", "why", "loaded", "state", "smm", "reset", "unloaded", "cr0_reset", "cr0_input", "entered", "root",
    "dirty", "invalidated", "started", "touch", "touch_input", "requested", "requested_level", "split", "marked",
    "present", "faulted", "built", "built_at", "wp_flips", "maybe_flips", "efer", "cr0", "cr4", "wrote",
    "wrote_trigger", "left", "left_by_io", "asked_smi", "record", "first", "has", "ns", "tables", "built_root",
    "still", "interrupt", "lead", "lead_guest", "lead_idle", "zapped", "prefetched", "rows", "fault_rows", "faults",
    "interrupts", "interrupted", "nesting",
)]  # fmt: skip
# The fields that are -1 at first: numbers of rows and inputs of which there are none, and registers not yet written.
NEVER: Final = (
    "opened", "loaded", "smm", "reset", "unloaded", "cr0_reset", "cr0_input", "entered", "touch", "touch_input",
    "requested", "split", "marked", "faulted", "built", "built_at", "efer", "cr0", "cr4", "wrote", "wrote_trigger",
    "left", "asked_smi", "record",
)  # fmt: skip
