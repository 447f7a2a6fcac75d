# SPDX-License-Identifier: Apache-2.0
"""The compiled modules as plain Python, which is the readable reference that their compiled forms are compared with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

COMPILED = (
    "analysis.passes.acting_threads",
    "analysis.passes.groups",
    "analysis.passes.last_mappings",
    "analysis.passes.lasting",
    "analysis.passes.removal_totals",
    "analysis.passes.removals",
    "replay.decode.dense",
    "replay.decode.row_counts",
    "replay.decode.rows.decoder",
    "replay.decode.rows.exit_records",
    "replay.decode.rows.held_inputs",
    "replay.decode.rows.inferred",
    "replay.decode.rows.page_installs",
    "replay.decode.rows.root_loads",
    "replay.decode.rows.unload_triggers",
    "replay.decode.rows.vm_events",
    "replay.decode.same_rip",
    "replay.decode.spans.timeline",
    "replay.decode.specialize",
    "replay.simulate.compiled.core",
    "replay.simulate.compiled.root_slots",
    "replay.simulate.compiled.timed_queues",
    "replay.simulate.compiled.timer",
    "replay.simulate.compiled.trees",
    "replay.simulate.compiled.turns",
    "replay.simulate.compiled.vcpu_programs",
    "replay.simulate.compiled.vm_operations",
    "replay.simulate.compiled.vm_pools",
    "replay.timing.measuring.lock_waits",
    "replay.timing.measuring.operation_samples",
    "replay.timing.measuring.row_spans",
    "replay.timing.measuring.steal",
    "replay.timing.smis_apart",
)
# What the decoder stands on, the lowest first.
BENEATH_DECODER = (
    "replay.decode.rows.inferred",
    *(f"replay.decode.rows.{name}" for name in (
        "held_inputs", "exit_records", "root_loads", "unload_triggers", "vm_events", "page_installs"
    )),
)  # fmt: skip
ROOT = Path(__file__).parents[2]


def plain(name: str, *beneath: str) -> ModuleType:
    """The module of this name, not compiled; so are those `beneath`, whose classes it extends, the lowest first."""
    path = ROOT / f"{name.replace('.', '/')}.py"
    spec = importlib.util.spec_from_file_location(f"{name.rpartition('.')[2]}_as_python", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {each: plain(each, *beneath[:at]) for at, each in enumerate(beneath)}):
        spec.loader.exec_module(module)
    return module
